"""What README.md and docs/benchmarks.md show of a record of counts."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from ..record import Record
from ..table import markdown
from . import known
from .goals import goals
from .report import Row, best, conflicts, groups, is_ours, matmul_row, own_matmuls, useful


def about(record: Record) -> str:
    """The compiler that the counts belong to, and what a bound is worth."""
    error = known.summary(list(known.errors(record)))
    versions = f"Triton {record['versions']['triton']}, {record['date']}"
    return f"{versions}, no GPU involved. A bound is no time: bounds are {error}"


def short(record: Record) -> Iterator[str]:
    """README's table: each operator that has a peer, both directions, ours over the best peer's."""
    lines = []
    for ours, others in _both_directions(record["rows"]):
        if not others:
            continue
        cells = [ours["name"]]
        for figure in ("instructions", "dram_bytes", "bound"):
            peer = min(others, key=lambda row: row[figure])
            name = re.split(r",| \d", peer["side"])[0]  # its version is in docs/benchmarks.md
            cells.append(f"{ours[figure] / peer[figure]:.2f} ({name})")
        lines.append([*cells, f"{ours['bound']:,.0f} µs", ours["unit"]])
    if lines:
        heads = (f"counted for {known.ARCHITECTURE}", "instructions", "DRAM bytes", "bound")
        yield from markdown((*heads, f"our bound, {known.GPU}", "binds"), lines)
        yield from ("", f"Forward + backward, ours over the best peer's; {about(record)}.", "")


def _both_directions(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Each operator's sums over its directions: ours, and those of peers that have every direction."""
    sums: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["architecture"] == known.ARCHITECTURE and not row.get("note") and known.GPU in row["bounds"]:
            sums[row["name"]][row["side"]].append(row)
    for name, sides in sums.items():
        ours_alone = next((found for found in sides.values() if is_ours(found[0])), [])
        whole = [_sum(name, found) for found in sides.values() if len(found) == len(ours_alone)]
        if ours := next((row for row in whole if is_ours(row)), None):
            yield ours, [row for row in whole if row is not ours and not own_matmuls(row, ours)]


def _sum(name: str, rows: Sequence[Row]) -> Row:
    bounds = [row["bounds"][known.GPU] for row in rows]
    return {
        "name": name,
        "side": rows[0]["side"],
        "instructions": sum(row["instructions"] for row in rows),
        "dram_bytes": sum(row["dram_bytes"] for row in rows),
        "library_flops": sum(row["library_flops"] for row in rows),
        "bound": sum(bound["microseconds"] for bound in bounds),
        "unit": max(bounds, key=lambda bound: bound["microseconds"])["unit"],
    }


def full(record: Record) -> Iterator[str]:
    """Every table: counts and bounds by architecture, the model's error, goals, our kernels."""
    rows = [row for row in record["rows"] if not row.get("note")]
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        some = [row for row in rows if row["architecture"] == architecture]
        gpus = list(dict.fromkeys(gpu for row in some for gpu in row["bounds"]))
        yield from _counts_table(architecture, some, gpus)
    yield from _error_table(record)
    yield from _goals_table(rows)
    yield from _kernels_table(rows)
    for row in record["rows"]:
        if row.get("note"):
            yield f"- {row['name']}, {row['case']}, {row['side']}: {row['note']}"
    yield ""


def _counts_table(architecture: str, rows: Sequence[Row], gpus: Sequence[str]) -> Iterator[str]:
    heads = (architecture, "instructions", "special", "tensor", "DRAM", "useful", "conflicts")
    lines: list[list[str]] = []
    for group in groups(rows):
        ratios = [best(group, figure) for figure in ("instructions", "dram_bytes")]
        lines.append([f"**{group[0]['name']}, {group[0]['direction']}**", *[""] * (6 + len(gpus))])
        for row in group:
            bounds = [f"{b['microseconds']:,.1f} µs {b['unit']}" for b in row["bounds"].values()]
            side = row["side"] + (", its matmuls included" if own_matmuls(row, group[0]) else "")
            lines.append([side, *_figures(row), *bounds])
        if matmuls := matmul_row(group, gpus):
            sizes = [f"{matmuls['tensor_flops']:,.1f} GFLOP", f"{matmuls['dram_bytes']:,.1f} MB"]
            lines.append([matmuls["side"], "", "", *sizes, "", "", *(matmuls[gpu] for gpu in gpus)])
        if any(peer for peer, _ in ratios):
            (_, instructions), (_, moved) = ratios
            bounds = [f"{best(group, '', gpu)[1]:.2f}" for gpu in gpus]
            lines.append(
                ["ours over the best peer's", f"{instructions:.2f}", "", "", f"{moved:.2f}", "", "", *bounds]
            )
    if lines:
        yield from markdown((*heads, *(f"bound, {gpu}" for gpu in gpus)), lines)
        yield ""


def _figures(row: Row) -> Iterator[str]:
    yield f"{row['instructions'] / 1e6:,.1f} M"
    yield f"{row['special'] / 1e6:,.1f} M" if row["special"] else "–"
    yield f"{row['tensor_flops'] / 1e9:,.1f} GFLOP" if row["tensor_flops"] else "–"
    yield f"{row['dram_bytes'] / 1e6:,.1f} MB"
    for share in (useful(row), conflicts(row)):
        yield "–" if share is None else f"{share:.0%}"


def _error_table(record: Record) -> Iterator[str]:
    found = list(known.errors(record))
    if found:
        heads = (f"the model's error, {known.GPU}", "implementation", "bound", "measured", "bound over that")
        yield from markdown(heads, [_error(error) for error in found])
        yield ""


def _error(error: known.Error) -> tuple[str, ...]:
    bound, measured = f"{error.bound:.3f} ms ({error.unit})", f"{error.measured:.3f} ms"
    return f"{error.name}, {error.direction}", error.side, bound, measured, f"{error.share:.0%}"


def _goals_table(rows: Sequence[Row]) -> Iterator[str]:
    found = list(goals(rows))
    if found:
        lines = [(f"{g.operator}, {g.direction}", g.what, g.figure, g.limit, g.verdict) for g in found]
        yield from markdown(("goal", "", "figure", "limit", ""), lines)
        yield ""


def _kernels_table(rows: Sequence[Row]) -> Iterator[str]:
    """What a multiprocessor holds of each kernel of ours, on the first GPU of its architecture."""
    heads = ("our kernels", "GPU", "warps", "registers", "shared memory", "resident", "limit", "waves")
    lines = [_kernel(row, launch) for row in rows if is_ours(row) for launch in row["launches"]]
    if lines:
        yield from markdown((*heads, "in flight"), lines)
        yield ""


def _kernel(row: Row, launch: Row) -> tuple[str, ...]:
    gpu, resident = next(iter(launch["resident"].items()))
    waves = "–" if resident["waves"] is None else f"{resident['waves']:.2f}"
    return (
        f"{row['name']}, {row['direction']}: `{launch['kernel']}`",
        gpu,
        str(launch["warps"]),
        str(launch["registers"]) + (f", spills {launch['spilled']} B" if launch["spilled"] else ""),
        f"{launch['shared_bytes'] / 1024:.1f} KiB",
        str(resident["programs"]),
        resident["limit"],
        waves,
        f"{launch['in_flight'] / 1024:.1f} KiB" if launch["in_flight"] else "–",
    )
