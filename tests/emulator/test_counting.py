"""Counts of hand-written PTX, each beside what the hardware's rules give: sectors, wavefronts, executions, copies in flight."""

import numpy as np
import pytest

from fusedgpt.bench.emulator.counting import LaunchCounts
from fusedgpt.bench.emulator.global_memory import GlobalMemory, Region
from fusedgpt.bench.emulator.machine import Machine
from fusedgpt.bench.emulator.ptx import parse

from .test_machine import PROGRAM


def counted(body: str, words: int = 4096, threads: int = 32, timing: str = "late") -> LaunchCounts:
    """Run one CTA on an array of words; %r1 is the thread, %rd1 the array's address, %r91 that of shared memory."""
    ptx = PROGRAM.format(body=body, threads=threads)
    module = parse(ptx)
    memory = np.zeros(words + 32, np.uint32)
    values = memory[-memory.ctypes.data % 128 // 4 :][:words]  # begins with a wavefront
    machine = Machine(module, threads, 1, 16384, timing, False)
    parameters = np.zeros(module.parameter_bytes + 64, np.uint8)
    parameters[:8] = np.array([values.ctypes.data], np.uint64).view(np.uint8)
    counts = LaunchCounts("kernel", ptx, (1, 1, 1), 1, threads, 16384)
    region = Region(values.ctypes.data, values.nbytes, "values")
    machine.run([(0, 0, 0)], (1, 1, 1), parameters, {}, GlobalMemory([region]), 0, counts)
    return counts


@pytest.mark.parametrize(
    ("stride", "load", "asked", "sectors"),
    [
        (4, "ld.global.b32 %r2, [%rd3]", 128, 4),
        (8, "ld.global.b32 %r2, [%rd3]", 128, 8),
        (128, "ld.global.b32 %r2, [%rd3]", 128, 32),
        (0, "ld.global.b32 %r2, [%rd3]", 4, 1),
        (16, "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd3]", 512, 16),
        (2, "ld.global.b16 %rs1, [%rd3]", 64, 2),
    ],
)
def test_a_warp_asks_for_each_sector_once(stride: int, load: str, asked: int, sectors: int) -> None:
    tallies = counted(f"mul.wide.u32 %rd2, %r1, {stride}; add.s64 %rd3, %rd1, %rd2; {load}").tallies
    assert (tallies["load asked"], tallies["load sectors"]) == (asked, sectors)


@pytest.mark.parametrize(
    ("stride", "store", "wavefronts", "at_best"),
    [
        (4, "st.shared.b32 [%r92], %r1", 1, 1),
        (8, "st.shared.b32 [%r92], %r1", 2, 1),
        (128, "st.shared.b32 [%r92], %r1", 32, 1),
        (132, "st.shared.b32 [%r92], %r1", 1, 1),
        (16, "st.shared.v4.b32 [%r92], {%r1, %r1, %r1, %r1}", 4, 4),
        (32, "st.shared.v4.b32 [%r92], {%r1, %r1, %r1, %r1}", 8, 4),
        (8, "st.shared.v2.b32 [%r92], {%r1, %r1}", 2, 2),
    ],
)
def test_bank_conflicts_take_wavefronts(stride: int, store: str, wavefronts: int, at_best: int) -> None:
    tallies = counted(f"mul.lo.s32 %r90, %r1, {stride}; add.s32 %r92, %r91, %r90; {store}").tallies
    assert (tallies["shared wavefronts"], tallies["shared at best"]) == (wavefronts, at_best)


def test_a_loop_counts_its_trips_and_a_branch_the_warps_that_take_it() -> None:
    counts = counted(
        "mov.b32 %r2, 0; $again: add.s32 %r2, %r2, 1; setp.lt.s32 %p1, %r2, 5; @%p1 bra $again; "
        "setp.gt.u32 %p2, %r1, 39; @%p2 bra $end; mov.b32 %r3, 1; $end: mov.b32 %r4, 2",
        threads=96,
    )
    executed = {ins.text: counts.executed[ins.index] for ins in parse(counts.ptx).code}
    assert executed["add.s32 %r2, %r2, 1"] == 3 * 5
    assert executed["mov.b32 %r3, 1"] == 2  # threads 0 to 39
    assert executed["mov.b32 %r4, 2"] >= 3


def test_copies_in_flight_are_those_of_a_wait() -> None:
    copy = (
        "mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2; shl.b32 %r90, %r1, 4; add.s32 %r92, %r91, %r90"
    )
    for more in (0, 512):
        copy += f"; add.s32 %r93, %r92, {more}; add.s64 %rd4, %rd3, {more}; cp.async.cg.shared.global [%r93], [%rd4], 16; cp.async.commit_group"
    tallies = counted(f"{copy}; cp.async.wait_group 1; cp.async.wait_group 0").tallies
    assert (tallies["waits"], tallies["in flight"]) == (2, 1024 + 512)
    assert tallies["load asked"] == 1024
    assert tallies["shared wavefronts"] == 8


def test_traffic_takes_each_sector_once_and_scales_with_the_grid() -> None:
    counts = counted("ld.global.b32 %r2, [%rd3]; st.global.b32 [%rd3], %r2; ld.global.b32 %r4, [%rd3+128]")
    assert counts.traffic() == (256, 128)
    counts.grid = (3, 2, 1)
    assert counts.traffic() == (6 * 256, 6 * 128)
    counts.grid = (1000, 1, 1)
    assert counts.traffic()[0] == 4096 * 4  # the tensor's size


def test_l1_serves_the_second_half_of_a_sector_within_a_basic_block() -> None:
    halves = "mul.wide.u32 %rd2, %r1, 32; add.s64 %rd3, %rd1, %rd2; ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd3]; "
    again = "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd3+16]"
    assert counted(halves + again).tallies["load sectors"] == 32
    assert counted(halves + "bra $next; $next: " + again).tallies["load sectors"] == 64
    stores = (halves + again).replace(
        "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd3", "st.global.v4.b32 [%rd3"
    )
    stores = stores.replace("[%rd3]", "[%rd3], {%r1, %r1, %r1, %r1}").replace(
        "[%rd3+16]", "[%rd3+16], {%r1, %r1, %r1, %r1}"
    )
    assert counted(stores).tallies["store sectors"] == 64
