"""Every operator beside what a user would pick instead, in one run: times, memory, and how near to the limit each is.

A side is timed only after its outputs and gradients were compared with float64. The limit is the roofline: the bytes that
the work must move at least (`operators.py`) over the bandwidth of a copy, or its FLOPs over the rate of a large matmul,
whichever takes longer, with both ceilings measured in the same run. A side's share is that time over its own; where inputs are so
small that a CPU's caches serve them, it can pass 100 %. Sides take turns.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...gpt.device import pick_device
from .. import record
from ..timing import Call, copy_bandwidth, matmul_rate, medians
from .cases import NAMES, OURS, Side, Sizes, Work, works
from .harness import BACKWARD, BOTH, DIRECTIONS, FORWARD, Setup

MATMULS = "its matmuls alone"


class Limit(NamedTuple):
    """What the work of one direction needs at least."""

    gigabytes: float
    gflop: float
    milliseconds: float


class Ceilings(NamedTuple):
    """What the machine can do, measured in the same run."""

    copy: float  # bytes a second, read and written together
    matmul: float  # FLOPs a second

    def limit(self, work: Work, dtype: torch.dtype, direction: str) -> Limit:
        """Of the two directions together: the sum, for one follows the other."""
        sizes = [elements * dtype.itemsize for elements in work.elements]
        parts = list(zip(sizes, work.arithmetic, strict=True))
        parts = {FORWARD: parts[:1], BACKWARD: parts[1:], BOTH: parts}[direction]
        return Limit(
            sum(size for size, _ in parts) / 1e9,
            sum(flops for _, flops in parts) / 1e9,
            sum(1e3 * max(size / self.copy, flops / self.matmul) for size, flops in parts),
        )


def ceilings(device: torch.device) -> Ceilings:
    return Ceilings(copy_bandwidth(device), matmul_rate(device))


@dataclass
class Row:
    """One side's time in one direction. `name`, `case` and `side` tell rows apart."""

    name: str  # of the operator
    case: str  # sizes and direction
    side: str
    direction: str = ""
    sizes: Mapping[str, float] = field(default_factory=dict)
    dtype: str = ""
    milliseconds: float | None = None  # None where the side was not timed: `note` says why
    ratio: float | None = None  # its time over ours
    share: float | None = None  # of the limit: the roofline's time over its own
    limit: float | None = None  # milliseconds
    gigabytes: float = 0.0  # that must be moved
    gflop: float = 0.0  # that must be computed
    peak_memory: int | None = None  # bytes in use at most above the inputs; None on a CPU
    error: float | None = None  # relative, the largest of outputs and gradients; None where the side failed
    note: str = ""
    benchmark: str = "ops"


def run_ops(
    names: Sequence[str] = (),
    device_name: str = "auto",
    rounds: int = 30,
    out: Path | None = None,
    pictures: Path | None = None,
    sizes: Sizes | None = None,
) -> list[Row]:
    """Time the operators and print a table.

    Args:
        names: of operators, by default all.
        device_name: auto, cpu, cuda, cuda:N.
        rounds: timings of each side, fewer where they take long.
        out: write the figures there as JSON.
        pictures: the folder to write operators.png and attention.png to; by default that of `out`, without which none.
        sizes: by default those of GPT-2 on a GPU, smaller ones on a CPU.

    Raises:
        ValueError: there is no such device here, or no such operator.
    """
    if unknown := set(names) - set(NAMES):
        raise ValueError(f"no operator is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    device = pick_device(device_name)
    about = record.machine(device)
    facts = [f"{name} {value}" for name, value in about["versions"].items()]
    print(" · ".join([*facts, about["commit"] or "outside a clone"]))
    before, most = record.clocks(device), ceilings(device)
    timed = list(printed(measure(device, most, names, rounds, sizes=sizes), most))
    after = record.clocks(device)
    if before and after:
        print(f"\nbefore: {before}\nafter:  {after}")
    kept = {
        "kind": "ops",
        **about,
        "ceilings": most._asdict(),
        "clocks": [before, after],
        "rows": [asdict(row) for row in timed],
    }
    if out:
        record.write(out, kept)
    if folder := pictures or (out and out.parent):
        record.draw(kept, folder)
    return timed


def printed(rows: Iterator[Row], most: Ceilings) -> Iterator[Row]:
    """The rows, each work's as a block of the table when they have come."""
    print(f"copy {most.copy / 1e9:,.0f} GB/s, read and written; matmul {most.matmul / 1e12:,.2f} TFLOP/s")
    print(COLUMNS.format("", "forward ms", "backward", "both", "to ours", "of limit", "peak GiB", "error"))
    for _, group in groupby(rows, lambda row: (row.name, row.sizes)):
        found = list(group)
        print("\n".join(block(found)), flush=True)
        yield from found


COLUMNS = "{:<36}{:>11}{:>11}{:>11}{:>8}{:>9}{:>9}{:>9}"


def block(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of one work in the table: a side a line."""
    sizes = ", ".join(f"{name} {value:g}" for name, value in rows[0].sizes.items())
    limits = {row.direction: row.limit for row in rows if row.limit is not None}
    yield f"{rows[0].name}, {sizes}" + "".join(
        f"; {direction} no less than {limit:.3g} ms"
        for direction, limit in limits.items()
        if direction != BOTH
    )
    sides: dict[str, dict[str, Row]] = {}
    for row in rows:
        sides.setdefault(row.side, {})[row.direction] = row
    for side, found in sides.items():
        notes = {row.note for row in found.values() if row.note}
        last = next((found[d] for d in (BOTH, FORWARD) if d in found and found[d].milliseconds), None)
        if last is None:
            yield f"    {side:<32}{'; '.join(sorted(notes))}"
            continue
        if last.direction == FORWARD:
            notes.add("forward alone")
        times = [f"{found[d].milliseconds or math.nan:.3f}" if d in found else "" for d in DIRECTIONS]
        yield COLUMNS.format(
            f"    {side}",
            *times,
            "" if last.ratio is None else f"{last.ratio:.2f}",
            "" if last.share is None else f"{last.share:.0%}",
            "" if last.peak_memory is None else f"{last.peak_memory / 2**30:.2f}",
            "" if last.error is None else f"{last.error:.0e}",
        ) + "".join(f"  {note}" for note in sorted(notes))


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each work out of a record's rows: our time for both directions, its share of the limit, the best peer."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("milliseconds"):
            if row["direction"] == BOTH:
                cases.setdefault((row["name"], row["case"]), []).append(row)
        elif row.get("note"):
            yield f"    {row['name']} {row['case']}, {row['side']}: {row['note']}"
    for (name, case), timed in cases.items():
        peers = [row for row in timed if not row["side"].startswith(OURS) and row["side"] != MATMULS]
        best = min(peers, key=lambda row: row["milliseconds"], default=None)
        for row in timed:
            if row["side"].startswith(OURS):
                beside = f"; best peer {best['side']} takes {best['ratio']:.2f} of that" if best else ""
                took = f"{row['milliseconds']:.3f} ms, {row['share']:.0%} of the limit"
                yield f"{name} {case:<60}{took}{beside}"


def measure(
    device: torch.device,
    most: Ceilings,
    names: Sequence[str] = (),
    rounds: int = 30,
    seconds: float | None = None,
    sizes: Sizes | None = None,
) -> Iterator[Row]:
    """The rows of the table, as they come.

    Args:
        device: where.
        most: the ceilings that shares refer to.
        names: of operators, by default all.
        rounds: timings of each side, fewer where they take long.
        seconds: no work begins after so many; those left out get a row that says so.
        sizes: by default `operators.preset`.
    """
    began = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for work in works(device, dtype, sizes):
        if names and work.name not in names:
            continue
        if seconds is not None and time.monotonic() - began > seconds:
            yield Row(
                work.name, work.size, "all sides", sizes=work.sizes, note=f"left out: {seconds:g} s were over"
            )
            continue
        try:
            yield from compare(work, Setup(work, dtype, device), most, rounds)
        except (
            RuntimeError
        ) as failure:  # out of memory among the timings, say: the other works are timed all the same
            note = f"failed: {(str(failure).splitlines() or [''])[0]}"
            yield Row(work.name, work.size, "all sides", sizes=work.sizes, note=note)


def compare(work: Work, setup: Setup, most: Ceilings, rounds: int) -> Iterator[Row]:
    """The rows of one work: check every side, then time those that are right, in turns."""
    errors, notes = judge(work, setup)
    fit = [side for side in work.sides if side.name not in notes]
    tables = [_timed(setup, most, FORWARD, fit, rounds)]
    if work.at_once:
        tables.append(_timed(setup, most, BOTH, fit, rounds))
    else:
        tables.append(_timed(setup, most, BACKWARD, fit, rounds))
        tables.append(_added(setup, most, fit, *tables))
    for rows in tables:
        ours = rows[work.sides[0].name].milliseconds
        for row in rows.values():
            row.error, row.note = errors.get(row.side), row.note or notes.get(row.side, "")
            if row.milliseconds and row.limit:
                row.share = row.limit / row.milliseconds
                row.ratio = row.milliseconds / ours if ours else None
            if row.milliseconds or row.note:  # a side that has no backward has no row for it
                yield row


def _timed(
    setup: Setup, most: Ceilings, direction: str, sides: Sequence[Side], rounds: int
) -> dict[str, Row]:
    """Rows by side, with times and memory of the sides given."""
    rows = _rows(setup, most, direction)
    calls: dict[str, Call] = {}
    for side in sides:
        if direction == FORWARD or side.backward:
            with _noting(rows[side.name]):
                call = setup.call(direction, side)
                rows[side.name].peak_memory = setup.peak(call)
                calls[side.name] = call
    if setup.work.layers:
        calls[MATMULS] = setup.matmuls(direction)
    if calls:
        for name, milliseconds in zip(calls, _times(list(calls.values()), setup.device, rounds), strict=True):
            rows[name].milliseconds = milliseconds
    return rows


def _added(
    setup: Setup, most: Ceilings, sides: Sequence[Side], forward: dict[str, Row], backward: dict[str, Row]
) -> dict[str, Row]:
    """Rows of both directions, whose times are the sums of what was taken apart; memory is that of both in one."""
    rows = _rows(setup, most, BOTH)
    for side in sides:
        if side.backward:
            with _noting(rows[side.name]):
                rows[side.name].peak_memory = setup.peak(setup.both(side))
    for name, row in rows.items():
        first, second = forward[name].milliseconds, backward[name].milliseconds
        row.milliseconds = first + second if first and second else None
    return rows


def judge(work: Work, setup: Setup) -> tuple[dict[str, float], dict[str, str]]:
    """The errors of the sides by name, and of those that are not to be timed the reason."""
    errors, notes = {}, {}
    for side in work.sides:
        try:
            error = setup.error(side)
        except Exception as failure:  # a peer may fail in any way; the others are timed all the same
            notes[side.name] = _told(failure)
            continue
        if error == error:  # JSON has no NaN
            errors[side.name] = error
        if not setup.right(error):
            notes[side.name] = f"wrong: not timed, error {error:.1e}"
    return errors, notes


@contextmanager
def _noting(row: Row) -> Iterator[None]:
    """Whatever a side throws becomes its row's note."""
    try:
        yield
    except Exception as failure:
        row.note = _told(failure)


def _told(failure: Exception) -> str:
    return f"failed: {type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"


def _rows(setup: Setup, most: Ceilings, direction: str) -> dict[str, Row]:
    """A row for each side of the work, without its figures."""
    work = setup.work
    limit = most.limit(work, setup.dtype, direction)
    names = [side.name for side in work.sides] + [MATMULS] * bool(work.layers)
    return {
        name: Row(
            work.name,
            f"{work.size}, {direction}",
            name,
            direction,
            work.sizes,
            str(setup.dtype)[6:],
            limit=limit.milliseconds,
            gigabytes=limit.gigabytes,
            gflop=limit.gflop,
        )
        for name in names
    }


def _times(calls: list[Call], device: torch.device, rounds: int) -> list[float]:
    """Medians, of fewer rounds where those would take longer than a second."""
    once = sum(medians(calls, device, 1, warm_up=1))
    return medians(calls, device, min(rounds, max(5, int(1e3 / once))), warm_up=1)
