"""Peak memory of the training step (forward, backward, clipping, update) of every implementation, and the budget of ours.

Counted are the bytes of tensors that PyTorch's allocator holds at once, temporaries inside its operators included: on a
GPU by the allocator's statistics, on a CPU by the allocations and frees that the profiler records, so the figures mean the
same on both. They are not the size of the process, which on a CPU is mostly libraries and depends on when the C
library gives memory back.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...gpt.train.memory import estimate
from ..table import Column
from ..timing import failure
from .implementations import OURS, Implementation, build_model, builders, train_config
from .sizes import Workload

STEPS = 4  # until all persistent memory is allocated: optimizer state, a captured graph


@dataclass
class Row:
    """The peak of one implementation, and the budget of ours, all in 10⁹ bytes.

    The budget exceeds the peak: gradients are allocated while activations are freed.
    """

    name: str
    case: str
    side: str
    gigabytes: float | None = None  # None where it failed: `note` says why
    ratio: float | None = None  # its peak over ours
    weights: float | None = None
    gradients: float | None = None
    optimizer: float | None = None
    activations: float | None = None  # measured: what the forward pass saves for the backward
    paper: float | None = None  # the peak that gpt/train/memory.py estimates from the shape alone
    note: str = ""


@dataclass
class Allocated:
    """Bytes of tensors above those at the beginning."""

    peak: int = 0
    held: int = 0  # at the end


@contextmanager
def allocations(device: torch.device) -> Iterator[Allocated]:
    """Count the allocations inside the `with` block; the result is filled in at its end."""
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
    results: Any = watched.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        found.held += event.nbytes()
        found.peak = max(found.peak, found.held)


@contextmanager
def _muted() -> Iterator[None]:
    """Discard what native code writes to stderr: some versions of the profiler log their start and stop there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def first_steps(
    build: Callable[[], Implementation], work: Workload
) -> tuple[Implementation, list[float], int]:
    """Build an implementation and run its first steps; returns it, the first loss and gradient norm, and its peak in bytes."""
    batches = work.batches()
    with allocations(work.device) as found:
        built = build()
        results = [built.step(*next(batches)) for _ in range(STEPS)]
        first = [float(value) for value in results[0]]
        del results
    return built, first, found.peak


def release(device: torch.device) -> None:
    """Free the caches after an implementation is gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(work: Workload, batches: Sequence[int] = (), nanogpt_folder: Path | None = None) -> Iterator[Row]:
    """The peaks of all implementations at each number of sequences; by default half of the size's batch and all of it.

    Compiled ones are left out: each shape would take a compilation. `step` shows theirs at its own shape.
    """
    for batch in batches or sorted({max(work.batch // 2, 1), work.batch}):
        sized = replace(work, batch=batch)
        ours: float | None = None
        for name, build in builders(sized, nanogpt_folder):
            if "torch.compile" in name:
                continue
            row = Row("memory", sized.case, name)
            try:
                built, _, peak = first_steps(build, sized)
                row.gigabytes = peak / 1e9
                if name == OURS:
                    ours = row.gigabytes
                    _budget(row, built, sized)
                row.ratio = row.gigabytes / ours if ours else None
                del built
            except Exception as error:  # others may fail in any way; the rest is still measured
                row.note = failure(error)
            release(work.device)
            yield row


def _budget(row: Row, ours: Implementation, work: Workload) -> None:
    """The float32 weights, their gradients, AdamW's two moments and, measured, the activations."""
    weights = sum(p.numel() * p.element_size() for p in ours.model.parameters()) / 1e9
    inputs, targets = next(work.batches())
    model = build_model(work)
    seed = torch.tensor([1], device=work.device)
    with allocations(work.device) as found:
        loss = model(inputs, targets, seed, dtype=work.dtype, recompute=work.recompute)
    del loss
    row.weights, row.gradients, row.optimizer = weights, weights, 2 * weights
    row.activations = found.held / 1e9
    row.paper = estimate(work.config, train_config(work), work.device).total / 1e9


COLUMNS: tuple[Column, ...] = (
    ("step", "<44", "case", "{}"),
    ("implementation", "<36", "side", "{}"),
    ("GB", ">8", "gigabytes", "{:.3f}"),
    ("to ours", ">8", "ratio", "{:.2f}"),
    *((name, ">11", name, "{:.3f}") for name in ("weights", "gradients", "optimizer", "activations")),
    ("estimate", ">11", "paper", "{:.3f}"),
)
