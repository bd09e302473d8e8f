"""Registers of a wgmma in flight, in short SASS as cuobjdump prints it."""

import pytest

from fusedgpt.bench.gpu.wgmma_hazards import hazards

MATMUL = "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, R24, gsb0"  # R24 to R55, and A in R56 to R59
OTHER = "HGMMA.64x16x16.F32.BF16 R88, gdesc[UR8], R88, gsb0"  # R88 to R95
OPEN = "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR8].tnspB, R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def sass(*instructions: str) -> str:
    """Sixteen bytes each, as on the card: the first is at 0x0000."""
    return "\n".join(
        f"        /*{16 * i:04x}*/ {text:>60} ;   /* 0x00e00000103879f0 */\n{' ' * 70}/* 0x001fc8000bf3e880 */"
        for i, text in enumerate(instructions)
    )


@pytest.mark.parametrize(
    ("instruction", "register"),
    [
        ("FADD R59, R2, R3", "R59, of A"),
        ("FADD R24, R2, R3", "R24, of its accumulators"),
        ("FADD R60, R24, R56", None),  # reads
        ("STG.E desc[UR4][R24.64], R56", None),
        ("LDG.E.128 R52, desc[UR4][R2.64]", "R52, of its accumulators"),
        ("LDG.E.128 R20, desc[UR4][R2.64]", None),
        ("LDG.E.128 R21, desc[UR4][R2.64]", "R24, of its accumulators"),
        ("CS2R R22, SRZ", None),
        ("CS2R R23, SRZ", "R24, of its accumulators"),
        ("IMAD.WIDE R23, R2, 0x4, R4", "R24, of its accumulators"),
        ("LDSM.16.MT88.4 R21, [R2]", "R24, of its accumulators"),
        ("HMMA.16816.F32.BF16 R20, R2, R4, R20", None),
        ("SHFL.BFLY PT, R57, R2, 0x1, 0x1f", "R57, of A"),
        ("@P0 MOV R58, R2", "R58, of A"),
        ("ISETP.GE.AND P0, PT, R56, R24, PT", None),
        ("BAR.SYNC.DEFER_BLOCKING R56, R57", None),
        ("R2UR UR4, R56", None),
        ("UMOV UR56, 0x4", None),
        (OTHER.replace("R88", "R56"), None),  # in order
    ],
)
def test_what_a_wgmma_in_flight_owns(instruction: str, register: str | None) -> None:
    found = hazards(sass("MOV R56, R1", MATMUL, instruction, WAIT, "MOV R56, R2", "EXIT"))
    if register is None:
        assert found == []
    else:
        (sentence,) = found
        assert f"at 0x20 overwrites {register} of the wgmma in flight at 0x10" in sentence
    assert hazards(sass("MOV R56, R1", OPEN, instruction, WAIT, "EXIT")) == found, "not committed, but begun"
    assert hazards(sass("MOV R56, R1", MATMUL, WAIT, instruction, "EXIT")) == []
    assert hazards(sass("MOV R56, R1", instruction, "EXIT")) == []


def test_a_wait_may_leave_the_youngest_groups_in_flight() -> None:
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert hazards(sass(MATMUL, OTHER, wait, "MOV R56, R1", "EXIT")) == []
    (sentence,) = hazards(sass(MATMUL, OTHER, wait, "MOV R95, R1", "EXIT"))
    assert "at 0x30 overwrites R95, of its accumulators of the wgmma in flight at 0x10" in sentence
    assert hazards(sass(OTHER, MATMUL, wait, "MOV R56, R1", "EXIT"))


def test_every_path_is_followed() -> None:
    # around a loop
    (sentence,) = hazards(sass("MOV R56, R1", MATMUL, "@P0 BRA 0x0", WAIT, "EXIT"))
    assert "MOV at 0x0 overwrites R56" in sentence
    assert hazards(sass("MOV R56, R1", MATMUL, WAIT, "@P0 BRA 0x0", "EXIT")) == []
    # past a wait, whose condition is an operand here
    (sentence,) = hazards(sass(MATMUL, "BRA.U UP0, 0x30", WAIT, "MOV R56, R1", "EXIT"))
    assert "MOV at 0x30" in sentence
    # never past an unconditional branch, or an exit
    assert hazards(sass(MATMUL, "BRA 0x30", "MOV R56, R1", WAIT, "EXIT")) == []
    assert hazards(sass(MATMUL, "EXIT", "MOV R56, R1")) == []
    assert hazards(sass(MATMUL, "@P0 EXIT", "MOV R56, R1"))
    # the many groups of a loop that waits for none come to an end
    assert hazards(sass(MATMUL, "@P0 BRA 0x0", WAIT, "EXIT")) == []
