"""What a launch executes and moves, counted while the emulator runs it: the numbers behind `python -m fusedgpt.bench counts`.

Instructions are counted a warp, by basic block; accesses a warp and instruction, as the hardware serves them: sectors of 32 bytes between L2
and a multiprocessor, wavefronts of 128 bytes in shared memory, a wavefront more for each bank conflict. (NVIDIA, Nsight Compute documentation,
"Memory Tables"; CUDA C++ Programming Guide, "Shared Memory", "Device Memory Accesses")
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .global_memory import Region
from .threads import Mask, Threads

if TYPE_CHECKING:
    from .machine import Machine

SECTOR, WAVEFRONT, BANKS = 32, 128, 32
Program = tuple[int, int, int]
# Which programs of a grid to run; None: all. Takes the kernel's name and its grid.
Sampler = Callable[[str, Program], list[Program] | None]


@dataclass
class LaunchCounts:
    """Of one launch, summed over the programs that ran.

    Keys of `tallies`, all in bytes unless they say otherwise:
        "load asked", "store asked"            of global memory; an address that lanes share counts once
        "load sectors", "store sectors"        number of sectors of 32 bytes
        "shared wavefronts", "shared at best"  number of passes through shared memory, and without bank conflicts
        "waits", "in flight"                   waits for asynchronous copies, and what was in flight at them
    """

    kernel: str
    ptx: str
    grid: Program
    programs: int
    threads: int  # of a program
    shared_bytes: int  # of a program
    executed: Counter[int] = field(default_factory=Counter)  # warps, by the index of a PTX instruction
    tallies: Counter[str] = field(default_factory=Counter)
    # by name of the tensor: its bytes, and the sectors read and written of it, each once
    tensors: dict[str, tuple[int, set[int], set[int]]] = field(default_factory=dict)
    # sectors that warps have loaded into L1 since the basic block began
    cached: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False)

    @property
    def scale(self) -> float:
        """From the programs that ran to the whole grid."""
        return float(np.prod(self.grid)) / self.programs

    def traffic(self) -> tuple[float, float]:
        """Bytes read and written by the grid, of each tensor its sectors once: what memory moves at least.

        Sectors scale with the programs, up to the size of their tensor.
        """
        read = written = 0.0
        for size, loads, stores in self.tensors.values():
            read += min(len(loads) * SECTOR * self.scale, size)
            written += min(len(stores) * SECTOR * self.scale, size)
        return read, written

    # ---- what the machine reports

    def block(self, machine: "Machine", start: int, mask: Mask) -> None:
        warps = machine.threads.warps if mask is True else int(mask.reshape(-1, 32).any(1).sum())
        self.cached = self.cached[:0]
        self.executed.update(dict.fromkeys(range(start, machine.blocks[start].following), warps))

    def access(
        self,
        machine: "Machine",
        kind: str,
        address: np.ndarray,
        width: int,
        threads: np.ndarray,
        through_l1: bool = False,
    ) -> None:
        """Global memory, `width` bytes for each of the threads; kind: "load" or "store".

        through_l1: a warp's next load of a sector in the same basic block is served by L1, as where a thread loads its 32 bytes in two halves.
        """
        if not len(threads):
            return
        warp = (threads // 32).astype(np.uint64) << np.uint64(48)
        self.tallies[f"{kind} asked"] += width * len(np.unique(warp | address))
        steps = range(0, width, SECTOR)  # a wide vector reaches into several
        sectors = [(address + np.uint64(step)) // np.uint64(SECTOR) for step in steps]
        moved = np.unique(np.concatenate([warp | sector for sector in sectors]))
        if through_l1:
            moved = np.setdiff1d(moved, self.cached, assume_unique=True)
            self.cached = np.union1d(self.cached, moved)
        self.tallies[f"{kind} sectors"] += len(moved)
        self.touch(machine.memory.regions, kind, np.unique(np.concatenate(sectors)))

    def box(self, kind: str, region: Region | None, window: np.ndarray) -> None:
        """A bulk copy of a window of a tensor, outermost dimension first."""
        assert region is not None  # it has a window
        self.tallies[f"{kind} asked"] += window.nbytes
        rows = np.array([window.ctypes.data], np.int64)
        for size, stride in zip(window.shape[:-1], window.strides[:-1], strict=True):
            rows = (rows[:, None] + np.arange(size) * stride).ravel()
        last = (rows + window.shape[-1] * window.itemsize - 1) // SECTOR
        counts = last - rows // SECTOR + 1
        sectors = np.repeat(last + 1 - np.cumsum(counts), counts) + np.arange(int(counts.sum()))
        self.tallies[f"{kind} sectors"] += len(sectors)
        self.touch([region], kind, sectors)

    def touch(self, regions: Iterable[Region], kind: str, sectors: np.ndarray) -> None:
        for region in regions:
            inside = (sectors >= region.low // SECTOR) & (sectors * SECTOR < region.high)
            if inside.any():
                size = region.high - region.low
                _, loads, stores = self.tensors.setdefault(region.name, (size, set(), set()))
                (loads if kind == "load" else stores).update(sectors[inside].tolist())

    def shared(self, flat: np.ndarray, width: int, threads: np.ndarray) -> None:
        """Accesses of `width` bytes at byte offsets of the batch's shared memory.

        A warp's accesses of 8 bytes take two turns of 16 lanes, those of 16 bytes four of 8.
        """
        if not len(threads):
            return
        words = (flat >> 2)[:, None] + np.arange(max(width // 4, 1))
        lanes = min(WAVEFRONT // max(width, 4), 32)
        turn = threads // lanes
        pairs = np.unique(np.broadcast_to(turn[:, None], words.shape).astype(np.int64) << 32 | words)
        turns, first = np.unique(pairs >> 32, return_inverse=True)
        passes = np.bincount(first * BANKS + pairs % BANKS, minlength=len(turns) * BANKS).reshape(-1, BANKS)
        self.tallies["shared wavefronts"] += int(passes.max(1).sum())
        self.tallies["shared at best"] += int((-(-passes.sum(1) // BANKS)).sum())

    def copied(self, size: int) -> None:
        """A bulk copy of so many bytes into or out of shared memory, which its swizzle keeps free of conflicts."""
        passes = -(-size // WAVEFRONT)
        self.tallies.update({"shared wavefronts": passes, "shared at best": passes})

    def wait(self, threads: Threads, in_flight: int) -> None:
        """The CTAs of a batch wait for asynchronous copies, with so many bytes in flight in all of them."""
        if in_flight:
            self.tallies.update({"waits": threads.ctas, "in flight": in_flight})
