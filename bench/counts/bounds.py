"""From counts to bounds: the least time that each unit of a GPU needs for a kernel's work, and how many programs are resident.

A bound is not a time. It says: no run takes less, as this unit at its full rate (`rates.py`) is busy for so long. What it leaves out
(units that wait for each other, launches, the code that ptxas makes of the PTX that was counted, clocks under a power limit) makes
real runs longer; `known.py` says by how much where a time is known.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .rates import GPU

if TYPE_CHECKING:  # it takes Triton, which whoever reads a record may not have
    from .work import Work

SECTOR, WAVEFRONT = 32, 128  # bytes
WARP = 32
UNITS = {
    "issue": "warp instructions over the slots of four schedulers",
    "float": "float32 pipe, integer multiply-adds included",
    "integer": "integer pipe",
    "convert": "conversions",
    "special": "special functions: exp2, tanh, reciprocal, square root",
    "tensor": "tensor cores",
    "shared": "shared memory, bank conflicts and wgmma's operands included",
    "l2": "sectors between L2 and the multiprocessors",
    "dram": "bytes of each tensor, once",
    "latency": "asynchronous copies: too few bytes in flight for the bandwidth (Little's law)",
}
OF_A_MULTIPROCESSOR = ("issue", "float", "integer", "convert", "special", "tensor", "shared")


class Occupancy(NamedTuple):
    programs: int  # resident on a multiprocessor; 0: none fits
    limit: str  # registers, shared memory, warps or programs: what keeps out one more


class Bound(NamedTuple):
    """Of launches that follow one another."""

    units: dict[str, float]  # microseconds for which each unit is busy at least
    microseconds: float  # the sum over the launches of the unit that is busy longest
    unit: str  # the unit that accounts for most of it


def occupancy(gpu: GPU, warps: int, registers: int, shared_bytes: int) -> Occupancy:
    """Resident programs, by the rules of NVIDIA's occupancy calculator (Nsight Compute).

    Registers are handed out to warps in units of 256, a quarter of them by each of four schedulers; shared memory in units of 128 bytes, with
    1 KiB more for each program.

    Args:
        warps: of a program.
        registers: of a thread.
        shared_bytes: of a program.
    """
    of_a_warp = 256 * max(math.ceil(registers * WARP / 256), 1)
    by_registers = 4 * (gpu.registers // 4 // of_a_warp) // warps
    by_shared = gpu.shared_bytes // (128 * math.ceil((shared_bytes + 1024) / 128))
    limits = {
        "registers": by_registers,
        "shared memory": by_shared,
        "warps": gpu.warps // warps,
        "programs": gpu.programs,
    }
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limit)


def of_work(gpu: GPU, work: "Work") -> Occupancy:
    return occupancy(gpu, work.warps, work.registers, work.shared_bytes)


def waves(gpu: GPU, work: "Work") -> float:
    """How often the grid fills the GPU; the last turn may be a partial one. Infinite where no program fits."""
    resident = of_work(gpu, work).programs * gpu.multiprocessors
    return work.programs / resident if resident else math.inf


def bound(gpu: GPU, works: Sequence["Work"]) -> Bound:
    """That of one launch after the other."""
    units: dict[str, float] = defaultdict(float)
    longest: dict[str, float] = defaultdict(float)
    for work in works:
        found = busy(gpu, work)
        unit = max(found, key=found.__getitem__)
        for name, microseconds in found.items():
            units[name] += microseconds
        longest[unit] += found[unit]
    return Bound(dict(units), sum(longest.values()), max(longest, key=longest.__getitem__, default=""))


def matmul_bound(gpu: GPU, flops: float, moved: float) -> float:
    """Microseconds that a library's matmuls need at least: tensor cores or memory, whichever is busy longer."""
    return 1e6 * max(flops / gpu.tensor_peak, moved / gpu.memory_bandwidth)


def busy(gpu: GPU, work: "Work") -> dict[str, float]:
    """Microseconds for which each unit is busy at least, by its name in UNITS.

    A multiprocessor executes whole programs: where they do not divide evenly, the units of one are busy for the largest share.
    """
    lanes = {name: WARP * count for name, count in work.instructions.items()}
    cycles = {
        "issue": work.issued / gpu.issued,
        "float": (lanes.get("float", 0) + lanes.get("multiply", 0)) / gpu.floats,
        "integer": lanes.get("integer", 0) / gpu.integers,
        "convert": lanes.get("convert", 0) / gpu.conversions,
        "special": work.special / gpu.special,
        "tensor": work.tensor_flops / gpu.tensor * gpu.clock / gpu.tensor_clock,
        "shared": (work.shared_wavefronts * WAVEFRONT + work.matrix_shared_bytes) / gpu.shared,
    }
    programs = work.programs
    share = math.ceil(programs / gpu.multiprocessors) / programs  # of the work, on the busiest multiprocessor
    seconds = {unit: share * count / gpu.clock for unit, count in cycles.items()}
    seconds["l2"] = SECTOR * work.sectors / gpu.l2_bandwidth
    seconds["dram"] = (work.dram_read + work.dram_written) / gpu.memory_bandwidth
    seconds["latency"] = latency(gpu, work)
    return {unit: 1e6 * value for unit, value in seconds.items()}


def latency(gpu: GPU, work: "Work") -> float:
    """Seconds by Little's law: bytes that asynchronous copies bring, each after its latency, over those in flight in all resident programs.

    0 where a kernel has no asynchronous copies. Of a grid that does not fill the GPU all programs are in flight.
    """
    if not work.in_flight:
        return 0.0
    resident = min(work.programs, of_work(gpu, work).programs * gpu.multiprocessors)
    if not resident:
        return math.inf
    read = max(SECTOR * work.sectors - work.dram_written, 0.0)
    from_dram = min(work.dram_read, read)
    waited = from_dram * gpu.dram_cycles + (read - from_dram) * gpu.l2_cycles
    return waited / gpu.clock / (work.in_flight * resident)
