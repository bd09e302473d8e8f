"""Rows of a record out of what was measured, and the lines of its table: counts, bounds, ratios to the best peer."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .. import table
from ..ops.cases import OURS
from ..record import Record
from . import known
from .bounds import bound, matmul_bound, of_work, waves
from .rates import GPU

if TYPE_CHECKING:  # it takes Triton, which whoever reads a record may not have
    from .measure import Measured

Row = dict[str, Any]
SUMMED = ("sectors", "asked_bytes", "special", "tensor_flops", "shared_wavefronts", "shared_at_best")
COMPARED = {
    "instructions": "instructions",
    "dram_bytes": "DRAM bytes",
}  # with the best peer, beside the bound


def row_of(measured: "Measured", architecture: str, gpus: Sequence[GPU]) -> Row:
    """What one implementation does in one direction: figures of all its launches, its bounds, and each launch, alike ones once.

    The library's matmuls stand apart, as they are the same for all. What else the library does (casts, sums) counts with its bytes.
    """
    works, library = measured.works, measured.library
    flops = float(sum(operation.flops for operation in library))
    moved = float(sum(operation.bytes for operation in library if operation.flops))
    rest = float(sum(operation.bytes for operation in library if not operation.flops))
    row: Row = {
        **_head(measured.name, measured.sizes, measured.direction, measured.side, architecture),
        "instructions": sum(work.issued for work in works),
        "dram_bytes": rest + sum(work.dram_read + work.dram_written for work in works),
        **{name: sum(getattr(work, name) for work in works) for name in SUMMED},
        "library_flops": flops,
        "library_bytes": moved,
        "bounds": {},
        "launches": [],
    }
    for gpu in gpus:
        found = bound(gpu, works)
        passes = 1e6 * rest / gpu.memory_bandwidth
        row["bounds"][gpu.name] = {
            "microseconds": found.microseconds + passes,
            "unit": found.unit or "dram",
            "units": found.units | {"dram": found.units.get("dram", 0.0) + passes},
            "matmuls": matmul_bound(gpu, flops, moved),
        }
    for work in works:
        resident = {gpu.name: of_work(gpu, work)._asdict() | {"waves": waves(gpu, work)} for gpu in gpus}
        launch = asdict(work) | {"resident": resident}
        same = next((other for other in row["launches"] if other == launch | {"times": other["times"]}), None)
        if same:
            same["times"] += 1
        else:
            row["launches"].append(launch | {"times": 1})
    return row


def failed(name: str, sizes: dict[str, float], side: str, architecture: str, why: str) -> Row:
    """The row of an implementation that could not be counted."""
    return _head(name, sizes, "", side, architecture) | {"note": why}


def _head(name: str, sizes: dict[str, float], direction: str, side: str, architecture: str) -> Row:
    case = (
        [f"{key} {value:g}" for key, value in sizes.items()] + [direction] * bool(direction) + [architecture]
    )
    return {
        "benchmark": "counts",
        "name": name,
        "case": ", ".join(case),
        "side": side,
        "direction": direction,
        "architecture": architecture,
        "sizes": sizes,
    }


def useful(row: Row) -> float | None:
    """The share of the bytes in the sectors moved that was asked for; above 1 where lanes of a warp share an address."""
    return row["asked_bytes"] / (32 * row["sectors"]) if row["sectors"] else None


def conflicts(row: Row) -> float | None:
    """The share of the shared memory's wavefronts that bank conflicts cost."""
    whole = row["shared_wavefronts"]
    return 1 - row["shared_at_best"] / whole if whole else None


def is_ours(row: Row) -> bool:
    return row["side"].startswith(OURS)


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of one operator, direction and architecture, ours first, in the order in which they came."""
    order = {key: i for i, key in enumerate(dict.fromkeys((row["name"], row["case"]) for row in rows))}
    every = sorted(rows, key=lambda row: (order[row["name"], row["case"]], not is_ours(row)))
    for _, group in groupby(every, lambda row: (row["name"], row["case"])):
        yield list(group)


def own_matmuls(row: Row, ours: Row) -> bool:
    """Whether an implementation does in its kernels matmuls that we leave to the library, so that its figures are of other work."""
    return row["library_flops"] < 0.99 * ours["library_flops"]


def peers(group: Sequence[Row]) -> list[Row]:
    """Those of other implementations that were counted and leave as much to the library as ours, which comes first."""
    counted = [row for row in group if not row.get("note")]
    return [row for row in counted if not is_ours(row) and not own_matmuls(row, counted[0])]


def best(group: Sequence[Row], figure: str, gpu: str = "") -> tuple[Row | None, float]:
    """The peer with the smallest figure, or bound where a GPU is named, and ours over its."""
    value = (lambda row: row["bounds"][gpu]["microseconds"]) if gpu else (lambda row: row[figure])
    ours = next((row for row in group if is_ours(row)), None)
    others = [row for row in peers(group) if value(row) > 0]
    if ours is None or not others:
        return None, float("nan")
    peer = min(others, key=value)
    return peer, value(ours) / value(peer)


# ---- the printed table


def columns(gpus: Sequence[str]) -> tuple[table.Column, ...]:
    """gpus: whose bounds it has."""
    return (
        ("", "<40", "side", "    {}"),
        ("instructions", ">13", "instructions", "{:.1f} M"),
        ("special", ">9", "special", "{:.1f} M"),
        ("tensor", ">10", "tensor_flops", "{:.1f} GF"),
        ("DRAM", ">10", "dram_bytes", "{:.1f} MB"),
        ("useful", ">7", "useful", "{:.0%}"),
        ("conflicts", ">9", "conflicts", "{:.1%}"),
        *((f"bound {gpu}", ">24", gpu, "{}") for gpu in gpus),
    )


def cells(row: Row) -> Row:
    """A row's figures in the units of the table."""
    scaled = {name: row[name] / 1e6 or None for name in ("instructions", "special", "dram_bytes")}
    bounds = {gpu: f"{b['microseconds']:,.1f} µs {b['unit']}" for gpu, b in row["bounds"].items()}
    shares = {
        "useful": useful(row),
        "conflicts": conflicts(row),
        "tensor_flops": row["tensor_flops"] / 1e9 or None,
    }
    return {"side": row["side"], **scaled, **shares, **bounds}


def table_of(rows: Sequence[Row], gpus: Sequence[str]) -> Iterator[str]:
    """The lines of an operator for one architecture."""
    yield table.heading(columns(gpus))
    for group in groups(rows):
        yield from block(group, gpus)


def block(group: Sequence[Row], gpus: Sequence[str]) -> Iterator[str]:
    """The lines of one operator and direction: each implementation, the library's matmuls, ours beside the best peer."""
    yield f"{group[0]['name']}: {group[0]['case']}"
    for row in group:
        if note := row.get("note"):
            yield f"    {row['side']}: {note}"
        else:
            note = "its matmuls included" if own_matmuls(row, group[0]) else ""
            yield table.line(columns(gpus), cells(row) | {"note": note})
    if matmuls := matmul_row(group, gpus):
        yield table.line(columns(gpus), matmuls)
    if ratios := list(ratio_texts(group, gpus)):
        yield f"    ours over the best peer's: {', '.join(ratios)}"


def matmul_row(group: Sequence[Row], gpus: Sequence[str]) -> Row | None:
    """The library's matmuls of ours, where there are any."""
    row = group[0]
    if not row.get("library_flops"):
        return None
    bounds = {gpu: f"{row['bounds'][gpu]['matmuls']:,.1f} µs" for gpu in gpus}
    sizes = {"tensor_flops": row["library_flops"] / 1e9, "dram_bytes": row["library_bytes"] / 1e6}
    return {"side": "its matmuls, the library's", **sizes, **bounds}


def ratio_texts(group: Sequence[Row], gpus: Sequence[str]) -> Iterator[str]:
    for figure, title in COMPARED.items():
        peer, ratio = best(group, figure)
        if peer:
            yield f"{title} {ratio:.2f} ({peer['side']})"
    for gpu in gpus:
        peer, ratio = best(group, "", gpu)
        if peer:
            yield f"bound on {gpu} {ratio:.2f} ({peer['side']})"


def error_lines(record: Record) -> Iterator[str]:
    """The model's error on the known times."""
    found = list(known.errors(record))
    if not found:
        return
    yield f"The model's error: bounds beside times that one {known.GPU} took (docs/benchmarks.md), the library's matmuls included"
    for e in found:
        what = f"{e.name}, {e.direction}, {e.side}"
        yield f"    {what:<66} bound {e.bound:>7.3f} ms ({e.unit}), measured {e.measured:>7.3f} ms: {e.share:.0%}"
