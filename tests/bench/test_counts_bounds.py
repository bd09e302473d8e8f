"""Bounds against calculations by hand, and occupancy against NVIDIA's published examples."""

import math
from dataclasses import replace

import pytest

from fusedgpt.bench.counts import bounds
from fusedgpt.bench.counts.rates import GPUS
from fusedgpt.bench.counts.work import Work
from fusedgpt.gpt.train.throughput import PEAK_FLOPS

H100, H200, A100 = GPUS["H100"], GPUS["H200"], GPUS["A100"]
NOTHING = Work(
    kernel="a_kernel",
    grid=(132 * 100, 1, 1),
    warps=4,
    registers=32,
    spilled=0,
    shared_bytes=0,
    instructions={},
    tensor_flops=0.0,
    special=0.0,
    asked_bytes=0.0,
    sectors=0.0,
    dram_read=0.0,
    dram_written=0.0,
    shared_wavefronts=0.0,
    shared_at_best=0.0,
    matrix_shared_bytes=0.0,
    barriers=0.0,
    in_flight=0.0,
)


@pytest.mark.parametrize("name", GPUS)
def test_the_rates_give_the_published_peaks(name: str) -> None:
    gpu = GPUS[name]
    assert gpu.tensor_peak == pytest.approx(PEAK_FLOPS[name], rel=0.01)
    teraflops = 2e-12 * gpu.floats * gpu.multiprocessors * gpu.clock
    assert teraflops == pytest.approx({"A100": 19.5, "RTX 4090": 82.6}.get(name, 67), rel=0.01)


# CUDA C++ Best Practices Guide, "Calculating Occupancy"; CUDA C++ Programming Guide, "Multiprocessor Level" (64 and 65 registers)
@pytest.mark.parametrize(
    ("threads", "registers", "programs"), [(128, 37, 12), (320, 37, 4), (512, 64, 2), (512, 65, 1)]
)
def test_nvidias_examples_of_occupancy(threads: int, registers: int, programs: int) -> None:
    assert bounds.occupancy(A100, threads // 32, registers, 0) == (programs, "registers")


def test_what_else_limits_occupancy() -> None:
    kib = 1024
    assert bounds.occupancy(H100, 4, 32, 113 * kib) == (
        2,
        "shared memory",
    )  # with the KiB that is reserved: 228
    assert bounds.occupancy(H100, 4, 32, 113 * kib + 1) == (1, "shared memory")
    assert bounds.occupancy(GPUS["RTX 4090"], 4, 32, 100 * kib) == (0, "shared memory")
    assert bounds.occupancy(H100, 16, 32, 0)[0] == 4  # 2048 threads, of 32 registers
    assert bounds.occupancy(H100, 16, 16, 0) == (4, "warps")
    assert bounds.occupancy(H100, 1, 16, 0) == (32, "programs")


def test_a_copy_is_bound_by_memory() -> None:
    size = 1e9
    copy = replace(NOTHING, asked_bytes=2 * size, sectors=2 * size / 32, dram_read=size, dram_written=size)
    found = bounds.bound(H200, [copy])
    assert (found.unit, found.microseconds) == ("dram", pytest.approx(2e9 / 4.27e12 * 1e6))
    assert found.units["l2"] == pytest.approx(2e9 / 8.43e12 * 1e6)
    assert bounds.bound(H100, [copy]).microseconds == pytest.approx(2e9 / 3.35e12 * 1e6), "as published"


def test_a_matmul_is_bound_by_tensor_cores() -> None:
    flops = 2.0 * 8192**3
    found = bounds.bound(H100, [replace(NOTHING, tensor_flops=flops, dram_read=4 * 8192**2)])
    assert (found.unit, found.microseconds) == ("tensor", pytest.approx(1111, rel=1e-3))
    assert bounds.matmul_bound(H100, flops, 6 * 8192**2) == pytest.approx(1111, rel=1e-3)
    assert bounds.matmul_bound(H100, 1.0, 3.35e12) == pytest.approx(1e6)


def test_pipes_of_a_multiprocessor() -> None:
    """A million warp instructions of a class on each of 132 multiprocessors at 1.98 GHz."""
    million = 132e6
    instructions = dict.fromkeys(("float", "multiply", "integer", "convert"), million)
    work = replace(NOTHING, instructions=instructions, special=16 * million, shared_wavefronts=million)
    microseconds = {
        unit: value * 1.98 for unit, value in bounds.busy(H100, work).items()
    }  # thousands of cycles
    expected = {"issue": 1000, "float": 500, "integer": 500, "convert": 500, "special": 1000, "shared": 1000}
    assert {unit: microseconds[unit] for unit in expected} == pytest.approx(expected)


def test_the_busiest_multiprocessor_counts() -> None:
    even = replace(NOTHING, special=1e9, grid=(264, 1, 1))
    uneven = replace(even, grid=(2, 133, 1))  # 266: two multiprocessors have three of them
    ratio = bounds.busy(H100, uneven)["special"] / bounds.busy(H100, even)["special"]
    assert ratio == pytest.approx(3 / (266 / 132))
    assert bounds.waves(H100, even) == 2 / 16


def test_too_few_bytes_in_flight() -> None:
    """One program on each of 132 multiprocessors with 1 KiB in flight: each KiB takes the latency of DRAM."""
    work = replace(
        NOTHING, grid=(132, 1, 1), in_flight=1024.0, sectors=132 * 32 * 100.0, dram_read=132 * 1024 * 100.0
    )
    microseconds = 100 * 478.8 / 1980
    assert bounds.busy(H100, work)["latency"] == pytest.approx(microseconds)
    assert bounds.bound(H100, [work]).unit == "latency"
    cached = bounds.busy(H100, replace(work, dram_read=0.0))["latency"]
    assert cached == pytest.approx(microseconds * 263 / 478.8)
    assert bounds.busy(H100, replace(work, in_flight=0.0))["latency"] == 0


def test_launches_follow_one_another() -> None:
    a = replace(NOTHING, dram_read=3.35e6)  # 1 microsecond
    b = replace(NOTHING, special=3 * 132 * 16 * 1980.0)  # 3 microseconds
    found = bounds.bound(H100, [a, b, a])
    assert (found.unit, found.microseconds) == ("special", pytest.approx(5))
    assert found.units["dram"] == pytest.approx(2)


def test_a_program_that_does_not_fit_has_no_turn() -> None:
    assert bounds.waves(GPUS["RTX 4090"], replace(NOTHING, shared_bytes=200_000)) == math.inf
