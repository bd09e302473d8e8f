"""What `python -m fusedgpt.bench step | breakdown | memory | startup | decode | all` runs, on a CPU as on a GPU.

Each measurement yields rows; a row prints as a line of a table and is kept as it is in the record (`record.py`).
"""

import datetime
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from . import record
from .gpu.parts import Options, Part, Row, part_main, run_parts
from .ops import run as ops
from .step import breakdown, decode, memory, startup, step
from .step.sizes import Workload, workload

ALL_SECONDS = 165.0  # on a CPU: all of it within three minutes


class Measurement(NamedTuple):
    title: str
    measure: Callable[..., Iterator[Any]]  # (work, options) -> rows
    heads: tuple[str, ...]
    layout: str
    line: Callable[[Any], str]
    row: type


def _of(title: str, module: Any) -> Measurement:
    return Measurement(title, module.measure, module.HEADS, module.LINE, module.line, module.Row)


MEASUREMENTS = {
    "step": _of("a training step: forward, backward, clipping, AdamW", step),
    "breakdown": _of("where our step's time goes", breakdown),
    "memory": _of("peak memory of the step's tensors", memory),
    "startup": _of("from a fresh process to the first finished step", startup),
    "decode": _of("greedy text with a cache of keys and values", decode),
}


def run_measurement(
    name: str, work: Workload, out: Path | None = None, pictures: Path | None = None, **options: Any
) -> list[Row]:
    """Measure, print a table, and write the record and its pictures where asked for.

    Args:
        name: out of MEASUREMENTS.
        out: write the record there as JSON.
        pictures: the folder for pictures; by default that of `out`, without which there are none.
        options: of the measurement.
    """
    found: Row = {"kind": name, **record.machine(work.device)}
    print(about(found))
    before = record.clocks(work.device)
    rows = [{"benchmark": name, **row} for row in printed(name, work, **options)]
    clocks = [before, record.clocks(work.device)]
    if all(clocks):
        print(f"before: {clocks[0]}\nafter:  {clocks[1]}")
    found |= {"clocks": clocks, "rows": rows}
    if out:
        record.write(out, found)
        print(out)
    if folder := pictures or (out and out.parent):
        record.draw(found, folder)
    return rows


def about(found: Row) -> str:
    """What was measured on what, in a line."""
    versions = (f"{key} {value}" for key, value in found["versions"].items())
    return " · ".join([*versions, found["commit"] or "outside a clone"])


def printed(name: str, work: Workload, **options: Any) -> Iterator[Row]:
    """The rows of a measurement, each printed when it comes."""
    measurement = MEASUREMENTS[name]
    print(measurement.layout.format(*measurement.heads, "").rstrip(), flush=True)
    for row in measurement.measure(work, **options):
        print(measurement.line(row), flush=True)
        yield asdict(row)


def table(name: str, rows: list[Row]) -> Iterator[str]:
    """The table of a measurement's rows out of a record."""
    measurement = MEASUREMENTS[name]
    yield measurement.layout.format(*measurement.heads, "").rstrip()
    for row in rows:
        yield measurement.line(measurement.row(**{k: v for k, v in row.items() if k != "benchmark"}))


# ---- everything, part by part


def run_all(work: Workload, out: Path | None = None, pictures: Path | None = None) -> Row:
    """Run every measurement, write one record after each of them, and draw the pictures.

    Args:
        work: the training step; the operators have sizes of their own.
        out: the record; by default build/bench/<cpu or the GPU's name>-<date>.json.
        pictures: the folder for the pictures; by default that of `out`.
    """
    out = out or Path("build", "bench", record_name(work.device))
    found: Row = {"kind": "all", **record.machine(work.device), "clocks": [record.clocks(work.device)]}
    print(about(found))
    gpu = work.device.type == "cuda"
    with caches():
        seconds = sum(part.seconds for part in PARTS.values()) if gpu else ALL_SECONDS
        run_parts("fusedgpt.bench.suite", PARTS if gpu else CPU_PARTS, options_of(work), found, out, seconds)
    found["clocks"].append(record.clocks(work.device))
    record.write(out, found)
    print(f"\n{out}")
    record.draw(found, pictures or out.parent)
    return found


@contextmanager
def caches() -> Iterator[None]:
    """Empty ones of compiled kernels for all parts: what one of them compiles the next need not.

    Triton's is named too: else Inductor names one with the first kernel that it makes, and ours were compiled again.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        with patch.dict(os.environ, {name: str(Path(folder, name)) for name in names}):
            yield


def record_name(device: torch.device) -> str:
    """`cpu-2026-11-21.json`, or with the GPU's name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{datetime.date.today()}.json"


def options_of(work: Workload) -> Options:
    """What a part's process makes the same work of."""
    dropout = work.config.attn_dropout
    return {"size": work.size, "device_name": str(work.device), "batch": work.batch, "dropout": dropout}


def _part(name: str, **settings: Any) -> Callable[[Options], Iterator[Row]]:
    def run(options: Options) -> Iterator[Row]:
        seconds = options.pop("seconds")
        chosen = settings | ({"seconds": 0.75 * seconds} if name in ("step", "breakdown") else {})
        yield from printed(name, workload(**options), **chosen)

    return run


def _ops(options: Options) -> Iterator[Row]:
    device = workload(**{key: options[key] for key in ("size", "device_name")}).device
    most = ops.ceilings(device)
    yield {"ceilings": most._asdict()}
    for row in ops.printed(ops.measure(device, most, seconds=0.7 * options["seconds"]), most):
        yield asdict(row)


# The most that each may take on a GPU, and on a CPU. `startup` comes first: it fills the cache of compiled kernels.
PARTS = {
    "startup": Part(_part("startup", runs=1), 110),
    "step": Part(_part("step"), 125),
    "ops": Part(_ops, 85),
    "breakdown": Part(_part("breakdown"), 25),
    "memory": Part(_part("memory"), 40),
    "decode": Part(_part("decode", rounds=2), 50),
}
CPU_PARTS = {
    name: part._replace(seconds=seconds)
    for (name, part), seconds in zip(PARTS.items(), (60, 75, 45, 15, 15, 15), strict=True)
}


def main(name: str, file: str, options: str) -> None:
    part_main(PARTS, name, file, options)


if __name__ == "__main__":
    main(*sys.argv[1:])
