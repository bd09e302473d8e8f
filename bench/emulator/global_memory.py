"""Global memory: the tensors that a launch was given, with bounds and races checked at every access.

Addresses are the tensors' own, so a kernel works on their data. (PTX ISA, 5.1.4 state space .global; 8 memory consistency model)
"""

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .ptx import Instruction
from .threads import OTHER_CTAS, SEVERAL, WARPS, EmulatorError, Threads

Report = Callable[[str, Instruction, str], None]


def grouped(data: np.ndarray, element: int, count: int) -> np.ndarray:
    """Bytes as unsigned integers of `element` bytes, `count` of them a row where there are several."""
    width = element * count
    data = data[: len(data) // width * width].view(f"u{element}")
    return data.reshape(-1, count) if count > 1 else data


class Region:
    """The storage of one tensor, or of several that share it."""

    def __init__(self, address: int, size: int, name: str):
        self.low, self.high, self.name = address, address + size, name
        self.base = address & ~15  # so that views of any width begin aligned
        size += address - self.base
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base))
        self.views: dict[tuple[int, int], np.ndarray] = {}
        self.stamps: tuple[np.ndarray, np.ndarray] | None = None

    def view(self, element: int, count: int) -> np.ndarray:
        if (element, count) not in self.views:
            self.views[element, count] = grouped(self.bytes, element, count)
        return self.views[element, count]

    def last_accesses(self) -> tuple[np.ndarray, np.ndarray]:
        """The stamps of the last write to and the last read of each two bytes in this launch; 0: none yet."""
        if self.stamps is None:
            n = len(self.bytes) // 2 + 16
            self.stamps = np.zeros(n, np.int64), np.zeros(n, np.int64)
        return self.stamps


class GlobalMemory:
    """The regions that a launch may touch."""

    def __init__(self, regions: Iterable[Region]):
        self.regions = sorted(regions, key=lambda region: region.low)
        self.threads: Threads
        self.report: Report
        self.finds_races = True  # it takes eight times the tensors' memory, where they are touched

    def find(self, low: int, high: int) -> Region | None:
        return next((r for r in self.regions if r.low <= low and high <= r.high), None)

    def nearest(self, address: int) -> str:
        """Where an address lies, in words."""
        if not self.regions:
            return "and the launch has no tensor"
        r = min(self.regions, key=lambda r: max(r.low - address, address - r.high, 0))
        if address >= r.high:
            return f"{address - r.high} bytes past the end of {r.name} ({r.high - r.low} bytes)"
        if address < r.low:
            return f"{r.low - address} bytes before {r.name} ({r.high - r.low} bytes)"
        return f"byte {address - r.low} of {r.name} ({r.high - r.low} bytes)"

    def region(self, address: np.ndarray, width: int, threads: np.ndarray) -> Region | None:
        """The region of all these accesses of `width` bytes; None where they are in several.

        Raises:
            EmulatorError: an access out of bounds, or not aligned to its width.
        """
        found = self.find(int(address.min()), int(address.max()) + width)
        if found is None:
            outside = [i for i, a in enumerate(address) if self.find(int(a), int(a) + width) is None]
            if outside:
                a, t = int(address[outside[0]]), int(threads[outside[0]])
                raise EmulatorError(
                    f"memcheck: {len(outside)} threads out of bounds; {self.threads.name(t)}: {width} bytes at {a:#x}, {self.nearest(a)}"
                )
        elif width > 1 and int(np.bitwise_or.reduce(address)) & (width - 1):
            i = int(np.flatnonzero(address & np.uint64(width - 1))[0])
            a = int(address[i])
            raise EmulatorError(
                f"misaligned: {self.threads.name(int(threads[i]))}: {width} bytes at {a:#x}, {self.nearest(a)}"
            )
        return found

    def load(
        self, ins: Instruction, address: np.ndarray, element: int, count: int, threads: np.ndarray
    ) -> np.ndarray:
        """`count` elements of `element` bytes for each of the threads."""
        width = element * count
        region = self.region(address, width, threads)
        if region is None:
            parts = [
                self.load(ins, address[i : i + 1], element, count, threads[i : i + 1])
                for i in range(len(address))
            ]
            return np.concatenate(parts)
        at = self.rows(region, address, width)
        if self.finds_races:
            self.check_read(ins, region, at, width, threads)
        return region.view(element, count)[at]

    def store(
        self,
        ins: Instruction,
        address: np.ndarray,
        element: int,
        count: int,
        threads: np.ndarray,
        values: np.ndarray,
    ) -> None:
        width = element * count
        region = self.region(address, width, threads)
        if region is None:
            for i in range(len(address)):
                one = slice(i, i + 1)
                self.store(ins, address[one], element, count, threads[one], values[one])
            return
        at, view = self.rows(region, address, width), region.view(element, count)
        if self.finds_races:
            self.check_write(ins, region, at, width, threads, values)
        view[at] = values
        if not np.array_equal(view[at], values):
            self.report(
                "write conflict", ins, f"threads store different values to one address of {region.name}"
            )

    @staticmethod
    def rows(region: Region, address: np.ndarray, width: int) -> np.ndarray:
        return ((address - np.uint64(region.base)) // np.uint64(width)).astype(np.int64)

    # races: two accesses, one of them a write, by different warps that no barrier parts

    def _stamps(
        self, at: np.ndarray, width: int, threads: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stamp, base = self.threads.global_stamp[threads], self.threads.global_base[threads]
        pieces = width // 2
        if pieces <= 1:
            return at * width // 2, stamp, base
        return (at * width // 2)[:, None] + np.arange(pieces), stamp[:, None], base[:, None]

    def check_read(
        self, ins: Instruction, region: Region, at: np.ndarray, width: int, threads: np.ndarray
    ) -> None:
        written, read = region.last_accesses()
        index, stamp, base = self._stamps(at, width, threads)
        self.race(ins, region, index, written[index], stamp, base, threads, "reads", "wrote")
        before = read[index]
        elsewhere = (before != 0) & (before >> 32 != stamp >> 32)
        shared = (before >= base) & (before != stamp) & ~elsewhere
        now = np.where(elsewhere, OTHER_CTAS, np.where(shared, base + SEVERAL, stamp))
        read[index] = now
        clash = read[index] != now  # of threads that read one address at once
        if clash.any():
            last = read[index][clash]
            same_cta = last >> 32 == np.broadcast_to(stamp, now.shape)[clash] >> 32
            several = np.broadcast_to(base + SEVERAL, now.shape)[clash]
            read[index[clash]] = np.where(same_cta, several, OTHER_CTAS)

    def check_write(
        self,
        ins: Instruction,
        region: Region,
        at: np.ndarray,
        width: int,
        threads: np.ndarray,
        values: np.ndarray,
    ) -> None:
        written, read = region.last_accesses()
        index, stamp, base = self._stamps(at, width, threads)
        differs: Any = True  # a write of the value that is there already harms nobody
        if width >= 2:
            there = region.bytes[: len(region.bytes) // 2 * 2].view(np.uint16)[index]
            new = np.ascontiguousarray(values).reshape(len(at), -1).view(np.uint16).reshape(index.shape)
            differs = there != new
        self.race(ins, region, index, written[index], stamp, base, threads, "writes", "wrote", differs)
        self.race(ins, region, index, read[index], stamp, base, threads, "writes", "read")
        written[index] = stamp

    def race(
        self,
        ins: Instruction,
        region: Region,
        index: np.ndarray,
        last: np.ndarray,
        stamp: np.ndarray,
        base: np.ndarray,
        threads: np.ndarray,
        does: str,
        did: str,
        differs: Any = True,
    ) -> None:
        bad = (last != 0) & (last != stamp) & ((last >> 32 != stamp >> 32) | (last >= base)) & differs
        if not bad.any():
            return
        place = tuple(np.argwhere(bad)[0])
        other = int(last[place])
        by = (
            "other CTAs"
            if other == OTHER_CTAS
            else f"warp {other % WARPS} of program {(other >> 32) - 1} of the grid"
        )
        me = self.threads.name(int(threads[place[0]]))
        self.report(
            "global race",
            ins,
            f"{me} {does} byte {int(index[place]) * 2} of {region.name}, which {by} {did} in this launch; no barrier parts them",
        )
