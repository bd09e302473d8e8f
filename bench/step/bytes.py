"""The bytes that our training step moves on a GPU, by part: counted on a CPU, from the operators and kernels that it launches.

The step is the training loop's own, at full size, on CPU tensors: the model's code and its operators run, their kernels and
matmuls are recorded and not computed (`bench/traffic.py`). Every tensor counts once for each operator that reads or writes
it, so a part's bytes are what it moves at least; what a cache saves between two operators is not taken off.

A row has a step of one micro-step, and what each further micro-step adds. The last rows are the whole step and its
peak memory: the bytes of tensors alive at once.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from ...gpt.model import GPT
from ...gpt.optim import build_optimizers
from ...gpt.train.step import TrainStep
from .. import table
from ..traffic import Operation, Traffic, without_a_gpu
from .implementations import OURS, train_config
from .memory import allocations
from .sizes import Workload

GPU = ("sm_90", 132)  # an H100's or H200's tiles and multiprocessors
COMPUTED = (
    1 << 24
)  # bytes: ids and scalars are computed, as a CPU checks them; activations and matrices are not
# the operator of ours that an operation runs in -> the part's name; the first that fits
PARTS = {
    "embed": "embedding",
    "layer_norm": "LayerNorm + residual",
    "attention": "attention",
    "linear_cross_entropy": "head + cross-entropy",
    "linear": "linear projections",
    "gelu_mlp": "MLP",
}
# outside of our operators
REST = {"linalg_vector_norm": "gradient norm", "adamw": "AdamW", "_foreach": "AdamW", "zero_": "zeroing"}
CASTS, SUMS, OTHER = "weight casts", "gradient accumulation", "other"
WHOLE, PEAK = "whole step", "peak memory"


@dataclass
class Row:
    """One part of a step, in 10⁹ bytes."""

    name: str
    case: str
    side: str
    gigabytes: float  # in a step of one micro-step
    share: float | None = None  # of the step
    read: float | None = None
    written: float | None = None
    matmuls: float | None = None  # of these bytes, those of the library's matmuls
    further: float | None = None  # in each micro-step after the first
    teraflops: float | None = None  # 10¹² FLOPs of the library's matmuls


def measure(work: Workload) -> Iterator[Row]:
    """The parts of a step, the largest first, then the whole step and its peak memory."""
    traffic = Traffic(COMPUTED)
    batch = next(work.batches())
    with without_a_gpu(traffic, *GPU), allocations(work.device) as memory, traffic:
        with torch.device("meta"):
            model = GPT(work.config)
        model.to_empty(device=work.device)  # weights of any value: nothing is written to them
        settings = train_config(work)
        step = TrainStep(model, build_optimizers(model, settings), repeat(batch), settings)
        step()  # the optimizer's state is allocated
        traffic.operations.clear()
        step()
        first = traffic.operations.copy()
        step.micro_step(*batch)
        traffic.operations.clear()
        step.micro_step(*batch)
    second = traffic.operations
    parts, further = _by_part(first), _by_part(second)
    whole = sum(o.bytes for o in first)
    for name, operations in sorted(parts.items(), key=lambda item: -sum(o.bytes for o in item[1])):
        yield _row(name, work, operations, further.get(name, []), whole)
    yield _row(WHOLE, work, first, second, whole)
    yield Row(PEAK, work.case, OURS, memory.peak / 1e9)


def _row(name: str, work: Workload, operations: list[Operation], further: list[Operation], whole: int) -> Row:
    moved = sum(o.bytes for o in operations)
    return Row(
        name,
        work.case,
        OURS,
        gigabytes=moved / 1e9,
        share=moved / whole,
        read=sum(o.read for o in operations) / 1e9,
        written=sum(o.written for o in operations) / 1e9,
        matmuls=sum(o.bytes for o in operations if o.flops) / 1e9,
        further=sum(o.bytes for o in further) / 1e9,
        teraflops=sum(o.flops for o in operations) / 1e12,
    )


def _by_part(operations: list[Operation]) -> dict[str, list[Operation]]:
    parts = defaultdict(list)
    for operation in operations:
        parts[_part(operation)].append(operation)
    return parts


def _part(operation: Operation) -> str:
    """The part of the step that an operation belongs to."""
    if "_to_copy" in operation.name:
        return CASTS
    if not operation.inside and operation.name in ("aten.add.Tensor", "aten.add_.Tensor") and operation.node:
        return SUMS  # by autograd: in .grad, and of the gradients of a tensor that is used twice
    caller = operation.inside or operation.node
    names, text = (PARTS, caller) if caller else (REST, operation.name)
    return next((part for word, part in names.items() if word in text), OTHER)


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of a record's rows."""
    shown = COLUMNS[1:]
    cells = [
        [form.format(row[key]) if row[key] is not None else "–" for _, _, key, form in shown] for row in rows
    ]
    yield from table.markdown([f"{rows[0]['case']}: part", *(head for head, *_ in shown[1:])], cells)


COLUMNS = (
    ("step", "<26", "case", "{}"),
    ("part", "<22", "name", "{}"),
    ("GB", ">9", "gigabytes", "{:.3f}"),
    ("share", ">7", "share", "{:.1%}"),
    ("read", ">9", "read", "{:.3f}"),
    ("written", ">9", "written", "{:.3f}"),
    ("matmuls", ">9", "matmuls", "{:.3f}"),
    ("each further", ">13", "further", "{:.3f}"),
    ("TFLOP", ">7", "teraflops", "{:.2f}"),
)
