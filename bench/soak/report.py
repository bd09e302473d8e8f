"""The measured part of docs/reliability.md, from the records of `bench soak` and `bench saving`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..table import markdown

Newest = dict[str, tuple[Path, dict[str, Any]]]


def block(newest: Newest) -> str:
    """The text between the markers: what was tried and survived, and what saving costs."""
    lines: list[str] = []
    if "soak" in newest:
        file, record = newest["soak"]
        lines += [
            f"**Tried**: {_about(record)}, {record['minutes']:g} minutes, seed {record['seed']}; `bench/results/{file.name}`",
            "",
            *markdown(
                ("what", "where", "tried", "survived", "not possible here"), list(_tried(record["rows"]))
            ),
            "",
        ]
    if "saving" in newest:
        file, record = newest["saving"]
        heads = (
            "throughput lost to saving",
            "how",
            "a step",
            "lost a checkpoint",
            f"lost, each {INTERVAL} steps",
        )
        lines += [
            f"**Cost**: {_about(record)}; `bench/results/{file.name}`",
            "",
            *markdown(heads, _costs(record["rows"])),
            "",
        ]
    return "\n".join(lines)


INTERVAL = 500  # steps between checkpoints by default


def _about(record: dict[str, Any]) -> str:
    versions = record["versions"]
    return f"{record['date']}, {versions['device']}, torch {versions['torch']}, commit {record['commit'] or 'unknown'}"


def _tried(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A row each; those of mutated inputs are one."""
    inputs = [row for row in rows if row["name"] == "input"]
    for row in rows:
        if row["name"] != "input":
            yield _cells(row["name"], row["case"], [row])
    if inputs:
        yield _cells("mutated input", f"{len(inputs)} kinds of files and flags", inputs)
    yield _cells("**all**", "", rows)


def _cells(name: str, case: str, rows: list[dict[str, Any]]) -> list[str]:
    counts = (sum(row[count] for row in rows) for count in ("tried", "survived", "skipped"))
    return [name, case, *(f"{count:,}" if count else "–" for count in counts)]


def _costs(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["case"],
            row["side"],
            f"{row['step']:.1f} ms",
            f"{row['milliseconds']:.1f} ms",
            f"{row['share']:.2%}",
        ]
        for row in rows
    ]
