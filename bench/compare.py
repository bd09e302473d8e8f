"""`python -m fusedgpt.bench compare A.json B.json`: what moved from one record to another.

Rows correspond where benchmark, name, case and implementation are the same. Versions in an implementation's name do not
count, so a new release is compared with the old one. Of a time one figure is compared, of counts all.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .record import Record, load

# a row is compared by the first of these figures that it has
UNITS = {"milliseconds": "ms", "seconds": "s", "gigabytes": "GB"}
COUNTS = {
    "instructions": "warp instructions",
    "special": "special functions",
    "tensor_flops": "tensor FLOPs",
    "sectors": "sectors",
    "dram_bytes": "DRAM bytes",
    "shared_wavefronts": "wavefronts",
}
Key = tuple[str, str, str, str]  # benchmark, name, case, implementation
Figures = dict[Key, tuple[str, float]]  # name and value of the figure


class Change(NamedTuple):
    key: Key
    figure: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def factor(self) -> float:
        """The ratio or its inverse, whichever is above 1."""
        return max(self.ratio, 1 / self.ratio)


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
    old, new = (figures(record) for record in records)
    changes = [
        Change(key, name, value, new[key][1])
        for key, (name, value) in old.items()
        if key in new and value > 0 and new[key][1] > 0
    ]
    moved = sorted((c for c in changes if c.factor > 1 + above / 100), key=lambda c: -c.factor)
    for change in moved:
        times = f"{_number(change.before)} -> {_number(change.after)} {UNITS.get(change.figure, ''):<3}"
        print(f"{change.ratio:>7.2f} x  {times} {_text(change.key)}")
    print(f"{len(moved)} of {len(changes)} figures moved by more than {above:g} %")
    for file, own, other in ((before, old, new), (after, new, old)):
        for text in missing(own, other):
            print(f"only in {file.name}: {text}")
    return moved


def _number(value: float) -> str:
    return f"{value:>10,.3f}" if value < 1e6 else f"{value:>10,.0f}"


def _text(key: Key) -> str:
    return " · ".join(dict.fromkeys(key))


def missing(own: Figures, other: Figures) -> Iterator[str]:
    """The figures that the other record lacks; a benchmark that it lacks altogether in one line."""
    for benchmark in dict.fromkeys(key[0] for key in own):
        keys = [key for key in own if key[0] == benchmark]
        if all(key[0] != benchmark for key in other):
            yield f"all of {benchmark} ({len(keys)} figures)"
        else:
            yield from (_text(key) for key in keys if key not in other)


def differences(before: Record, after: Record) -> Iterator[str]:
    """Where device, versions and commit differ: ratios across machines say little."""
    old, new = (record["versions"] | {"commit": record.get("commit")} for record in (before, after))
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            warning = "  (another machine: the ratios say little)" if name == "device" else ""
            label = f"{name}:"
            yield f"{label:<9} {old.get(name) or 'unknown'} -> {new.get(name) or 'unknown'}{warning}"


def figures(record: Record) -> Figures:
    """The figure of each row, of counts each figure; rows without one are left out."""
    found: Figures = {}
    for row in record["rows"]:
        benchmark = row.get("benchmark", record["kind"])
        implementation = re.sub(r" v?\d[\w.+]*", "", row["side"])
        if benchmark == "counts":
            for name, unit in COUNTS.items():
                if row.get(name) is not None:
                    found[benchmark, f"{row['name']}: {unit}", row["case"], implementation] = (
                        name,
                        row[name],
                    )
            continue
        figure = next((name for name in UNITS if name in row), None)
        if figure is not None and row[figure] is not None:
            found[benchmark, row["name"], row["case"], implementation] = (figure, row[figure])
    return found
