"""`make emulate`: every check of `suite.py`, for every architecture, in every mode, in as many processes as there are cores.

    python -m fusedgpt.bench emulate [--architecture sm_90 ...] [--mode late ...] [--operator WORD] [--mutations N]

First with the Triton that is installed, then with the one that torch 2.11 brings, from a folder under build/. Exits
with 1 where a check is wrong.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..table import Column, heading, line
from . import suite
from .suite import AMPERE, HOPPER, Check, Outcome

SMALL_MEMORY = ("sm_86", "sm_89", "sm_120")  # 99 KiB of shared memory; their tiles are those of sm_80
SEEDS = 3  # of mode "random"
OLD_TRITON = "3.6.0"
FOLDER = Path("build", f"triton-{OLD_TRITON}")
COLUMNS: tuple[Column, ...] = (
    ("operator", "<22", "operator", "{}"),
    ("architecture", "<13", "architecture", "{}"),
    ("Triton", "<7", "triton", "{}"),
    ("mode", "<7", "mode", "{}"),
    ("checks", ">7", "checks", "{}"),
    ("right", ">7", "right", "{}"),
    ("findings", ">9", "findings", "{}"),
    ("seconds", ">8", "seconds", "{:.0f}"),
)


class Job(NamedTuple):
    """A check in one dtype for one architecture, in turn in several modes: the process that compiles its kernels does all."""

    check: str
    architecture: str
    dtype: torch.dtype
    modes: tuple[tuple[str, int], ...]  # and the seed of each

    def __call__(self) -> list[Outcome]:
        return [suite.run(self.check, self.architecture, self.dtype, *mode) for mode in self.modes]


@contextmanager
def processes(count: int, folder: Path | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes that can compile Triton kernels, whatever TRITON_INTERPRET says in this one, on one thread each.

    They start here and now; each keeps what it has compiled until the end.

    Args:
        folder: holds another Triton, which they import in place of the installed one.
    """
    first = [str(folder.resolve())] if folder else []
    with (
        mock.patch.dict(os.environ, OMP_NUM_THREADS="1"),
        mock.patch.object(sys, "path", [*first, *sys.path]),
    ):
        os.environ.pop("TRITON_INTERPRET", None)
        pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
        list(pool.map(abs, range(count)))  # each finds no idle process, so that all start in this environment
    with pool:
        yield pool


def workers() -> int:
    return len(os.sched_getaffinity(0))


def run_emulate(architectures: Sequence[str], modes: Sequence[str], word: str, mutations: int) -> int:
    """Do it, print the tables, and return the exit code."""
    began = time.perf_counter()
    if mutations:
        from .mutations import run_mutations

        return run_mutations(architectures, word, mutations)
    installed = version("triton")
    outcomes = {installed: _outcomes(jobs(architectures, modes, word), f"Triton {installed}")}
    skipped = ""
    if not installed.startswith(OLD_TRITON.rpartition(".")[0]):
        if skipped := install():
            print(skipped, flush=True)
        else:
            todo = jobs([a for a in architectures if a not in SMALL_MEMORY], modes, word, seeds=1)
            outcomes[OLD_TRITON] = _outcomes(todo, f"Triton {OLD_TRITON}", FOLDER)
    failed = [str(outcome) for some in outcomes.values() for outcome in some if not outcome.ok]
    print("\n".join([heading(COLUMNS), *(line(COLUMNS, row) for row in rows(outcomes))]))
    print(skipped or "", *failed, sep="\n")
    every = sum(map(len, outcomes.values()))
    print(f"{every - len(failed)} of {every} checks are right, in {time.perf_counter() - began:.0f} s")
    return 1 if failed or not every else 0


def jobs(architectures: Iterable[str], modes: Sequence[str], word: str = "", seeds: int = SEEDS) -> list[Job]:
    """What is to do, the longest first.

    A random order takes ten times as long as the others: it is for the first dtype of a check, with so many seeds where
    the tests do the check too, and with one elsewhere; with one seed only there.
    """
    found = []
    for architecture, check in itertools.product(architectures, suite.checks().values()):
        if word not in check.name or not _applies(check, architecture):
            continue
        small = architecture in SMALL_MEMORY
        for dtype in check.dtypes[: 1 if small else None]:
            count = dict.fromkeys(modes, 1)
            if "random" in count:
                first = dtype == check.dtypes[0] and not small
                count["random"] = first * (seeds if check.tested else int(seeds > 1))
            if small:
                count = {mode: 1 for mode in count if mode == "early"}
            turns = tuple((mode, seed) for mode in count for seed in range(count[mode]))
            found += [Job(check.name, architecture, dtype, turns)] if turns else []
    weight = {"GPT": 3, "attention": 2, "gelu_mlp": 2}
    return sorted(found, key=lambda job: -weight.get(suite.checks()[job.check].operator, 1))


def _applies(check: Check, architecture: str) -> bool:
    return (architecture if architecture == HOPPER else AMPERE) in check.architectures


def _outcomes(todo: list[Job], title: str, folder: Path | None = None) -> list[Outcome]:
    """Do the jobs in all cores' processes."""
    with processes(workers(), folder) as pool:
        return [outcome for some in progress(pool, todo, title) for outcome in some]


def progress(pool: ProcessPoolExecutor, todo: Sequence[Any], title: str) -> Iterator[Any]:
    """The results as they come, and how far it is: every tenth of a second on a terminal, every half minute elsewhere."""
    began = shown = time.perf_counter()
    for done, future in enumerate(as_completed([pool.submit(job) for job in todo]), 1):
        yield future.result()
        now, terminal = time.perf_counter(), sys.stdout.isatty()
        if done == len(todo) or now - shown > (0.1 if terminal else 30):
            left = (now - began) / done * (len(todo) - done)
            end = "\r" if terminal and done < len(todo) else "\n"
            print(
                f"{title}: {done} of {len(todo)}, {now - began:.0f} s, about {left:.0f} s left  ",
                end=end,
                flush=True,
            )
            shown = now


def install() -> str:
    """Put the other Triton into its folder. Returns why it could not, or ""."""
    if (FOLDER / "triton").is_dir():
        return ""
    arguments = ["--quiet", "--no-deps", "--target", str(FOLDER), f"triton=={OLD_TRITON}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *arguments], capture_output=True, text=True
    )
    if not done.returncode:
        return ""
    reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return f"Triton {OLD_TRITON} is not checked, as it could not be installed: {reason}"


def rows(outcomes: dict[str, list[Outcome]]) -> Iterator[dict[str, Any]]:
    """The rows of the table: operator by architecture, Triton and mode."""
    for triton, some in outcomes.items():
        key = lambda o: (o.operator, o.architecture, list(suite.MODES).index(o.mode))  # noqa: E731
        for (operator, architecture, _), same in itertools.groupby(sorted(some, key=key), key):
            group = list(same)
            yield {
                "operator": operator,
                "architecture": architecture,
                "triton": triton,
                "mode": group[0].mode,
                "checks": len(group),
                "right": sum(outcome.ok for outcome in group),
                "findings": sum(len(outcome.findings) for outcome in group),
                "seconds": sum(outcome.seconds for outcome in group),
            }
