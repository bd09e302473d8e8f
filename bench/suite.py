"""`python -m fusedgpt.bench step | memory | startup | decode | all`, on a CPU as on a GPU.

A measurement is a module with `measure`, which yields rows, and the `COLUMNS` of its table. A row prints as a line of the
table and is kept in the record (`record.py`).
"""

import datetime
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from . import table
from .ops import run as ops
from .parts import Options, Part, Row, part_main, run_parts
from .record import recording
from .step import breakdown, bytes, decode, memory, startup, step
from .step.sizes import Workload, workload

ALL_SECONDS = 165.0  # on a CPU: all of it within three minutes
MEASUREMENTS: dict[str, ModuleType] = {
    "step": step,
    "breakdown": breakdown,
    "bytes": bytes,
    "memory": memory,
    "startup": startup,
    "decode": decode,
}


def run_measurement(
    name: str, work: Workload, out: Path | None = None, pictures: Path | None = None, **options: Any
) -> None:
    """Measure, print a table, and write the record and its pictures where asked for.

    Args:
        name: one of MEASUREMENTS.
        out, pictures: as `recording` takes them.
        options: of the measurement.
    """
    with recording(name, work.device, out, pictures) as found:
        found["rows"] = [{"benchmark": name, **row} for row in printed(name, work, **options)]


def printed(name: str, work: Workload, **options: Any) -> Iterator[Row]:
    """The rows of a measurement, each printed when it comes."""
    module = MEASUREMENTS[name]
    print(table.heading(module.COLUMNS), flush=True)
    for row in map(asdict, module.measure(work, **options)):
        print(table.line(module.COLUMNS, row), flush=True)
        yield row


def lines(name: str, rows: list[Row]) -> list[str]:
    """The table of a measurement's rows from a record."""
    columns = MEASUREMENTS[name].COLUMNS
    return [table.heading(columns), *(table.line(columns, row) for row in rows)]


# ---- everything, part by part


def run_all(work: Workload, out: Path | None = None, pictures: Path | None = None) -> None:
    """Run every measurement, write one record after each of them, and draw the pictures.

    Args:
        work: the training step; the operators have sizes of their own.
        out: the record; by default build/bench/<cpu or the GPU's name>-<date>.json.
        pictures: the folder for the pictures; by default that of `out`.
    """
    out = out or Path("build", "bench", record_name(work.device))
    gpu = work.device.type == "cuda"
    seconds = sum(part.seconds for part in PARTS.values()) if gpu else ALL_SECONDS
    parts = PARTS if gpu else CPU_PARTS
    with recording("all", work.device, out, pictures) as found, caches():
        run_parts("fusedgpt.bench.suite", parts, options_of(work), found, out, seconds)


@contextmanager
def caches() -> Iterator[None]:
    """Empty caches of compiled kernels that all parts share, so that each kernel is compiled once.

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
    """The arguments of `workload` from which a part's process makes the same work."""
    dropout = work.config.attn_dropout
    return {"size": work.size, "device_name": str(work.device), "batch": work.batch, "dropout": dropout}


def _measure(name: str, options: Options, share: float | None = None, **settings: Any) -> Iterator[Row]:
    """share: of its seconds that the measurement may spend."""
    seconds = options.pop("seconds")
    if share:
        settings["seconds"] = share * seconds
    return printed(name, workload(**options), **settings)


def _measure_ops(options: Options) -> Iterator[Row]:
    device = workload(options["size"], options["device_name"]).device
    most = ops.ceilings(device)
    yield {"ceilings": most._asdict()}
    yield from map(asdict, ops.printed(ops.measure(device, most, seconds=0.7 * options["seconds"]), most))


def _part(seconds: int, name: str, **settings: Any) -> Part:
    run: Callable[[Options], Iterator[Row]] = partial(_measure, name, **settings)
    return Part(run, seconds)


# With the most seconds that each may take on a GPU. `startup` comes first: it fills the cache of compiled kernels.
PARTS = {
    "startup": _part(110, "startup", runs=1),
    "step": _part(125, "step", share=0.75),
    "ops": Part(_measure_ops, 85),
    "breakdown": _part(25, "breakdown", share=0.75),
    "memory": _part(40, "memory"),
    "decode": _part(50, "decode", rounds=2),
}
CPU_PARTS = {
    name: part._replace(seconds=seconds)
    for (name, part), seconds in zip(PARTS.items(), (60, 75, 45, 15, 15, 15), strict=True)
}

if __name__ == "__main__":
    part_main(PARTS, *sys.argv[1:])
