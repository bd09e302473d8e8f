"""PTX written by hand: instructions one by one, what the machine refuses, and the words in which it says so."""

import numpy as np
import pytest

from fusedgpt.bench.emulator import EmulatorError
from fusedgpt.bench.emulator.global_memory import GlobalMemory, Region
from fusedgpt.bench.emulator.instructions.table import known_opcodes
from fusedgpt.bench.emulator.instructions.wgmma import missing_fences
from fusedgpt.bench.emulator.machine import Machine
from fusedgpt.bench.emulator.ptx import parse

PROGRAM = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<9>;
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	shl.b32 %r90, %r1, 2;
	mov.b32 %r91, global_smem;
	add.s32 %r92, %r91, %r90;
	{body};
	ret;
}}
"""


def run(body: str, values: np.ndarray, threads: int = 32, timing: str = "early") -> list[str]:
    """Run `body` on one CTA; %rd3 is the address of the thread's number in `values`, %r92 of its word of shared memory. Returns the findings."""
    module = parse(PROGRAM.format(body=body, threads=threads))
    machine = Machine(module, threads, 1, 4 * threads, timing, False)
    parameters = np.zeros(module.parameter_bytes + 64, np.uint8)
    parameters[:8] = np.array([values.ctypes.data], np.uint64).view(np.uint8)
    memory = GlobalMemory([Region(values.ctypes.data, values.nbytes, "values")])
    machine.run([(0, 0, 0)], (1, 1, 1), parameters, {}, memory, 0)
    return [f"{found.place}: {found.detail}" for found in machine.findings.values()]


ONE = "ld.global.b32 %r2, [%rd3]; {}; st.global.b32 [%rd3], %r3"


@pytest.mark.parametrize(
    ("instruction", "number", "result"),
    [
        ("add.s32 %r3, %r2, 7", 5, 12),
        ("shr.u32 %r3, %r2, 31", 0x80000000, 1),
        ("shr.s32 %r3, %r2, 40", 0x80000000, 0xFFFFFFFF),
        ("shl.b32 %r3, %r2, 32", 5, 0),
        # 2 as bfloat16 and 1 as float32; two numbers of 1.5 in a register
        ("cvt.u16.u32 %rs1, %r2; sub.rn.f32.bf16 %r3, %rs1, 0f3F800000", 0x4000, 0x3F800000),
        ("cvt.u16.u32 %rs1, %r2; fma.rn.f32.bf16 %r3, %rs1, %rs1, 0f3F800000", 0x4000, 0x40A00000),
        ("mov.b64 %rd4, {%r2, %r2}; add.rn.f32x2 %rd5, %rd4, %rd4; mov.b64 {%r4, %r3}, %rd5", 0x3FC00000, 0x40400000),
        ("mov.b64 %rd4, {%r2, %r2}; fma.rn.f32x2 %rd5, %rd4, %rd4, %rd4; mov.b64 {%r4, %r3}, %rd5", 0x3FC00000, 0x40700000),
        ("bfe.u32 %r3, %r2, 4, 8", 0x12345, 0x34),
        ("bfe.s32 %r3, %r2, 4, 8", 0xF80, 0xFFFFFFF8),
        ("bfi.b32 %r3, 0xff, %r2, 8, 4", 0, 0xF00),
        ("prmt.b32 %r3, %r2, 0, 0x0123", 0x11223344, 0x44332211),
        ("lop3.b32 %r3, %r2, 12, 10, 0x96", 3, 3 ^ 12 ^ 10),
        ("shf.l.wrap.b32 %r3, 0x80000000, %r2, 1", 1, 3),
        ("clz.b32 %r3, %r2", 1, 31),
        ("clz.b32 %r3, %r2", 0, 32),
        ("popc.b32 %r3, %r2", 0xF0F0, 8),
        ("div.s32 %r3, %r2, 2", 0xFFFFFFFD, 0xFFFFFFFF),  # -3 / 2 = -1
        ("rem.s32 %r3, %r2, 2", 0xFFFFFFFD, 0xFFFFFFFF),
        ("mul.hi.u32 %r3, %r2, 16", 0xF0000000, 15),
        ("cvt.rn.bf16x2.f32 %r3, 0f3F800000, %r2", 0x40000000, 0x3F804000),  # 1 above, 2 below
        ("cvt.rzi.s32.f32 %r3, %r2", 0xC02CCCCD, 0xFFFFFFFE),  # -2.7
        ("ex2.approx.f32 %r3, %r2", 0x40400000, 0x41000000),  # 2^3
        ("add.rn.bf16x2 %r3, %r2, %r2", 0x3F804000, 0x40004080),
        # 1 + 1.5 * 2^-24 lies nearer to the number above 1; so below 0
        ("add.rn.f32 %r3, %r2, 0f33C00000", 0x3F800000, 0x3F800001),
        ("add.rz.f32 %r3, %r2, 0f33C00000", 0x3F800000, 0x3F800000),
        ("add.rz.ftz.f32 %r3, %r2, 0fB3C00000", 0xBF800000, 0xBF800000),
        ("add.rm.f32 %r3, %r2, 0f33C00000", 0x3F800000, 0x3F800000),
        ("add.rp.f32 %r3, %r2, 0f33000000", 0x3F800000, 0x3F800001),
        ("fma.rm.ftz.f32 %r3, %r2, 0f3F800000, 0fB3000000", 0x3F800000, 0x3F7FFFFF),
        ("cvt.ftz.sat.f32.f32 %r3, %r2", 0xC0000000, 0),
        ("cvt.ftz.sat.f32.f32 %r3, %r2", 0x40000000, 0x3F800000),
        ("cvt.sat.f32.f32 %r3, %r2", 0x3F000000, 0x3F000000),
        ("cvt.sat.f32.f32 %r3, %r2", 0x7FC00000, 0),
        ("createpolicy.fractional.L2::evict_first.b64 %rd4, 1.0; ld.global.L2::cache_hint.b32 %r3, [%rd3], %rd4", 7, 7),
        ("setp.gt.s32 %p1, %r2, 3; selp.b32 %r3, 1, 2, %p1", 4, 1),
        ("setp.neu.f32 %p1, %r2, %r2; selp.b32 %r3, 1, 0, %p1", 0x7FC00000, 1),
        ("shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; mov.b32 %r3, %r4", 9, 9),
        ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1}", 0x12345678, 0x56781234),
        ("mov.b32 %r3, 5; setp.eq.s32 %p1, %r2, 0; @%p1 bra $L__BB0_1; mov.b32 %r3, 6; $L__BB0_1: mov.b32 %r3, %r3", 1, 6),
    ],
)  # fmt: skip
def test_an_instruction(instruction: str, number: int, result: int) -> None:
    values = np.full(32, number, np.uint32)
    assert not run(ONE.format(instruction), values)
    assert (values == np.uint32(result)).all(), [hex(v) for v in values[:2]]


def test_threads_that_take_different_branches() -> None:
    values = np.arange(64, dtype=np.uint32)
    body = """ld.global.b32 %r2, [%rd3]; setp.lt.u32 %p1, %r2, 40; @%p1 bra $L__BB0_1; add.s32 %r2, %r2, 1000;
        $L__BB0_1: add.s32 %r2, %r2, 1; st.global.b32 [%rd3], %r2"""
    assert not run(body, values, 64)
    assert (values == np.where(np.arange(64) < 40, 0, 1000) + np.arange(64) + 1).all()


def shared(store: str, load: str, between: str = "") -> str:
    return f"mov.b32 %r5, {store}; st.shared.b32 [%r92], %r5; {between}; ld.shared.b32 %r6, [{load}]; st.global.b32 [%rd3], %r6"


def test_a_race_between_warps_ends_with_a_barrier() -> None:
    other = "xor.b32 %r7, %r92, 128"  # the word of the other warp
    values = np.zeros(64, np.uint32)
    findings = run(shared("%r1", "%r7", other), values, 64)
    assert len(findings) == 1
    assert findings[0].startswith("race: kernel")
    assert "PTX line" in findings[0]
    assert "since the last barrier" in findings[0]
    assert not run(shared("%r1", "%r7", f"{other}; bar.sync 0"), values, 64)
    assert (values == np.arange(64) ^ 32).all()


def test_shared_memory_that_nobody_wrote() -> None:
    findings = run("ld.shared.b32 %r6, [%r92]; st.global.b32 [%rd3], %r6", np.zeros(32, np.uint32))
    assert [f.split(":")[0] for f in findings] == ["initcheck"]


def test_lanes_that_store_different_values_to_one_address() -> None:
    findings = run("st.shared.b32 [%r91], %r1", np.zeros(32, np.uint32))
    assert [f.split(":")[0] for f in findings] == ["lane conflict"]


@pytest.mark.parametrize("timing", ["early", "late"])
def test_a_copy_that_nobody_waits_for(timing: str) -> None:
    copy = "cp.async.ca.shared.global [%r92], [%rd3], 4; cp.async.commit_group; {} ld.shared.b32 %r6, [%r92]; st.global.b32 [%rd3], %r6"
    values = np.arange(32, dtype=np.uint32)
    assert not run(copy.format("cp.async.wait_group 0;"), values, timing=timing)
    assert (values == np.arange(32)).all()
    assert {f.split(":")[0] for f in run(copy.format(""), values, timing=timing)} == {"async"}


def test_programs_that_spin_for_a_lock() -> None:
    body = """mov.u32 %r5, %tid.x; setp.ne.u32 %p1, %r5, 0; @%p1 bra $L__BB0_2;
        $L__BB0_1: atom.global.cas.b32 %r2, [%rd1], 0, 1; setp.ne.u32 %p2, %r2, 0; @%p2 bra $L__BB0_1;
        ld.global.b32 %r3, [%rd1+4]; add.s32 %r3, %r3, 1; st.global.b32 [%rd1+4], %r3; atom.global.exch.b32 %r2, [%rd1], 0;
        $L__BB0_2: mov.u32 %r5, 0"""
    module = parse(PROGRAM.format(body=body, threads=32))
    machine = Machine(module, 32, 4, 128, "early", False)
    values = np.zeros(32, np.uint32)
    parameters = np.zeros(module.parameter_bytes + 64, np.uint8)
    parameters[:8] = np.array([values.ctypes.data], np.uint64).view(np.uint8)
    memory = GlobalMemory([Region(values.ctypes.data, values.nbytes, "values")])
    machine.run([(i, 0, 0) for i in range(4)], (4, 1, 1), parameters, {}, memory, 0)
    assert values[:2].tolist() == [0, 4]


def test_programs_that_race_for_an_address() -> None:
    module = parse(PROGRAM.format(body="mov.u32 %r2, %ctaid.x; st.global.b32 [%rd3], %r2", threads=32))
    machine, values = Machine(module, 32, 2, 0, "early", False), np.zeros(32, np.uint32)
    parameters = np.zeros(module.parameter_bytes + 64, np.uint8)
    parameters[:8] = np.array([values.ctypes.data], np.uint64).view(np.uint8)
    memory = GlobalMemory([Region(values.ctypes.data, values.nbytes, "values")])
    machine.run([(0, 0, 0), (1, 0, 0)], (2, 1, 1), parameters, {}, memory, 0)
    assert [found.place.split(":")[0] for found in machine.findings.values()] == ["write conflict"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("st.global.b32 [%rd3+4], %r1", "memcheck: 1 threads out of bounds; thread 31 .*0 bytes past the end of values"),
        ("st.global.b32 [%rd1+-4], %r1", "4 bytes before values"),
        ("st.global.b32 [%rd3+2], %r1", "out of bounds|misaligned"),
        ("st.shared.b32 [%r92+128], %r1", "memcheck: .*shared byte 128 of 128"),
        ("setp.lt.u32 %p1, %r1, 16; @%p1 bra $L__BB0_1; bar.sync 1, 64; $L__BB0_1: mov.b32 %r2, 0", "deadlock: .*wait for a barrier"),
        ("tcgen05.wait::ld.sync.aligned", "PTX line .*the emulator does not know the opcode tcgen05"),
        ("cvt.rp.f32.f64 %r2, %rd1", "does not know cvt.rp"),
    ],
)  # fmt: skip
def test_what_stops_a_kernel_says_where_and_why(body: str, says: str) -> None:
    with pytest.raises(EmulatorError, match=says):
        run(body, np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    ("body", "problems"),
    [
        ("mov.b32 %r10, 0; wgmma.fence.sync.aligned; {}", []),
        ("wgmma.fence.sync.aligned; add.s32 %r30, %r1, 1; {}", []),
        ("{}", ["writes a register of this wgmma and no wgmma.fence follows"]),
        ("wgmma.fence.sync.aligned; cvt.rn.bf16x2.f32 %r12, %r1, %r1; {}", ["writes a register"]),
        ("wgmma.fence.sync.aligned; mov.b32 %r20, 0; {}", ["writes a register"]),
        ("wgmma.fence.sync.aligned; {} {}", []),  # accumulating on needs none
    ],
)
def test_a_register_of_wgmma_is_written_before_its_fence(body: str, problems: list[str]) -> None:
    wgmma = (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, %rd4, %p1, 1, 1, 0;"
    )
    # written long before: where the body has a fence, that is enough
    start = "mov.b32 %r10, 0; mov.b32 %r20, 0; "
    code = PROGRAM.format(body=start + body.replace("{}", wgmma), threads=128)
    found = list(missing_fences(parse(code)).values())
    assert len(found) == len(problems)
    assert all(part in text for text, part in zip(found, problems, strict=True))


def test_the_opcodes_that_are_known() -> None:
    assert {"mma", "wgmma", "cp", "mbarrier", "ldmatrix", "shfl", "bra"} <= {*known_opcodes()}
