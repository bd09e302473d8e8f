"""`python -m fusedgpt.bench readme`: README's measured tables and docs' pictures, from the newest committed results.

The text between the two markers in README.md is a function of the results alone; a test holds it to that.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .compare import load
from .record import ROOT, draw

BEGIN = "<!-- bench: `python -m fusedgpt.bench readme` writes what follows; never edit it by hand -->\n"
END = "<!-- /bench -->\n"
BOTH = "forward + backward"
NOTHING = "no result yet"
Record = dict[str, Any]
Rows = list[dict[str, Any]]


def run_readme(results: Sequence[Path] = (), root: Path = ROOT) -> None:
    """Rewrite README's block and draw its pictures.

    Args:
        results: records to show; by default those in bench/results, of which the newest for a CPU and a GPU count.
        root: the repository.

    Raises:
        ValueError: a file is no record of the bench, or README has no block.
    """
    files = list(results) or sorted((root / "bench" / "results").glob("*.json"))
    newest = newest_results(files)
    readme = root / "README.md"
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the lines {BEGIN.strip()} and {END.strip()}")
    for kind, (_, record) in newest.items():
        draw(record, root / "docs", f"bench-{kind}-")
    readme.write_text(before + BEGIN + block(newest, root) + END + after)
    print(f"{readme}: {', '.join(str(file) for file, _ in newest.values()) or 'there are no results'}")


def newest_results(files: Sequence[Path]) -> dict[str, tuple[Path, Record]]:
    """The newest record of a GPU and of a CPU, by "gpu" and "cpu"."""
    found: dict[str, tuple[Path, Record]] = {}
    for file in files:
        record = load(file)
        kind = "gpu" if "cuda" in record["versions"] else "cpu"
        if kind not in found or record["date"] >= found[kind][1]["date"]:
            found[kind] = (file, record)
    return dict(sorted(found.items(), reverse=True))


def block(newest: dict[str, tuple[Path, Record]], root: Path) -> str:
    """What stands between the markers."""
    lines: list[str] = []
    for kind, title in (("gpu", "GPU"), ("cpu", "CPU")):
        file, record = newest.get(kind, (None, {"rows": []}))
        lines += [f"**{title}**" + (f": {_about(record)}; `bench/results/{file.name}`" if file else ""), ""]
        lines += [*_step_table(record["rows"]), "", *_ops_table(record["rows"]), ""]
        for name, text in (
            ("step", "Training steps beside each other"),
            ("breakdown", "Time of our step by part"),
            ("operators", "Every operator beside its peers"),
            ("attention", "Attention by length of the sequence"),
        ):
            picture = Path("docs", f"bench-{kind}-{name}.png")
            if file and (root / picture).exists():
                lines += [f"![{text}, {title}]({picture})", ""]
    return "\n".join(lines)


def _about(record: Record) -> str:
    versions = {name: text for name, text in record["versions"].items() if name != "device"}
    software = ", ".join(f"{name} {text}" for name, text in versions.items())
    return f"{record['versions']['device']}, {software}, commit {record['commit'] or 'unknown'}, {record['date']}"


# what a line of the first table shows: heading, benchmark, figure, how it is written, and the end of the row's case
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
    sides = [row["side"] for row in steps] or ["all sides"]
    case = steps[0]["case"] if steps else "the step"
    yield f"| {case} | {' | '.join(sides)} |"
    yield "|---" * (len(sides) + 1) + "|"
    for heading, benchmark, figure, form, part in LINES:
        found = {
            row["side"]: _text(form, row[figure])
            for row in rows
            if row["benchmark"] == benchmark and row.get(figure) is not None and _is_case(row["case"], part)
        }
        if found or not rows:
            cells = [found.get(side, "" if rows else NOTHING) for side in sides]
            yield f"| {heading} | {' | '.join(cells)} |"


def _text(form: str, value: float) -> str:
    if form.endswith(" GB") and value < 1:
        form, value = form.replace("GB", "MB"), 1000 * value
    return form.format(value)


def _is_case(case: str, part: str) -> bool:
    if part:
        return part in case
    return not case.endswith((", cold", ", warm"))


def _ops_table(rows: Rows) -> Iterator[str]:
    """Every operator at its first size, forward and backward together, beside the fastest of its peers."""
    yield "| operator, forward + backward | ours | of the limit | fastest peer | its time over ours |"
    yield "|---|---|---|---|---|"
    works: dict[tuple[str, bool], Rows] = {}
    for row in rows:
        if row["benchmark"] == "ops" and row.get("direction") == BOTH and row["milliseconds"]:
            work = works.setdefault((row["name"], bool(row["sizes"].get("p"))), [])
            if not work or work[0]["case"] == row["case"]:
                work.append(row)
    for (name, _), work in works.items():
        ours = next((row for row in work if row["side"].startswith("fusedgpt")), None)
        peers = [row for row in work if row is not ours and "matmuls" not in row["side"]]
        best = min(peers, key=lambda row: row["milliseconds"], default=None)
        sizes = ", ".join(f"{key} {value:g}" for key, value in work[0]["sizes"].items() if value)
        mine = (f"{ours['milliseconds']:.3f} ms", f"{ours['share']:.0%}") if ours else ("not timed", "")
        theirs = (best["side"], f"{best['ratio']:.2f}" if best["ratio"] else "") if best else ("none", "")
        yield f"| {name}: {sizes} | {' | '.join((*mine, *theirs))} |"
    if not works:
        yield f"| all of them | {NOTHING} | | | |"
