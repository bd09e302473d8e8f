"""`python -m fusedgpt.bench tiles`: find the fastest tiles on this GPU, as rows to paste into `kernels/tiles.py`.

Every candidate is put into the table, compared with float64 on a small uneven input and timed in turns with the table's
present row. Widths that share a block share a row, so a candidate is judged by the mean of its ratios over them.
`make kernels-report` shows whether the winner spills or is limited by occupancy. Tables are in the order of what a
training step can gain, each at the small model's width first; `candidates.py` has them.

A row of the feed-forward sub-layer also chooses between the library's matmul and a fused one; a row of attention's
backward between one pass and two, with the present tiles of those. All its times are of the whole backward, so the best
of either can be compared across the tables.
"""

import datetime
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ...kernels.examples import GPT2_WIDTHS, parity
from ...kernels.tiles import ANY, DESCRIPTORS, hardware
from ..timing import full_rows, medians, require_gpu
from .candidates import ATTENTION_WORKS, HEADS_OF_64, TABLES, WHOLE, Row, Sweep, Work, by_pointer, in_table

SHOWN = 5


class Result(NamedTuple):
    tile: Row
    ratio: float  # of its time to the present row's, geometric mean over the cases
    milliseconds: dict[Any, float]  # of each case


def run_tiles(
    widths: Sequence[int] = GPT2_WIDTHS,
    dtype_name: str = "bfloat16",
    rows: int | None = None,
    rounds: int = 10,
    seconds: float = 500,
) -> list[str]:
    """Sweep every table, print the fastest tiles, then the rows to paste; returns these.

    Args:
        widths: C to sweep at.
        dtype_name: of the activations: bfloat16, float16 or float32.
        rows: M, by default 65,536 (8,192 on a GPU with little memory).
        rounds: timings of each candidate.
        seconds: to spend, most of it on compiling. A table's width takes at most half of the remaining time;
            candidates beyond that are counted, not tried.

    Raises:
        ValueError: there is no GPU that Triton kernels run on.
    """
    device = require_gpu()
    architecture, dtype = hardware(device).architecture, getattr(torch, dtype_name)
    origin = f"measured on {torch.cuda.get_device_name(device)}, {datetime.date.today()}"
    end = time.monotonic() + seconds
    found: dict[str, list[str]] = {}
    for title, block, cases in _jobs(widths, dtype):
        now = time.monotonic()
        results = list(_sweep(TABLES[title], block, cases, dtype, device, rows, rounds, (now + end) / 2))
        results.sort(key=lambda result: result.ratio)
        if not results:  # no candidates, or no time
            continue
        print(f"{title}, {', '.join(map(str, cases))}, {dtype_name}")
        for result in results[:SHOWN]:
            times = "  ".join(f"{case}: {ms:.4f} ms" for case, ms in result.milliseconds.items())
            print(f"    {_row(result.tile, 'now' if result.ratio == 1 else '')}  {result.ratio:.3f}  {times}")
        winner = results[0].tile._replace(limit=block if block <= WHOLE else ANY)
        found.setdefault(title, []).append(f"    {_row(winner, origin)}")
    if architecture in DESCRIPTORS and dtype != torch.float32 and time.monotonic() < end:
        found["DESCRIPTORS"] = [f"    # {line}" for line in _by_pointer(device, dtype, rows, rounds)]
    print("\nThe rows to paste, by the time they take; check them with `make kernels-report` first.")
    lines = [line for title, of in found.items() for line in (f"{title}, {architecture}:", *of)]
    print("\n".join(lines))
    return lines


def _jobs(widths: Sequence[int], dtype: torch.dtype) -> list[tuple[str, int, Sequence[Any]]]:
    """Tables with the cases of a block, in sweep order: the first block of every table comes first."""
    blocks = {
        title: list(sweep.blocks(widths).items())
        for title, sweep in TABLES.items()
        if sweep.float32 or dtype != torch.float32
    }
    longest = max(map(len, blocks.values()))
    return [(title, *of[i]) for i in range(longest) for title, of in blocks.items() if i < len(of)]


def _sweep(
    sweep: Sweep,
    block: int,
    cases: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
    rows: int | None,
    rounds: int,
    until: float,
) -> Iterator[Result]:
    """The present row (ratio 1) and every candidate that is right; nothing without candidates or time."""
    architecture = hardware(device).architecture
    table = sweep.table
    present = sweep.present(table, architecture, cases[0])
    tiles = [tile for tile in sweep.candidates(block, architecture) if tile[1:-1] != present[1:-1]]
    if not tiles or time.monotonic() > until:
        return
    works = {case: sweep.make_work(rows or full_rows(device), case, dtype, device) for case in cases}

    def under(tile: Row, work: Work) -> Work:
        def tried(i: int) -> object:
            with in_table(table, architecture, tile):
                return work(i)

        return tried

    def times(case: Any, *tiles: Row) -> list[float]:
        return medians([under(tile, works[case]) for tile in tiles], device, rounds, warm_up=2)

    yield Result(present, 1.0, {case: times(case, present)[0] for case in cases})
    for number, tile in enumerate(tiles):
        if time.monotonic() > until:
            print(f"    no time for {len(tiles) - number} of {len(tiles)} candidates")
            return
        try:
            with in_table(table, architecture, tile):
                checks = [parity(sweep.example(case), device, dtype) for case in cases]
        except Exception as failure:  # out of shared memory or registers on this GPU
            print(f"    {_row(tile, '')} cannot run: {type(failure).__name__}")
            continue
        if not all(check.ok for check in checks):
            print(f"    {_row(tile, '')} is WRONG: {checks}")
            continue
        pairs = {case: times(case, present, tile) for case in cases}
        ratio = math.prod(after / before for before, after in pairs.values()) ** (1 / len(cases))
        yield Result(tile, ratio, {case: after for case, (_, after) in pairs.items()})


def _by_pointer(device: torch.device, dtype: torch.dtype, rows: int | None, rounds: int) -> Iterator[str]:
    """Time attention without descriptors: below 1, the architecture is faster without its entry in DESCRIPTORS."""
    architecture = hardware(device).architecture
    for case, (name, make) in itertools.product(HEADS_OF_64, ATTENTION_WORKS.items()):
        work = make(rows or full_rows(device), case, dtype, device)

        def pointed(i: int, work: Work = work) -> object:
            with by_pointer(architecture, case.width):  # noqa: B023 (called within this round)
                return work(i)

        before, after = medians([work, pointed], device, rounds, warm_up=2)
        yield f"{name}, {case}, by pointer: {after / before:.3f} of the time by descriptor"


def _row(tile: Row, origin: str) -> str:
    limit = "ANY" if tile.limit == ANY else str(tile.limit)
    return f'{type(tile).__name__}({limit}, {", ".join(map(str, tile[1:-1]))}, "{origin}"),'
