"""`make soak`: kill loop, fault loop and fuzzing for half an hour, a table of what was tried and survived, and a record.

    python -m fusedgpt.bench soak [--minutes 30] [--only kills|faults|fuzz] [--seed N] [--out FILE.json]
    python -m fusedgpt.bench soak --only fuzz --inputs 5000 | --replay TARGET:NUMBER

Faults come first, each once; then the mutated inputs; kills fill the rest of the time. What fails is printed at once and its folder kept.
"""

import datetime
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from .. import record
from ..table import Column, heading, line
from . import commands
from .kills import Kill, kill
from .place import Failed, Place, Skipped, make_references
from .scenarios import SCENARIOS

INPUTS = 200_000  # mutated, in 30 minutes
COLUMNS: tuple[Column, ...] = (
    ("what", "<16", "name", "{}"),
    ("where", "<24", "case", "{}"),
    ("tried", ">8", "tried", "{:,}"),
    ("survived", ">9", "survived", "{:,}"),
    ("skipped", ">8", "skipped", "{:,}"),
)


class Outcome(NamedTuple):
    """A fault that was tried: how often, what was wrong, why it could not be tried."""

    number: int
    tried: int
    problem: str
    skipped: str


@dataclass
class Tally:
    """Counts by what was tried, in order, and every problem."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    survived: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, what: tuple[str, str], times: int, problem: str, skipped: str = "") -> None:
        self.tried[what] += times
        self.survived[what] += 0 if problem else times
        self.skipped[what] += bool(skipped)
        if problem or skipped:
            print(
                f"{'FAILED' if problem else 'skipped'}  {': '.join(what)}: {problem or skipped}", flush=True
            )
        if problem:
            self.problems.append(f"{': '.join(what)}: {problem}")

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"benchmark": "soak", "name": what[0], "case": what[1], "tried": self.tried[what]}
            | {"survived": self.survived[what], "skipped": self.skipped[what]}
            for what in self.tried
        ]


class Progress:
    """One line that changes on a terminal; without one, a line now and then."""

    def __init__(self) -> None:
        self.console, self.last = Console(stderr=True), time.monotonic()

    def __call__(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(text, end="\r", overflow="ellipsis", no_wrap=True)
        elif time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            self.console.print(text)


def run_soak(
    minutes: float,
    only: str | None,
    seed: int,
    out: Path | None,
    inputs: int | None = None,
    replay: str | None = None,
) -> int:
    """Run the parts and write the record; returns the exit code: 1 where anything failed.

    Args:
        minutes: to spend in all; the faults take what they take.
        only: one part: kills, faults or fuzz.
        seed: of the moments of kills and of the mutations.
        out: the record; by default bench/results/soak-DATE.json for a soak of all parts, else none.
        inputs: how many to mutate; by default 200,000 in 30 minutes.
        replay: instead, one mutated input, as the line of a failure names it.
    """
    if replay:
        from . import fuzz

        print(found := fuzz.replay(replay))
        return 1 if found.startswith("failed") else 0
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * minutes
    tally, progress = Tally(), Progress()
    folder = Path(tempfile.mkdtemp(prefix="fusedgpt-soak-"))
    folder.chmod(0o755)  # some faults run as another user
    started = time.monotonic()
    with lanes() as pool:
        reference = pool.submit(make_references, folder / "reference").result()
        if only in (None, "faults"):
            _faults(pool, folder, reference, tally, progress)
    if only in (None, "fuzz"):
        _fuzz(inputs or round(INPUTS * minutes / 30), seed, tally, progress)
    if only in (None, "kills"):
        with lanes() as pool:
            _kills(pool, folder, reference, seed, until, tally, progress)
    rows = tally.rows()
    print("\n" + heading(COLUMNS))
    for row in rows:
        print(line(COLUMNS, row))
    print(
        f"\n{sum(tally.tried.values()):,} tried, {len(tally.problems)} failures, {time.monotonic() - started:,.0f} s"
    )
    if out or not only:
        file = out or record.ROOT / "bench" / "results" / f"soak-{datetime.date.today()}.json"
        entries: dict[str, Any] = {"kind": "soak", **record.machine(torch.device("cpu")), "rows": rows}
        entries |= {
            "minutes": round((time.monotonic() - started) / 60, 1),
            "seed": seed,
            "failures": tally.problems,
        }
        record.write(file, entries)
        print(file)
    if tally.problems:
        print(f"what failed is in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if tally.problems else 0


def lanes() -> ProcessPoolExecutor:
    """A process for each core, each with a fork server of its own."""
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn"))


# ---- faults


def try_scenario(number: int, place: Place) -> Outcome:
    """Cause one fault of the table; nothing that it raises is lost."""
    tried, problem, skipped = 1, "", ""
    try:
        tried = SCENARIOS[number].check(place) or 1
    except Skipped as reason:
        tried, skipped = 0, str(reason)
    except Failed as failure:
        problem = f"{failure} ({place.folder})"
    except Exception:  # a mistake in the scenario is a failure like any other
        problem = f"{traceback.format_exc().strip()} ({place.folder})"
    if not problem:
        shutil.rmtree(place.folder, ignore_errors=True)
    return Outcome(number, tried, problem, skipped)


def _faults(
    pool: ProcessPoolExecutor, folder: Path, reference: Path, tally: Tally, progress: Progress
) -> None:
    jobs = [
        pool.submit(try_scenario, number, Place(folder / f"fault-{number}", reference))
        for number, scenario in enumerate(SCENARIOS)
    ]
    for done, job in enumerate(jobs, 1):
        outcome = job.result()
        scenario = SCENARIOS[outcome.number]
        reason = outcome.problem and f"{scenario.fault}: {outcome.problem}"
        tally.add(
            ("fault", scenario.group),
            outcome.tried,
            reason,
            outcome.skipped and f"{scenario.fault}: {outcome.skipped}",
        )
        progress(f"faults {done} of {len(jobs)}, {len(tally.problems)} failures")


# ---- kills


def kill_turn(seed: int, folder: Path, reference: Path) -> list[Kill]:
    """Kill each job once or twice."""
    return [
        kill(job, Place(folder / f"kill-{seed + number}", reference), seed + number)
        for number, job in enumerate(commands.JOBS)
    ]


def _kills(
    pool: ProcessPoolExecutor,
    folder: Path,
    reference: Path,
    seed: int,
    until: float,
    tally: Tally,
    progress: Progress,
) -> None:
    count = 0
    for turn in _until(pool, until, lambda n: (kill_turn, 10**6 * seed + 100 * n, folder, reference)):
        for one in turn:
            count += len(one.moments)
            where = f"{', then '.join(one.moments)}: {one.problem}"
            tally.add(("kill -9", one.job), len(one.moments), one.problem and where)
        progress(f"kills {count}, {len(tally.problems)} failures, {until - time.monotonic():,.0f} s left")


def _until(pool: ProcessPoolExecutor, until: float, job: Any) -> Iterator[Any]:
    """Results of jobs 0, 1, ..., as many at once as there are cores, begun until the time is over; at least one each."""
    number, running = 0, set[Future[Any]]()
    while running or not number:
        while len(running) < len(os.sched_getaffinity(0)) and (not number or time.monotonic() < until):
            running.add(pool.submit(*job(number)))
            number += 1
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (one.result() for one in done)


# ---- fuzz


def _fuzz(inputs: int, seed: int, tally: Tally, progress: Progress) -> None:
    from . import fuzz

    report = fuzz.run(
        inputs, seed, len(os.sched_getaffinity(0)), lambda done: progress(f"inputs {done:,} of {inputs:,}")
    )
    for target, counts in sorted(report.counts.items()):
        tally.add(("input", target), sum(counts.values()) - counts["failed"], "")
    for failure in report.failures.values():
        target = failure.first.partition(":")[0]
        tally.add(
            ("input", target),
            failure.inputs,
            f"{failure.inputs} times, first --replay {failure.first}: {failure.what}",
        )
