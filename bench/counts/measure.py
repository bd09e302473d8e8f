"""Our operators at GPT-2's shapes in the emulator: the work of every launch, and what is left to the library.

The tensors have their full size; of each grid a few programs run, whole, that stand for all the others. Matmuls of the library are recorded and
not computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from ...kernels import examples, matmul
from ...kernels.examples import PADDED_VOCABULARY, Example, as_tuple, draw
from ...kernels.ops.attention.operator import heads_in_turn
from ..emulator.counting import Program, Sampler
from ..emulator.package import emulated
from ..ops.cases import OURS
from ..ops.harness import BACKWARD, BOTH, FORWARD
from ..traffic import Operation, Traffic
from .work import Work, work_of

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}  # of an A100 and an H100
SAMPLES = 4  # programs of a grid whose programs all do the same
UNCOMPUTED = 2**24  # bytes: the library's operators that move more
P = 0.1  # of dropout


@dataclass
class Case:
    """One operator at one size."""

    example: Example
    sizes: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.example.operator}, dropout {P}" if "p" in self.sizes else self.example.operator


@dataclass
class Measured:
    """What one implementation does in one direction of an operator."""

    name: str  # of the case
    sizes: dict[str, float]
    direction: str
    side: str
    works: list[Work]  # of its launches
    library: list[Operation] = field(default_factory=list)  # operators that it leaves to the library


def cases(batch: int = 64, length: int = 1024, columns: int = 768) -> Iterator[Case]:
    """The operators of a training step, by the time that they take in it."""
    rows, heads = batch * length, columns // 64
    attention = {"B": batch, "T": length, "H": heads, "D": 64}
    yield Case(examples.causal_attention(batch, length, heads, 64), {**attention})
    yield Case(examples.causal_attention(batch, length, heads, 64, P), {**attention, "p": P})
    yield Case(examples.gelu_mlp(rows, columns), {"M": rows, "C": columns})
    head = examples.linear_cross_entropy(rows, columns, PADDED_VOCABULARY)
    yield Case(head, {"N": rows, "C": columns, "V": PADDED_VOCABULARY})
    yield Case(examples.layer_norm(rows, columns), {"M": rows, "C": columns})
    yield Case(examples.add_layer_norm(rows, columns, x_bias=False), {"M": rows, "C": columns})
    yield Case(examples.add_layer_norm(rows, columns, P), {"M": rows, "C": columns, "p": P})
    linear = examples.linear(rows, columns, 3 * columns)
    yield Case(linear, {"M": rows, "in": columns, "out": 3 * columns})
    embed = examples.embed(batch, length, columns, PADDED_VOCABULARY, out_dtype=torch.bfloat16)
    yield Case(embed, {"B": batch, "T": length, "C": columns, "V": PADDED_VOCABULARY})
    yield Case(examples.dropout(rows, columns, P), {"M": rows, "C": columns, "p": P})


def measure(case: Case, architecture: str) -> list[Measured]:
    """Count ours, forward and backward; both at once where the forward makes the gradients.

    Values are not the operator's, since the backward reads what a few programs of the forward wrote: what is right shows in `make emulate`.

    Raises:
        EmulatorError: a kernel does what a GPU would stop at.
    """
    example = case.example
    tensors = inputs(example)
    count, sms = sampler(case), MULTIPROCESSORS[architecture]
    with (
        mock.patch.object(matmul, "_stores_float32", return_value=True),  # as cuBLAS does
        emulated(architecture, multiprocessors=sms, timing="late", count=count) as emulation,
        Traffic(UNCOMPUTED) as traffic,
    ):
        outputs = [y for y in as_tuple(example.call(**tensors)) if y.requires_grad]
        launched, called = len(emulation.counts), len(traffic.operations)
        leaves = [t for t in tensors.values() if t.requires_grad]
        incoming = [torch.zeros_like(y) for y in outputs]
        del traffic.operations[called:]  # no work of the operator's
        torch.autograd.grad(outputs, leaves, incoming)
    works = [work_of(counts, architecture) for counts in emulation.counts]
    directions = {
        FORWARD: (works[:launched], traffic.operations[:called]),
        BACKWARD: (works[launched:], traffic.operations[called:]),
    }
    if example.operator == "linear_cross_entropy":
        directions = {BOTH: (works, traffic.operations)}
    return [
        Measured(case.name, case.sizes, direction, OURS, some, operations)
        for direction, (some, operations) in directions.items()
    ]


def inputs(example: Example) -> examples.Tensors:
    """All inputs by name: zeros, whose pages take no memory until a program reads them, and random integers."""
    dtypes = {
        **dict.fromkeys(example.activations, torch.bfloat16),
        **dict.fromkeys(example.parameters, torch.float32),
    }
    shapes = {**example.activations, **example.parameters}
    tensors = {name: torch.zeros(shapes[name], dtype=dtypes[name], requires_grad=True) for name in shapes}
    integers = replace(example, activations={}, parameters={})
    return tensors | draw(integers, "cpu", torch.bfloat16)


def sampler(case: Case) -> Sampler:
    """The programs that stand for a grid."""

    def choose(kernel: str, grid: Program) -> list[Program] | None:
        if kernel in ("forward_kernel", "query_kernel", "key_kernel") and "H" in case.sizes:
            return _one_head(grid, {name: int(size) for name, size in case.sizes.items()})
        if "cross_entropy" in kernel:
            return [(0, 0, 0)]
        return evenly(grid)

    return choose


def _one_head(grid: Program, sizes: dict[str, Any]) -> list[Program]:
    """Every tile of one head: tiles differ in how much of the triangle they see."""
    heads = sizes["B"] * sizes["H"]
    group = heads_in_turn(sizes["T"], sizes["D"], 2, heads)
    return [(tile * group, 0, 0) for tile in range(grid[0] // heads)]


def evenly(grid: Program, samples: int = SAMPLES) -> list[Program] | None:
    """Programs from the first to the last, evenly spaced; None where the grid has no more."""
    x, y, z = grid
    number = x * y * z
    if number <= samples:
        return None
    chosen = (i * (number - 1) // (samples - 1) for i in range(samples))
    return [(i % x, i // x % y, i // (x * y)) for i in chosen]
