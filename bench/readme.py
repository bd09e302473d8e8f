"""`python -m fusedgpt.bench readme`: the measured tables of README.md, docs/benchmarks.md and docs/reliability.md, from committed results.

README gets a short table for each kind of device that has results: our time beside the fastest other implementation.
docs/benchmarks.md gets all figures and the pictures, docs/reliability.md what a soak has tried. The text between the two markers is a function of the results alone; a
test holds it to that.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import data
from .counts import pages
from .ops.run import OURS, first_sizes, ours_and_fastest_other
from .record import ROOT, Record, draw, load
from .soak import report
from .step import bytes
from .table import markdown

BEGIN = "<!-- bench: `python -m fusedgpt.bench readme` writes what follows; never edit it by hand -->\n"
END = "<!-- /bench -->\n"
Newest = dict[
    str, tuple[Path, Record]
]  # file and record of "gpu", "cpu", "counts", "bytes", "data", "soak" and "saving", where there is one
Rows = list[dict[str, Any]]
RELIABILITY = ("soak", "saving")  # kinds of records that docs/reliability.md shows


def run_readme(results: Sequence[Path] = (), root: Path = ROOT) -> None:
    """Rewrite the blocks of both files and draw the pictures.

    Args:
        results: records to show; by default those in bench/results, of which the newest of a CPU and of a GPU count.
        root: the repository.

    Raises:
        ValueError, OSError: a file is no record of the bench, or README.md or docs/benchmarks.md has no block.
    """
    newest = newest_results(list(results) or sorted((root / "bench" / "results").glob("*.json")))
    for kind, (_, record) in newest.items():
        draw(record, root / "docs", "bench-" if kind == "counts" else f"bench-{kind}-")
    texts = {root / name: _replaced(root / name, block) for name, block in blocks(newest, root).items()}
    for file, text in texts.items():
        file.write_text(text)
        print(f"{file}: {', '.join(str(result) for result, _ in newest.values()) or 'there are no results'}")


def newest_results(files: Sequence[Path]) -> Newest:
    """The newest record of a GPU, of a CPU, of counts, of a step's bytes, of data preparation, of a soak and of saving."""
    found: Newest = {}
    for file in files:
        record = load(file)
        kind = record["kind"]
        if kind not in ("bytes", "counts", "data", *RELIABILITY):
            kind = "gpu" if "cuda" in record["versions"] else "cpu"
        if kind not in found or record["date"] >= found[kind][1]["date"]:
            found[kind] = (file, record)
    return dict(sorted(found.items(), reverse=True))


def blocks(newest: Newest, root: Path) -> dict[str, str]:
    """The text between the markers, by file."""
    own = {kind: found for kind, found in newest.items() if kind in RELIABILITY}
    others = {kind: found for kind, found in newest.items() if kind not in RELIABILITY}
    found = {"README.md": short_block(others), "docs/benchmarks.md": full_block(others, root / "docs")}
    return found | ({"docs/reliability.md": report.block(own)} if own else {})


def _replaced(file: Path, block: str) -> str:
    """The file's text with another block between the markers."""
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} lacks the lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + block + END + after


def short_block(newest: Newest) -> str:
    """README's: the training step and every operator beside the fastest other implementation, at the first size."""
    lines: list[str] = []
    for kind, (_, record) in newest.items():
        if kind == "counts":
            lines += pages.short(record)
        elif cells := list(_beside_fastest(record["rows"])):
            heads = (kind.upper(), "fusedgpt", "fastest other", "its time", "over ours")
            about = f"{record['versions']['device']}, torch {record['versions']['torch']}, {record['date']}"
            lines += [*markdown(heads, cells), "", f"{about}; operators forward + backward.", ""]
    return "\n".join(lines)


def _beside_fastest(rows: Rows) -> Iterator[tuple[str, ...]]:
    steps = [row for row in rows if row["benchmark"] == "step" and row["milliseconds"]]
    groups = {"": (f"training step: {steps[0]['case']}", steps)} if steps and steps[0]["side"] == OURS else {}
    for work in first_sizes(rows):
        groups.setdefault(work[0]["name"], (f"{work[0]['name']}: {_sizes(work[0])}", work))
    for title, group in groups.values():
        ours, best = ours_and_fastest_other(group)
        if ours and best:
            yield title, _ms(ours), best["side"], _ms(best), f"{best['ratio']:.2f}"


def _ms(row: dict[str, Any]) -> str:
    return f"{row['milliseconds']:,.{1 if row['milliseconds'] >= 10 else 3}f} ms"


def _sizes(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in row["sizes"].items() if value)


def full_block(newest: Newest, folder: Path) -> str:
    """That of docs/benchmarks.md: every table, and the pictures that are in the folder."""
    lines: list[str] = []
    for kind, (file, record) in newest.items():
        title = kind.upper()
        software = (f"{name} {text}" for name, text in record["versions"].items() if name != "device")
        about = [
            record["versions"]["device"],
            *software,
            f"commit {record['commit'] or 'unknown'}",
            record["date"],
        ]
        lines += [f"**{title}**: {', '.join(about)}; `bench/results/{file.name}`", ""]
        if kind == "counts":
            lines += [pages.about(record) + ".", "", *pages.full(record)]
            lines += ["![Work of every unit, ours beside peers](bench-counts.png)", ""]
            continue
        if kind == "bytes":
            lines += [*bytes.markdown(record["rows"]), ""]
            continue
        if kind == "data":
            lines += [*data.markdown(record["rows"]), ""]
            continue
        lines += [*_step_table(record["rows"]), *_ops_table(record["rows"])]
        for name, text in (
            ("step", "Training steps of every implementation"),
            ("breakdown", "Time of our step by part"),
            ("operators", "Every operator beside other implementations"),
            ("attention", "Attention by sequence length"),
        ):
            picture = f"bench-{kind}-{name}.png"
            if (folder / picture).exists():
                lines += [f"![{text}, {title}]({picture})", ""]
    return "\n".join(lines)


# what a line of the step's table shows: heading, benchmark, figure, its format, and the end of the row's case
LINES = (
    ("training step", "step", "milliseconds", "{:,.1f} ms", ""),
    ("its time over ours", "step", "ratio", "{:.2f}", ""),
    ("tokens a second", "step", "tokens_per_second", "{:,.0f}", ""),
    ("MFU", "step", "mfu", "{:.1%}", ""),
    ("peak memory of its tensors", "step", "gigabytes", "{:,.3g} GB", ""),
    ("first finished step after `import torch`", "startup", "seconds", "{:.1f} s", ""),
    ("the same, empty caches", "startup", "seconds", "{:.1f} s", ", cold"),
    ("the same, warm caches", "startup", "seconds", "{:.1f} s", ", warm"),
    ("a token of text, 1 row", "decode", "milliseconds", "{:.2f} ms", " 1 x "),
    ("a token of text, 8 rows", "decode", "milliseconds", "{:.2f} ms", " 8 x "),
)


def _step_table(rows: Rows) -> Iterator[str]:
    steps = [row for row in rows if row["benchmark"] == "step"]
    names = [row["side"] for row in steps]
    lines = []
    for heading, benchmark, figure, form, part in LINES:
        found = {
            row["side"]: _text(form, row[figure])
            for row in rows
            if row["benchmark"] == benchmark and row.get(figure) is not None and _is_case(row["case"], part)
        }
        if any(name in found for name in names):
            lines.append([heading, *(found.get(name, "–") for name in names)])
    if lines:
        yield from markdown([steps[0]["case"], *names], lines)
        yield ""


def _text(form: str, value: float) -> str:
    if form.endswith(" GB") and value < 1:
        form, value = form.replace("GB", "MB"), 1000 * value
    return form.format(value)


def _is_case(case: str, part: str) -> bool:
    return part in case if part else not case.endswith((", cold", ", warm"))


def _ops_table(rows: Rows) -> Iterator[str]:
    """Every operator at its first size, forward + backward, without dropout and with, beside the fastest other one."""
    lines = []
    for work in first_sizes(rows):
        ours, best = ours_and_fastest_other(work)
        mine = [f"{ours['milliseconds']:.3f} ms", f"{ours['share']:.0%}"] if ours else ["not timed", "–"]
        theirs = [best["side"], f"{best['ratio']:.2f}" if best["ratio"] else "–"] if best else ["none", "–"]
        lines.append([f"{work[0]['name']}: {_sizes(work[0])}", *mine, *theirs])
    if lines:
        heads = (
            "operator, forward + backward",
            "ours",
            "of the limit",
            "fastest other",
            "its time over ours",
        )
        yield from markdown(heads, lines)
        yield ""
