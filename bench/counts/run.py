"""`python -m fusedgpt.bench counts`: every operator and its peers counted in the emulator, as a table, a record and a picture.

Each implementation of each operator is a job; all cores' processes do them. The counts are the same on every machine.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .. import record
from ..emulator.run import processes, progress, workers
from ..ops.cases import OURS
from ..timing import failure
from . import goals, regression, report
from .measure import Case, Measured, cases, measure
from .peers.measure import measure_peer
from .peers.table import TABLE
from .rates import GPUS
from .report import Row

OPERATORS = tuple(dict.fromkeys(case.example.operator for case in cases()))
# by implementation: what counts it
COUNTERS: dict[str, Callable[[Case, str], list[Measured]]] = {
    OURS: measure,
    **{package: partial(measure_peer, package) for package in TABLE},
}


class Job(NamedTuple):
    """An implementation of one operator for one architecture."""

    case: int  # which of `cases`
    architecture: str
    side: str

    def __call__(self) -> tuple["Job", list[Measured], str]:
        """What was measured, or why not."""
        try:
            return self, COUNTERS[self.side](list(cases())[self.case], self.architecture), ""
        except Exception as error:  # whatever a compiler or a launch throws; the others are still counted
            return self, [], failure(error)


def run_counts(
    names: Sequence[str] = (),
    architectures: Sequence[str] = (),
    gpus: Sequence[str] = tuple(GPUS),
    out: Path | None = None,
    pictures: Path | None = None,
    accept: bool = False,
) -> None:
    """Count and print the tables.

    Args:
        names: of operators, by default all.
        architectures: to compile for, by default those of the GPUs.
        gpus: whose bounds to show; each shows what was counted for its architecture.
        out: write the record there as JSON.
        pictures: the folder for counts.png; by default that of `out`, without which there is none.
        accept: instead, write the counts that a test holds the kernels of these operators to.

    Raises:
        ValueError: there is no such operator.
    """
    if unknown := set(names) - set(OPERATORS):
        raise ValueError(
            f"no operator is called {', '.join(sorted(unknown))}; there are {', '.join(OPERATORS)}"
        )
    architectures = architectures or tuple(dict.fromkeys(GPUS[name].architecture for name in gpus))
    if accept:
        return regression.accept(names, architectures)
    with record.recording("counts", torch.device("cpu"), out, pictures) as found:
        found["versions"]["device"] = f"PTX emulator, {', '.join(architectures)}"
        found["rows"] = list(printed(names, architectures, gpus))
        print("\n".join(["", *report.error_lines(found), "", *goals.lines(list(goals.goals(found["rows"])))]))


def printed(names: Sequence[str], architectures: Sequence[str], gpus: Sequence[str]) -> Iterator[Row]:
    """The rows; those of an operator and architecture are printed when all of them have come."""
    todo = {
        (i, architecture): [Job(i, architecture, side) for side in COUNTERS]
        for i, case in enumerate(cases())
        if not names or case.example.operator in names
        for architecture in architectures
    }
    rows: dict[Job, list[Row]] = {}
    with processes(workers()) as pool:
        jobs = [job for some in todo.values() for job in some]
        for job, measured, why in progress(pool, jobs, "counted"):
            shown = [GPUS[name] for name in gpus if GPUS[name].architecture == job.architecture]
            rows[job] = [report.row_of(one, job.architecture, shown) for one in measured]
            if why:
                case = list(cases())[job.case]
                rows[job].append(report.failed(case.name, case.sizes, job.side, job.architecture, why))
            if all(other in rows for other in todo[job.case, job.architecture]):
                every = [row for other in todo[job.case, job.architecture] for row in rows[other]]
                print("\n".join(report.table_of(every, [gpu.name for gpu in shown])), flush=True)
    for job in jobs:
        yield from rows[job]
