"""`python -m fusedgpt.bench compare A.json B.json`: what moved from one record to another.

Rows are the same if benchmark, name, case and side are; versions in a side's name do not count, so that a new release of a
peer is compared with the old one.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = (
    "milliseconds",
    "seconds",
    "gigabytes",
)  # the first that a row knows is what it was measured for
UNITS = {"milliseconds": "ms", "seconds": "s", "gigabytes": "GB"}
Key = tuple[str, str, str, str]


class Change(NamedTuple):
    key: Key
    figure: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


def run_compare(before: Path, after: Path, above: float = 5.0) -> list[Change]:
    """Print what moved; returns it, the largest change first.

    Args:
        before, after: records of the bench.
        above: percent; smaller changes are counted, not shown.

    Raises:
        ValueError, OSError: a file is no record of the bench, or cannot be read.
    """
    records = load(before), load(after)
    for line in differences(*records):
        print(line)
    tables = [figures(record) for record in records]
    changes = [
        Change(key, name, value, tables[1][key][1])
        for key, (name, value) in tables[0].items()
        if key in tables[1] and value > 0 and tables[1][key][1] > 0
    ]
    changes.sort(key=lambda change: -max(change.ratio, 1 / change.ratio))
    moved = [c for c in changes if max(c.ratio, 1 / c.ratio) > 1 + above / 100]
    for change in moved:
        benchmark, name, case, side = change.key
        what = " · ".join(dict.fromkeys((benchmark, name, case, side)))
        unit = UNITS[change.figure]
        print(f"{change.ratio:>7.2f} x  {change.before:>10,.3f} -> {change.after:>10,.3f} {unit:<3} {what}")
    print(f"{len(moved)} of {len(changes)} figures moved by more than {above:g} %")
    for file, own, other in ((before, *tables), (after, *reversed(tables))):
        for text in missing(own, other):
            print(f"only in {file.name}: {text}")
    return moved


def missing(own: dict[Key, Any], other: dict[Key, Any]) -> Iterator[str]:
    """The figures that the other record lacks; a benchmark that it lacks altogether in one line."""
    for benchmark in dict.fromkeys(key[0] for key in own):
        keys = [key for key in own if key[0] == benchmark]
        if all(key[0] != benchmark for key in other):
            yield f"all of {benchmark} ({len(keys)} figures)"
            continue
        for key in keys:
            if key not in other:
                yield " · ".join(dict.fromkeys(key))


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What the two were measured on, where that is not the same: a ratio across machines says little."""
    old, new = (record["versions"] | {"commit": record.get("commit")} for record in (before, after))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            warning = "  (another machine: the ratios say little)" if name == "device" else ""
            print_name = f"{name}:"
            yield f"{print_name:<9} {old.get(name) or 'unknown'} -> {new.get(name) or 'unknown'}{warning}"


def figures(record: dict[str, Any]) -> dict[Key, tuple[str, float]]:
    """What each row was measured for; rows without a figure are left out."""
    found: dict[Key, tuple[str, float]] = {}
    for row in record["rows"]:
        name = next((name for name in FIGURES if name in row), None)
        if name is not None and row[name] is not None:
            side = re.sub(r" v?\d[\w.+]*", "", row["side"])
            found[row.get("benchmark", record["kind"]), row["name"], row["case"], side] = (name, row[name])
    return found


def load(file: Path) -> dict[str, Any]:
    """A record of the bench.

    Raises:
        ValueError, OSError: the file is none, or cannot be read.
    """
    try:
        record = json.loads(file.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"kind", "versions", "rows"} <= record.keys():
        raise ValueError(f"{file} is not a result of the bench; it takes what --out or `make gpu` wrote")
    return record
