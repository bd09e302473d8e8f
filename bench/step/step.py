"""The whole training step (forward, backward, clipping, AdamW) beside other GPT-2 implementations, in one run.

Every side is built from the same weights and does its first steps on the same batches, alone, which is when its peak
memory is taken; one whose first loss or gradient norm is not ours is not timed. Then the sides take turns on
the same batches, so a machine whose speed drifts favours none; what is reported is the median of each side and the
median of the ratios of neighbouring turns. On a GPU a turn is several steps with no wait between them, as in training.
"""

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ...gpt.device import keep_freed_memory
from ...gpt.model import GPT
from ...gpt.train.throughput import Speedometer
from .implementations import Side, builders
from .memory import failure, first_steps, release
from .sizes import Workload

# Relative. nanoGPT's exact GELU differs by less, and so does bfloat16; with dropout every side draws its own masks.
LOSS_TOLERANCE, NORM_TOLERANCE, DROPOUT_TOLERANCE = 2e-3, 2e-2, 2e-2
BURST = 4  # steps of a turn on a GPU: the host runs ahead, as it does in training


@dataclass
class Row:
    """One side of a comparison."""

    name: str
    case: str
    side: str
    milliseconds: float | None = None  # None where it was not timed: `note` says why
    tokens_per_second: float | None = None
    ratio: float | None = None  # its time over ours
    mfu: float | None = None  # on a GPU whose peak is known
    gigabytes: float | None = None  # the most that its tensors take: weights, optimizer and all
    loss: float | None = None  # of the first step
    note: str = ""


def measure(
    work: Workload, rounds: int = 40, seconds: float = 120, nanogpt_folder: Path | None = None
) -> Iterator[Row]:
    """Time a training step of every side.

    Args:
        rounds: turns of each side.
        seconds: to spend, about: no compiled side is begun after 60 % of it, none may still be compiling at its end, and then
            three turns are the last.
        nanogpt_folder: a clone of nanoGPT, to compare with it too.

    Raises:
        FileNotFoundError: the folder is no clone of nanoGPT.
    """
    if work.device.type == "cpu":
        keep_freed_memory()  # as `gpt train` does; every side has the good of it
    began = time.monotonic()
    rows: list[Row] = []
    timed: list[Timed] = []
    # what compiles comes last, so that it is what a lack of time leaves out
    for name, build in sorted(builders(work, nanogpt_folder), key=lambda side: "torch.compile" in side[0]):
        row = Row("step", work.case, name)
        rows.append(row)
        if "torch.compile" in name and time.monotonic() - began > 0.6 * seconds:
            row.note = f"left out: most of {seconds:g} s were over"
        else:
            left, first = began + seconds - time.monotonic(), timed[0] if timed else None
            with _given(left, row) if "torch.compile" in name else nullcontext():
                if side := _begin(row, build, work, first):
                    timed.append(side)
            release(work.device)
    _take_turns([(found.side, found.times) for found in timed], work, rounds, began + seconds)
    ours = timed[0] if timed and timed[0].row is rows[0] else None
    for found in timed:
        _fill(found, ours, work)
    yield from rows


@dataclass
class Timed:
    """A side that computes the right thing."""

    row: Row
    side: Side
    norm: float  # of the first step's gradients
    times: list[float]  # seconds a step


class _Late(BaseException):
    """Not an Exception: compilers catch those, print all they know and go on."""


@contextmanager
def _given(seconds: float, row: Row) -> Iterator[None]:
    """End the block after so many seconds, with a note in the row. In the main thread alone."""

    def late(number: int, frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)  # and again, where something holds it up
    try:
        yield
    except _Late:
        row.note = f"left out: not compiled within {seconds:.0f} s"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _begin(row: Row, build: Callable[[], Side], work: Workload, first: Timed | None) -> Timed | None:
    """Build a side and let it do its first steps; None, with the reason in its row, where it is not to be timed."""
    try:
        side, (loss, norm), peak = first_steps(build, work)
    except Exception as error:  # a peer may fail in any way; the others are timed all the same
        row.note = failure(error)
    else:
        row.loss, row.gigabytes = loss, peak / 1e9
        if first and first.row.loss is not None:
            row.note = _difference((loss, norm), (first.row.loss, first.norm), work)
        if not row.note:
            return Timed(row, side, norm, [])
    return None


def _fill(found: Timed, ours: Timed | None, work: Workload) -> None:
    """The figures of a row from its times."""
    row = found.row
    row.milliseconds = 1e3 * statistics.median(found.times)
    row.tokens_per_second = 1e3 * work.tokens / row.milliseconds
    if ours:
        row.ratio = statistics.median(a / b for a, b in zip(found.times, ours.times, strict=True))
        assert isinstance(ours.side.model, GPT)
        meter = Speedometer(work.config, ours.side.model.num_params(position_embeddings=False), work.device)
        row.mfu = meter.flops_per_token * row.tokens_per_second / meter.peak if meter.peak else None


def _take_turns(sides: list[tuple[Side, list[float]]], work: Workload, rounds: int, until: float) -> None:
    """Append seconds a step of each side in each round to its list; the first round is thrown away."""
    gpu = work.device.type == "cuda"
    burst = BURST if gpu else 1
    batches = work.batches(seed=2)
    for i in range(rounds + 1):
        turn = [next(batches) for _ in range(burst)]
        for side, times in sides:
            if gpu:
                torch.cuda.synchronize(work.device)
            start = time.perf_counter()
            for inputs, targets in turn:
                side.step(inputs, targets)
            if gpu:
                torch.cuda.synchronize(work.device)
            if i:
                times.append((time.perf_counter() - start) / burst)
        if i >= 3 and time.monotonic() > until:
            return


def _difference(found: tuple[float, float], ours: tuple[float, float], work: Workload) -> str:
    """How a side's first loss or gradient norm differs from ours, or nothing where they agree."""
    dropout = work.config.attn_dropout > 0
    names = ("a first loss", "a first gradient norm")
    tolerances = (DROPOUT_TOLERANCE, 0.5) if dropout else (LOSS_TOLERANCE, NORM_TOLERANCE)
    for name, value, expected, tolerance in zip(names, found, ours, tolerances, strict=True):
        if not abs(value - expected) <= tolerance * expected:  # NaN differs too
            return f"{name} of {value:.5g} where ours is {expected:.5g}: not comparable, not timed"
    return ""


HEADS = ("step", "side", "ms", "tokens/s", "to ours", "MFU", "GB", "first loss")
LINE = "{:<36}{:<38}{:>9}{:>11}{:>9}{:>7}{:>9}{:>12}  {}"


def line(row: Row) -> str:
    """A row of the table."""
    figures = (
        (row.milliseconds, ".1f"),
        (row.tokens_per_second, ",.0f"),
        (row.ratio, ".2f"),
        (row.mfu, ".1%"),
        (row.gigabytes, ".3f"),
        (row.loss, ".4f"),
    )
    texts = ["" if value is None else format(value, form) for value, form in figures]
    return LINE.format(row.case, row.side, *texts, row.note).rstrip()
