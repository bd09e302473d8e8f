"""The threads of a batch of CTAs, and the time that passes for them.

Between two barriers of its CTA a thread is in one *interval*. A stamp is interval · 64 + warp: who touched a byte, and when. An access by
another warp is ordered before ours only where its stamp is of an earlier interval (PTX ISA, 8.10: barriers order what stands before them).
"""

from typing import Any

import numpy as np

Mask = Any  # which threads take part: True for all, else an array of bool
WARPS = 64  # of a CTA, at most 32; the rest of the numbers has meanings below
SEVERAL = 63  # in a stamp: more than one warp
OTHER_CTAS = (1 << 62) - 1  # a stamp of global memory: threads of several CTAs


class EmulatorError(Exception):
    """What a GPU would fail with, or what the emulator cannot run."""


class Unsupported(EmulatorError):
    """PTX that the emulator does not know."""


class Threads:
    """n threads: `ctas` CTAs of `per_cta`. Arrays have one entry a thread."""

    def __init__(self, per_cta: int, ctas: int):
        self.per_cta, self.ctas = per_cta, ctas
        self.n = per_cta * ctas
        self.warps = self.n // 32
        self.warps_per_cta = per_cta // 32
        everyone = np.arange(self.n)
        self.in_cta = everyone % per_cta
        self.cta = everyone // per_cta
        self.warp = self.in_cta // 32  # within its CTA
        self.lane = everyone % 32
        self.first_of_warp = everyone - self.lane
        self.programs: list[tuple[int, int, int]] = []

    def start(self, programs: list[tuple[int, int, int]], grid: tuple[int, int, int]) -> None:
        """Give each CTA its place in the grid."""
        self.programs = programs
        self.interval = np.ones(self.ctas, np.int64)
        ids = [(z * grid[1] + y) * grid[0] + x + 1 for x, y, z in programs]
        self.program = np.array(ids, np.int64) << 32
        self.set_stamps()

    def next_interval(self, ctas: Any) -> None:
        """These CTAs, or all (True), pass a barrier."""
        self.interval[slice(None) if ctas is True else ctas] += 1
        self.set_stamps()

    def set_stamps(self) -> None:
        base = (self.interval[self.cta] * WARPS).astype(np.int32)
        self.base, self.stamp = base, base + self.warp.astype(np.int32)
        self.global_base = self.program[self.cta] + base
        self.global_stamp = self.global_base + self.warp

    def chosen(self, mask: Mask) -> np.ndarray:
        return np.arange(self.n) if mask is True else np.flatnonzero(mask)

    def everyone(self, mask: Mask) -> np.ndarray:
        """The mask as an array."""
        return np.ones(self.n, bool) if mask is True else mask

    def name(self, thread: int) -> str:
        return f"thread {self.in_cta[thread]} (warp {self.warp[thread]}) of CTA {self.programs[self.cta[thread]]}"


def who(stamp: int) -> str:
    return "several warps" if stamp % WARPS == SEVERAL else f"warp {stamp % WARPS}"
