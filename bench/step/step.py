"""The whole training step (forward, backward, clipping, AdamW) beside other GPT-2 implementations, in one run.

Every implementation is built from the same weights and runs its first steps alone, on the same batches; its peak memory is
measured there. An implementation whose first loss or gradient norm differs from ours is reported but not timed. Then they
take turns on the same batches, so a drift of the machine's speed favours none. Reported are the median of each and the
median of the ratios of neighbouring turns. On a GPU a turn is several steps without synchronisation, as in training.
"""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...gpt.device import keep_freed_memory
from ...gpt.train.throughput import Speedometer
from ..timing import failure
from .implementations import Implementation, builders
from .memory import first_steps, release
from .sizes import Workload

# Relative. nanoGPT's exact GELU differs by less, and so does bfloat16; with dropout every implementation draws its own masks.
LOSS_TOLERANCE, NORM_TOLERANCE, DROPOUT_TOLERANCE = 2e-3, 2e-2, 2e-2
BURST = 4  # steps of a turn on a GPU: the host runs ahead, as it does in training


@dataclass
class Row:
    """One implementation."""

    name: str
    case: str
    side: str
    milliseconds: float | None = None  # None where it was not timed: `note` says why
    tokens_per_second: float | None = None
    ratio: float | None = None  # its time over ours
    mfu: float | None = None  # on a GPU whose peak is known
    gigabytes: float | None = None  # peak of all its tensors, weights and optimizer included
    loss: float | None = None  # of the first step
    note: str = ""


def measure(
    work: Workload, rounds: int = 40, seconds: float = 120, nanogpt_folder: Path | None = None
) -> Iterator[Row]:
    """Time a training step of every implementation.

    Args:
        rounds: turns of each.
        seconds: to spend, about: no compilation begins after 60 % of it or continues after all of it, and at least
            three turns are timed.
        nanogpt_folder: a clone of nanoGPT, to compare with it too.

    Raises:
        FileNotFoundError: the folder is no clone of nanoGPT.
    """
    if work.device.type == "cpu":
        keep_freed_memory()  # as `gpt train` does; it helps every implementation
    began = time.monotonic()
    rows: list[Row] = []
    timed: list[Timed] = []
    # those that compile come last: they are what a lack of time leaves out
    for name, build in sorted(builders(work, nanogpt_folder), key=lambda item: "torch.compile" in item[0]):
        row = Row("step", work.case, name)
        rows.append(row)
        if "torch.compile" in name and time.monotonic() - began > 0.6 * seconds:
            row.note = f"left out: most of {seconds:g} s were over"
        else:
            left, first = began + seconds - time.monotonic(), timed[0] if timed else None
            with _time_limit(left, row) if "torch.compile" in name else nullcontext():
                if begun := _begin(row, build, work, first):
                    timed.append(begun)
            release(work.device)
    _take_turns(timed, work, rounds, began + seconds)
    ours = timed[0] if timed and timed[0].row is rows[0] else None
    for row, _, _, times in timed:
        row.milliseconds = 1e3 * statistics.median(times)
        row.tokens_per_second = 1e3 * work.tokens / row.milliseconds
        if ours:
            row.ratio = statistics.median(a / b for a, b in zip(times, ours.times, strict=True))
            model: Any = ours.implementation.model
            meter = Speedometer(work.config, model.num_params(position_embeddings=False), work.device)
            row.mfu = meter.flops_per_token * row.tokens_per_second / meter.peak if meter.peak else None
    yield from rows


class Timed(NamedTuple):
    """An implementation that agrees with ours."""

    row: Row
    implementation: Implementation
    norm: float  # of the first step's gradients
    times: list[float]  # seconds a step


class _Late(BaseException):
    """Not an Exception: compilers catch those, print a report and continue."""


@contextmanager
def _time_limit(seconds: float, row: Row) -> Iterator[None]:
    """End the block after so many seconds, with a note in the row. Main thread only."""

    def late(number: int, frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)  # repeated, in case something swallows it
    try:
        yield
    except _Late:
        row.note = f"left out: not compiled within {seconds:.0f} s"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _begin(
    row: Row, build: Callable[[], Implementation], work: Workload, first: Timed | None
) -> Timed | None:
    """Build an implementation and run its first steps; None, with the reason in its row, where it is not to be timed."""
    try:
        implementation, (loss, norm), peak = first_steps(build, work)
    except Exception as error:  # others may fail in any way; the rest is still timed
        row.note = failure(error)
    else:
        row.loss, row.gigabytes = loss, peak / 1e9
        if first and first.row.loss is not None:
            row.note = _difference((loss, norm), (first.row.loss, first.norm), work)
        if not row.note:
            return Timed(row, implementation, norm, [])
    return None


def _take_turns(timed: list[Timed], work: Workload, rounds: int, until: float) -> None:
    """Append the seconds a step takes to each one's times, round by round; the first round is discarded."""
    gpu = work.device.type == "cuda"
    burst = BURST if gpu else 1
    batches = work.batches(seed=2)
    for i in range(rounds + 1):
        turn = [next(batches) for _ in range(burst)]
        for one in timed:
            if gpu:
                torch.cuda.synchronize(work.device)
            start = time.perf_counter()
            for inputs, targets in turn:
                one.implementation.step(inputs, targets)
            if gpu:
                torch.cuda.synchronize(work.device)
            if i:
                one.times.append((time.perf_counter() - start) / burst)
        if i >= 3 and time.monotonic() > until:
            return


def _difference(found: tuple[float, float], ours: tuple[float, float], work: Workload) -> str:
    """How the first loss or gradient norm differs from ours; empty where they agree."""
    dropout = work.config.attn_dropout > 0
    names = ("a first loss", "a first gradient norm")
    tolerances = (DROPOUT_TOLERANCE, 0.5) if dropout else (LOSS_TOLERANCE, NORM_TOLERANCE)
    for name, value, expected, tolerance in zip(names, found, ours, tolerances, strict=True):
        if not abs(value - expected) <= tolerance * expected:  # NaN differs too
            return f"{name} of {value:.5g} where ours is {expected:.5g}: not comparable, not timed"
    return ""


COLUMNS = (
    ("step", "<44", "case", "{}"),
    ("implementation", "<36", "side", "{}"),
    ("ms", ">9", "milliseconds", "{:.1f}"),
    ("tokens/s", ">10", "tokens_per_second", "{:,.0f}"),
    ("to ours", ">7", "ratio", "{:.2f}"),
    ("MFU", ">6", "mfu", "{:.1%}"),
    ("GB", ">8", "gigabytes", "{:.3f}"),
    ("first loss", ">10", "loss", "{:.4f}"),
)
