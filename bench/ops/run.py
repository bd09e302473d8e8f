"""Every operator beside what a user would pick instead, in one run: time, memory, and share of the limit.

An implementation is timed only after its outputs and gradients were compared with float64. The limit is the roofline: the
bytes that the work must move at least (`cases.py`) over the bandwidth of a copy, or its FLOPs over the rate of a large matmul,
whichever takes longer, both measured in the same run. An implementation's share is that time over its own; it can exceed
100 % where inputs fit into a CPU's caches. Implementations take turns.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...gpt.device import pick_device
from .. import record, table
from ..timing import Call, copy_bandwidth, failure, matmul_rate, medians
from .cases import NAMES, OURS, Implementation, Sizes, Work, works
from .harness import BACKWARD, BOTH, FORWARD, Setup

MATMULS = "its matmuls alone"


class Limit(NamedTuple):
    """The least that the work of one direction needs."""

    gigabytes: float
    gflop: float
    milliseconds: float


class Ceilings(NamedTuple):
    """What the machine can do, measured in the same run."""

    copy: float  # bytes a second, read plus written
    matmul: float  # FLOPs a second

    def limit(self, work: Work, dtype: torch.dtype, direction: str) -> Limit:
        """That of both directions is the sum, for one follows the other."""
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
    """One implementation in one direction. `name`, `case` and `side` identify it."""

    name: str  # of the operator
    case: str  # sizes and direction
    side: str  # the implementation
    direction: str = ""
    sizes: Mapping[str, float] = field(default_factory=dict)
    dtype: str = ""
    milliseconds: float | None = None  # None where it was not timed: `note` says why
    ratio: float | None = None  # its time over ours
    share: float | None = None  # of the limit: the roofline's time over its own
    limit: float | None = None  # milliseconds
    gigabytes: float = 0.0  # that must be moved
    gflop: float = 0.0  # that must be computed
    peak_memory: int | None = None  # bytes above the inputs; None on a CPU
    error: float | None = None  # relative, the largest of outputs and gradients; None where it failed
    note: str = ""
    benchmark: str = "ops"


def run_ops(
    names: Sequence[str] = (),
    device_name: str = "auto",
    rounds: int = 30,
    out: Path | None = None,
    pictures: Path | None = None,
    sizes: Sizes | None = None,
) -> None:
    """Time the operators and print a table.

    Args:
        names: of operators, by default all.
        device_name: auto, cpu, cuda, cuda:N.
        rounds: timings of each implementation, fewer where they take long.
        out: write the record there as JSON.
        pictures: the folder for operators.png and attention.png; by default that of `out`, without which there are none.
        sizes: by default those of GPT-2 on a GPU, smaller ones on a CPU.

    Raises:
        ValueError: there is no such device here, or no such operator.
    """
    if unknown := set(names) - set(NAMES):
        raise ValueError(f"no operator is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    device = pick_device(device_name)
    with record.recording("ops", device, out, pictures) as found:
        most = ceilings(device)
        found["ceilings"] = most._asdict()
        rows = measure(device, most, names, rounds, sizes=sizes)
        found["rows"] = [asdict(row) for row in printed(rows, most)]


COLUMNS = (
    ("", "<36", "side", "    {}"),
    ("forward ms", ">10", FORWARD, "{:.3f}"),
    ("backward", ">10", BACKWARD, "{:.3f}"),
    ("both", ">10", BOTH, "{:.3f}"),
    ("to ours", ">7", "ratio", "{:.2f}"),
    ("of limit", ">8", "share", "{:.0%}"),
    ("peak GiB", ">8", "peak", "{:.2f}"),
    ("error", ">8", "error", "{:.0e}"),
)


def printed(rows: Iterator[Row], most: Ceilings) -> Iterator[Row]:
    """The rows; those of a work are printed when all of them have come."""
    print(f"copy {most.copy / 1e9:,.0f} GB/s, read plus written; matmul {most.matmul / 1e12:,.2f} TFLOP/s")
    print(table.heading(COLUMNS))
    for _, group in groupby(rows, lambda row: (row.name, row.sizes)):
        found = list(group)
        print("\n".join(block(found)), flush=True)
        yield from found


def block(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of one work in the table, one for each implementation."""
    limits = {row.direction: row.limit for row in rows if row.limit is not None and row.direction != BOTH}
    title = f"{rows[0].name}, {', '.join(f'{name} {value:g}' for name, value in rows[0].sizes.items())}"
    yield title + "".join(f"; {direction} no less than {ms:.3g} ms" for direction, ms in limits.items())
    for name in dict.fromkeys(row.side for row in rows):
        found = {row.direction: row for row in rows if row.side == name}
        notes = {row.note for row in found.values() if row.note}
        figures: dict[str, Any] = {direction: row.milliseconds for direction, row in found.items()}
        last = next((found[d] for d in (BOTH, FORWARD) if figures.get(d)), None)
        if last:
            figures |= {"ratio": last.ratio, "share": last.share, "error": last.error}
            figures["peak"] = last.peak_memory and last.peak_memory / 2**30
            if last.direction == FORWARD:
                notes.add("forward alone")
        yield table.line(COLUMNS, figures | {"side": name, "note": "; ".join(sorted(notes))})


def first_sizes(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Out of a record's rows: forward + backward of every operator at its first size, without dropout and with."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("direction") == BOTH and row["milliseconds"]:
            group = groups.setdefault((row["name"], row["sizes"].get("p", 0)), [])
            if not group or group[0]["case"] == row["case"]:
                group.append(row)
    return list(groups.values())


def ours_and_fastest_other(
    rows: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Out of the rows of one case: ours, and the fastest of the other implementations; None where there is none."""
    ours = next((row for row in rows if row["side"].startswith(OURS)), None)
    others = [row for row in rows if row is not ours and row["side"] != MATMULS]
    return ours, min(others, key=lambda row: row["milliseconds"], default=None)


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each work out of a record's rows: our time for both directions, its share of the limit, the fastest other."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("milliseconds"):
            if row["direction"] == BOTH:
                cases.setdefault((row["name"], row["case"]), []).append(row)
        elif row.get("note"):
            yield f"    {row['name']} {row['case']}, {row['side']}: {row['note']}"
    for (name, case), timed in cases.items():
        ours, best = ours_and_fastest_other(timed)
        if ours:
            beside = f"; the fastest other, {best['side']}, takes {best['ratio']:.2f} of that" if best else ""
            took = f"{ours['milliseconds']:.3f} ms, {ours['share']:.0%} of the limit"
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
        rounds: timings of each implementation, fewer where they take long.
        seconds: no work begins after so many; those left out get a row that says so.
        sizes: by default `cases.preset`.
    """
    began = time.monotonic()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for work in works(device, dtype, sizes):
        if names and work.name not in names:
            continue
        note = ""
        if seconds is not None and time.monotonic() - began > seconds:
            note = f"left out: {seconds:g} s were over"
        else:
            try:
                yield from compare(work, Setup(work, dtype, device), most, rounds)
            except (
                RuntimeError
            ) as error:  # out of memory between timings, say: the other works are still timed
                note = failure(error)
        if note:
            yield Row(work.name, work.size, "all implementations", sizes=work.sizes, note=note)


def compare(work: Work, setup: Setup, most: Ceilings, rounds: int) -> Iterator[Row]:
    """The rows of one work: check every implementation, then time the correct ones in turns."""
    errors, notes = judge(work, setup)
    correct = [one for one in work.implementations if one.name not in notes]
    tables = [_timed(setup, most, FORWARD, correct, rounds)]
    if work.at_once:
        tables.append(_timed(setup, most, BOTH, correct, rounds))
    else:
        tables.append(_timed(setup, most, BACKWARD, correct, rounds))
        tables.append(_timed(setup, most, BOTH, correct, rounds, apart=tables[:2]))
    for rows in tables:
        ours = rows[work.implementations[0].name].milliseconds
        for row in rows.values():
            row.error, row.note = errors.get(row.side), row.note or notes.get(row.side, "")
            if row.milliseconds and row.limit:
                row.share = row.limit / row.milliseconds
                row.ratio = row.milliseconds / ours if ours else None
            if row.milliseconds or row.note:  # there is no row for a backward that does not exist
                yield row


def judge(work: Work, setup: Setup) -> tuple[dict[str, float], dict[str, str]]:
    """Errors by implementation, and the reasons of those that are not to be timed."""
    errors, notes = {}, {}
    for implementation in work.implementations:
        try:
            error = setup.error(implementation)
        except Exception as raised:  # a package may fail in any way; the others are still timed
            notes[implementation.name] = failure(raised)
            continue
        if error == error:  # JSON has no NaN
            errors[implementation.name] = error
        if not setup.right(error):
            notes[implementation.name] = f"wrong: not timed, error {error:.1e}"
    return errors, notes


def _timed(
    setup: Setup,
    most: Ceilings,
    direction: str,
    implementations: Sequence[Implementation],
    rounds: int,
    apart: Sequence[dict[str, Row]] = (),
) -> dict[str, Row]:
    """Rows by implementation, with time and memory of those given.

    apart: rows of the forward and of the backward, whose times are then added instead of timing both at once.
    """
    work = setup.work
    limit = most.limit(work, setup.dtype, direction)
    case, dtype = f"{work.size}, {direction}", str(setup.dtype)[6:]
    names = [one.name for one in work.implementations] + [MATMULS] * bool(work.layers)
    least: dict[str, Any] = {
        "limit": limit.milliseconds,
        "gigabytes": limit.gigabytes,
        "gflop": limit.gflop,
    }
    rows = {name: Row(work.name, case, name, direction, work.sizes, dtype, **least) for name in names}
    calls: dict[str, Call] = {}
    for implementation in implementations:
        if direction == FORWARD or implementation.backward:
            row = rows[implementation.name]
            try:
                call = setup.call(direction, implementation)
                row.peak_memory = setup.peak(call)
                calls[row.side] = call
            except Exception as error:
                row.note = failure(error)
    if apart:
        for name, row in rows.items():
            first, second = (timed[name].milliseconds for timed in apart)
            row.milliseconds = first + second if first and second else None
        return rows
    if work.layers:
        calls[MATMULS] = setup.matmuls(direction)
    if calls:
        once = sum(medians(list(calls.values()), setup.device, 1, warm_up=1))
        rounds = min(rounds, max(5, int(1e3 / once)))  # fewer where they would take longer than a second
        times = medians(list(calls.values()), setup.device, rounds, warm_up=1)
        for name, milliseconds in zip(calls, times, strict=True):
            rows[name].milliseconds = milliseconds
    return rows
