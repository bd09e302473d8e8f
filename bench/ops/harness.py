"""One operator's work set up once: the same tensors for the comparison with float64, the times and the memory of all sides."""

import math
from functools import cached_property
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from ...kernels import use_backend
from ..timing import Call
from .cases import Side, Work
from .inputs import relative_error, tensors

# The relative error (norm of the difference over norm) up to which a side is taken to compute the same, in units in the
# last place of its dtype: room for sums of thousands of terms in it, none for one that computes something else.
TOLERANCE = {torch.bfloat16: 8, torch.float16: 16, torch.float32: 64}
FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "forward + backward")
IGNORED = -100  # the target that does not count


class Inputs(NamedTuple):
    activations: list[Tensor]
    masters: list[Tensor]  # float32 parameters
    parameters: list[Tensor]  # the same in the activations' dtype
    indices: list[Tensor]
    incoming: list[Tensor]  # gradients, one an output

    def leaves(self, side: Side) -> list[Tensor]:
        return [*self.activations, *(self.masters if side.masters else self.parameters)]


class Setup:
    """The tensors of a work, several sets where a cache could keep one, and what its sides do with them."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device) -> None:
        self.work, self.dtype, self.device = work, dtype, device
        # a graph that is run backward again and again must keep what a single run could give away
        torch._functorch.config.donated_buffer = False
        if device.type == "cuda":
            # Dynamo counts how often it compiled a function, whatever it closes over, and soon gives up on it
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        shapes = (*work.activations, *work.parameters)
        size = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**25
        count = min(8, math.ceil(4 * cache / size))
        self.sets = [self._inputs(seed) for seed in range(count)]

    def _inputs(self, seed: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)

        def drawn(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        def weight(shape: tuple[int, ...]) -> Tensor:
            return (drawn(shape) / math.sqrt(shape[-1] if len(shape) > 1 else 1)).to(self.dtype)

        work = self.work
        parameters = [weight(shape).requires_grad_() for shape in work.parameters]
        return Inputs(
            [drawn(shape).to(self.dtype).requires_grad_() for shape in work.activations],
            [t.detach().float().requires_grad_() for t in parameters],
            parameters,
            [
                torch.randint(high, shape, generator=generator, device=self.device)
                for shape, high in work.indices
            ],
            [
                drawn(shape).to(self.dtype) if shape else torch.ones((), device=self.device)
                for shape in work.outputs
            ],
        )

    # ---- what is timed

    def forward(self, side: Side) -> Call:
        """Makes the outputs; without gradients where some sides would make those too."""

        def call(i: int) -> object:
            inputs = self.sets[i % len(self.sets)]
            with torch.set_grad_enabled(not self.work.at_once):
                return side.call(*inputs.leaves(side), *inputs.indices)

        return call

    def backward(self, side: Side) -> Call:
        """Makes the gradients of outputs that are there already."""
        graphs = [(outputs_of(side, inputs), inputs.leaves(side), inputs.incoming) for inputs in self.sets]

        def call(i: int) -> object:
            return gradients(*graphs[i % len(graphs)], retain_graph=True)

        return call

    def both(self, side: Side) -> Call:
        """Outputs, then gradients."""

        def call(i: int) -> object:
            inputs = self.sets[i % len(self.sets)]
            return gradients(outputs_of(side, inputs), inputs.leaves(side), inputs.incoming)

        return call

    def call(self, direction: str, side: Side) -> Call:
        return {FORWARD: self.forward, BACKWARD: self.backward, BOTH: self.both}[direction](side)

    def matmuls(self, direction: str) -> Call:
        """Nothing but the products with weights that the work needs, by the library."""

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device).to(self.dtype)

        layers = [(drawn(m, i), drawn(o, i), drawn(m, o)) for m, i, o in self.work.layers]

        def call(_: int) -> None:
            for x, w, dy in layers:
                if direction != BACKWARD:
                    torch.mm(x, w.mT)
                if direction != FORWARD:
                    torch.mm(dy, w)
                    torch.mm(dy.mT, x)

        return call

    def peak(self, call: Call) -> int | None:
        """Bytes in use at most during a call, above those before it; None on a CPU, which does not count them.

        The call is made twice: what is made once, a workspace for example, is there by then, and a graph that is good for
        one backward only fails here, not among the others' timings.
        """
        call(0)
        if self.device.type != "cuda":
            call(0)
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call(0)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    # ---- is it right?

    def error(self, side: Side) -> float:
        """The largest relative error of the side's outputs and gradients against our reference in float64."""
        inputs = self._checked
        if side.draws:
            assert self.work.drawn is not None
            return self.work.drawn.error(side.call, inputs.leaves(side))
        found = list(outputs_of(side, inputs))
        if side.backward:
            found += gradients(tuple(found), inputs.leaves(side), inputs.incoming)
        kept, some = self.work.checked, len(self.work.outputs) + len(self.work.activations)
        rows = [t[kept] if t.dim() and n < some else t for n, t in enumerate(found)]
        return relative_error(rows, self._exact[: len(rows)])

    def right(self, error: float) -> bool:
        return error <= TOLERANCE[self.dtype] * torch.finfo(self.dtype).eps

    @cached_property
    def _checked(self) -> Inputs:
        """The first set, in which rows that are not compared count for nothing: not in a loss, nor in parameters' gradients."""
        inputs, kept = self.sets[0], self.work.checked
        if kept == slice(None):
            return inputs
        incoming = [_only(gradient, kept, 0) if gradient.dim() else gradient for gradient in inputs.incoming]
        indices = inputs.indices
        if self.work.at_once:
            indices = [_only(targets, kept, IGNORED) for targets in indices]
        return inputs._replace(incoming=incoming, indices=indices)

    @cached_property
    def _exact(self) -> list[Tensor]:
        """Outputs and gradients in float64 for the rows that are compared."""
        inputs, kept = self.sets[0], self.work.checked
        parts = [
            *(t.detach()[kept].double() for t in inputs.activations),
            *(t.detach().double() for t in inputs.masters),
        ]
        doubles = [t.requires_grad_() for t in parts]
        incoming = [t[kept].double() if t.dim() else t.double() for t in inputs.incoming]
        with use_backend("torch"):
            truth = tensors(self.work.sides[0].call(*doubles, *(t[kept] for t in inputs.indices)))
            return [*(y.detach() for y in truth), *torch.autograd.grad(truth, doubles, incoming)]


def _only(x: Tensor, rows: slice, other: int) -> Tensor:
    """x in those rows, and another value in all else."""
    some = torch.full_like(x, other)
    some[rows] = x[rows]
    return some


def outputs_of(side: Side, inputs: Inputs) -> tuple[Tensor, ...]:
    return tensors(side.call(*inputs.leaves(side), *inputs.indices))


def gradients(
    outputs: tuple[Tensor, ...], leaves: list[Tensor], incoming: list[Tensor], retain_graph: bool = False
) -> tuple[Tensor, ...]:
    fitting = [gradient.to(y.dtype) for y, gradient in zip(outputs, incoming, strict=True)]
    return torch.autograd.grad(outputs, leaves, fitting, retain_graph=retain_graph)
