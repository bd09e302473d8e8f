"""The peak memory of training: forward, backward, clipping and update of every side, and where ours goes.

What is counted are the bytes of tensors that PyTorch's allocator holds at once, temporaries inside its operators
included: on a GPU by the allocator's own statistics, on a CPU by the allocations and frees that the profiler
records. So the same thing is counted on both. It is not the size of the process, which on a CPU is mostly libraries
and depends on when the C library gives memory back.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ...gpt.train.memory import estimate
from .implementations import OURS, Side, build_model, builders, train_config
from .sizes import Workload

STEPS = 4  # until all that a step keeps is there: optimizer state, a captured graph


@dataclass
class Row:
    """The peak of one side, and for ours the budget beside it, all in 10⁹ bytes.

    The budget is more than the peak: gradients come while activations go.
    """

    name: str
    case: str
    side: str
    gigabytes: float | None = None  # None where it did not fit: `note` says so
    ratio: float | None = None  # its peak over ours
    weights: float | None = None
    gradients: float | None = None
    optimizer: float | None = None
    activations: float | None = None  # counted: what the forward pass keeps for the backward
    paper: float | None = None  # the peak as gpt/train/memory.py reckons it from the shape alone
    note: str = ""


@dataclass
class Allocated:
    """Bytes that tensors take beyond what they took at the beginning."""

    peak: int = 0
    held: int = 0  # at the end


@contextmanager
def allocations(device: torch.device) -> Iterator[Allocated]:
    """Count what is allocated inside the `with` block; the result is filled in at its end."""
    found = Allocated()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found.peak = torch.cuda.max_memory_allocated(device) - before
        found.held = torch.cuda.memory_allocated(device) - before
        return
    watched = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _muted():
        watched.start()
    try:
        yield found
    finally:
        with _muted():
            watched.stop()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        found.held += event.nbytes()
        found.peak = max(found.peak, found.held)


@contextmanager
def _muted() -> Iterator[None]:
    """Without what native code writes to stderr: some versions of the profiler log there that they start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def first_steps(build: Callable[[], Side], work: Workload) -> tuple[Side, list[float], int]:
    """Build a side and let it do its first steps; returns it, the first loss and gradient norm, and its peak in bytes."""
    batches = work.batches()
    with allocations(work.device) as found:
        side = build()
        results = [side.step(*next(batches)) for _ in range(STEPS)]
        first = [float(value) for value in results[0]]
        del results
    return side, first, found.peak


def release(device: torch.device) -> None:
    """Give back what a side that is gone has left in caches."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failure(error: BaseException) -> str:
    """Why a side has no figures, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def measure(work: Workload, batches: Sequence[int] = (), nanogpt_folder: Path | None = None) -> Iterator[Row]:
    """The peaks of all sides at each number of sequences; by default at half the size's own batch and at all of it.

    Compiled sides are left out: each shape would take a compilation. `step` shows theirs at its own shape.
    """
    for batch in batches or sorted({max(work.batch // 2, 1), work.batch}):
        sized = replace(work, batch=batch)
        ours: float | None = None
        for name, build in builders(sized, nanogpt_folder):
            if "torch.compile" in name:
                continue
            row = Row("memory", sized.case, name)
            try:
                side, _, peak = first_steps(build, sized)
                row.gigabytes = peak / 1e9
                if name == OURS:
                    ours = row.gigabytes
                    _budget(row, side, sized)
                row.ratio = row.gigabytes / ours if ours else None
                del side
            except Exception as error:  # a peer may fail in any way; the others are measured all the same
                row.note = failure(error)
            release(work.device)
            yield row


def _budget(row: Row, side: Side, work: Workload) -> None:
    """What a step needs: the float32 weights, their gradients, AdamW's two means, and counted, the activations."""
    weights = sum(p.numel() * p.element_size() for p in side.model.parameters()) / 1e9
    inputs, targets = next(work.batches())
    model = build_model(work)
    seed = torch.tensor([1], device=work.device)
    with allocations(work.device) as found:
        loss = model(inputs, targets, seed, dtype=work.dtype, recompute=work.recompute)
    del loss
    row.weights, row.gradients, row.optimizer = weights, weights, 2 * weights
    row.activations = found.held / 1e9
    row.paper = estimate(work.config, train_config(work), work.device).total / 1e9


HEADS = ("step", "side", "GB", "to ours")
LINE = "{:<36}{:<38}{:>9}{:>9}  {}"


def line(row: Row) -> str:
    """A row of the table."""
    if row.gigabytes is None:
        return LINE.format(row.case, row.side, "", "", row.note)
    parts = ("weights", "gradients", "optimizer", "activations", "paper")
    where = ", ".join(f"{part} {getattr(row, part):.3f}" for part in parts) if row.weights else ""
    ratio = f"{row.ratio:.2f}" if row.ratio else ""
    return LINE.format(row.case, row.side, f"{row.gigabytes:.3f}", ratio, where).rstrip()
