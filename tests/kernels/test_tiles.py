"""What holds for every row of `tiles.py`, whatever a sweep or a compiler's report says."""

import pytest

from fusedgpt.bench.gpu.launches import ARCHITECTURES, rows, tables
from fusedgpt.bench.tiles.candidates import TABLES, WHOLE

NVIDIA = [name for name, (backend, *_) in ARCHITECTURES.items() if backend == "cuda"]


@pytest.mark.parametrize("architecture", NVIDIA)
def test_no_loop_waits_for_what_it_has_just_requested(architecture: str) -> None:
    """2 stages take the buffer of a prefetch and have nothing in flight: only AMD's pipeline uses them."""
    used = rows(architecture)
    assert len(used) > 30
    assert [row for row in used if getattr(row.tile, "stages", 1) == 2] == []


def test_any_is_for_nvidia_too() -> None:
    assert [row for table in tables().values() for row in table["any"] if row.stages == 2] == []


@pytest.mark.parametrize("architecture", NVIDIA)
@pytest.mark.parametrize("name", TABLES)
def test_the_sweep_tries_no_such_row(name: str, architecture: str) -> None:
    for block in (64, 128) if name.startswith("ATTENTION") else (64, 1024, WHOLE, 2 * WHOLE):
        assert {tile.stages for tile in TABLES[name].candidates(block, architecture)} <= {0, 1, 3, 4}
