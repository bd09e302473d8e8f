"""`python -m fusedgpt.bench counts`: every operator and its peers counted in the emulator, as a table, a record and a picture.

Each implementation of each operator is a job; all cores' processes do them. The counts are the same on every machine.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ...kernels.selfcheck import ptxas_version
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


class Job(NamedTuple):
    """An implementation of one operator for one architecture."""

    number: int  # of the case
    package: str  # ours, or a key of the peers' table
    architecture: str
    clones: Path | None

    @property
    def case(self) -> Case:
        return list(cases())[self.number]

    def __call__(self) -> tuple["Job", list[Measured], str, bool]:
        """What was measured, or why not and whether that is for want of a package."""
        try:
            if self.package == OURS:
                return self, measure(self.case, self.architecture), "", False
            return self, measure_peer(self.package, self.case, self.architecture, self.clones), "", False
        except (ImportError, FileNotFoundError) as error:  # the package, or its clone
            return self, [], str(error), True
        except Exception as error:  # whatever a compiler or a launch throws; the others are still counted
            return self, [], failure(error), False


def run_counts(
    names: Sequence[str] = (),
    architectures: Sequence[str] = (),
    gpus: Sequence[str] = tuple(GPUS),
    out: Path | None = None,
    pictures: Path | None = None,
    clones: Path | None = None,
    accept: bool = False,
) -> None:
    """Count and print the tables.

    Args:
        names: of operators, by default all.
        architectures: to compile for, by default those of the GPUs.
        gpus: whose bounds to show; each shows what was counted for its architecture.
        out: write the record there as JSON.
        pictures: the folder for counts.png; by default that of `out`, without which there is none.
        clones: a folder with clones of repositories, for peers that no package installs.
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
        compilers = {f"ptxas {name}": ptxas_version(name) or "unknown" for name in architectures}
        found["versions"] |= {"device": f"PTX emulator, {', '.join(architectures)}", **compilers}
        found["rows"] = list(printed(jobs(names, architectures, clones), gpus))
        print("\n".join(["", *report.error_lines(found), "", *goals.lines(list(goals.goals(found["rows"])))]))


def jobs(names: Sequence[str], architectures: Sequence[str], clones: Path | None) -> list[Job]:
    """What is to do: of each case and architecture ours, then the peers that have such an operator."""
    return [
        Job(number, package, architecture, clones)
        for number, case in enumerate(cases())
        if not names or case.example.operator in names
        for architecture in architectures
        for package in (OURS, *(package for package, loads in TABLE.items() if case.name in loads))
    ]


def printed(todo: Sequence[Job], gpus: Sequence[str]) -> Iterator[Row]:
    """The rows; those of a case and architecture are printed when all of them have come."""
    rows: dict[Job, list[Row]] = {}
    missing: set[str] = set()
    with processes(workers()) as pool:
        for job, measured, why, not_installed in progress(pool, todo, "counted"):
            case, architecture = job.case, job.architecture
            shown = [GPUS[name] for name in gpus if GPUS[name].architecture == architecture]
            rows[job] = [report.row_of(one, architecture, shown) for one in measured]
            if not_installed and job.package not in missing:
                missing.add(job.package)
                print(f"{job.package} is left out: {why}")
            elif why and not not_installed:
                rows[job].append(report.failed(case.name, case.sizes, job.package, architecture, why))
            same = [o for o in todo if (o.number, o.architecture) == (job.number, architecture)]
            if all(other in rows for other in same):
                every = [row for other in same for row in rows[other]]
                print("\n".join(report.table_of(every, [gpu.name for gpu in shown])), flush=True)
    for job in todo:
        yield from rows[job]
