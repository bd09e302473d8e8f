"""One work set up: the same tensors for the comparison with float64, the times and the memory of all implementations."""

import math
from functools import cached_property
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from ...kernels import use_backend
from ...kernels.examples import IGNORED, as_tuple, draw
from ..timing import Call
from .cases import Implementation, Work
from .dropout_check import relative_error

# The relative error (norm of the difference over norm) up to which an implementation is timed, in units in the last place of
# its dtype. Wider than the rule for our kernels (`examples.compare`): others may sum thousands of terms in another order or
# round in other places, but may not compute something else.
TOLERANCE = {torch.bfloat16: 8, torch.float16: 16, torch.float32: 64}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"


class Inputs(NamedTuple):
    activations: list[Tensor]
    masters: list[Tensor]  # float32 parameters
    parameters: list[Tensor]  # the same in the activations' dtype
    integers: list[Tensor]  # without the seed
    incoming: list[Tensor]  # gradients of the outputs

    def leaves(self, implementation: Implementation) -> list[Tensor]:
        return [*self.activations, *(self.masters if implementation.masters else self.parameters)]


class Setup:
    """The tensors of a work, several sets where a cache could hold one, and the calls that implementations make on them."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device) -> None:
        self.work, self.dtype, self.device = work, dtype, device
        # a graph that is run backward again and again must keep what a single run could give away
        torch._functorch.config.donated_buffer = False
        if device.type == "cuda":
            # Dynamo counts how often it compiled a function, whatever it closes over, and soon gives up on it
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        shapes = [*work.example.activations.values(), *work.example.parameters.values()]
        size = sum(map(math.prod, shapes)) * dtype.itemsize
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**25
        count = min(8, math.ceil(4 * cache / size))
        self.sets = [self._inputs(seed) for seed in range(count)]

    def _inputs(self, seed: int) -> Inputs:
        example = self.work.example
        drawn = draw(example, self.device, self.dtype, torch.float32, self.dtype, seed)
        masters = [drawn[name] for name in example.parameters]
        generator = torch.Generator(self.device).manual_seed(seed)
        return Inputs(
            [drawn[name] for name in example.activations],
            masters,
            [t.detach().to(self.dtype).requires_grad_() for t in masters],
            [drawn[name] for name in example.integers if name != "seed"],
            [
                torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
                if shape
                else torch.ones((), device=self.device)
                for shape in self.work.outputs
            ],
        )

    # ---- what is timed

    def call(self, direction: str, implementation: Implementation) -> Call:
        """The work of one direction, on one of the sets.

        The forward runs without gradients where some implementations compute those in it; the backward starts from outputs
        that exist already.
        """
        sets = self.sets
        graphs = [outputs_of(implementation, inputs) for inputs in sets] if direction == BACKWARD else []

        def forward(i: int) -> object:
            with torch.set_grad_enabled(not self.work.at_once):
                return outputs_of(implementation, sets[i % len(sets)])

        def backward(i: int) -> object:
            number = i % len(sets)
            return gradients(implementation, sets[number], graphs[number], retain_graph=True)

        def both(i: int) -> object:
            inputs = sets[i % len(sets)]
            return gradients(implementation, inputs, outputs_of(implementation, inputs))

        return {FORWARD: forward, BACKWARD: backward, BOTH: both}[direction]

    def matmuls(self, direction: str) -> Call:
        """Compute only the products with weights that the work needs, by the library."""

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
        """Peak bytes during a call above those before it; None on a CPU, which does not count them.

        The call is made twice: what is allocated once, a workspace for example, exists by then, and a graph that allows only
        one backward fails here, not during the timings of all.
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

    # ---- correctness

    def error(self, implementation: Implementation) -> float:
        """The largest relative error of outputs and gradients against our reference in float64."""
        inputs = self._checked
        if implementation.draws:
            assert self.work.dropout_check is not None
            return self.work.dropout_check.error(implementation.call, inputs.leaves(implementation))
        outputs = outputs_of(implementation, inputs)
        found = [*outputs, *(gradients(implementation, inputs, outputs) if implementation.backward else ())]
        kept, by_row = self.work.checked, len(self.work.outputs) + len(self.work.example.activations)
        rows = [t[kept] if t.dim() and n < by_row else t for n, t in enumerate(found)]
        return relative_error(rows, self._exact[: len(rows)])

    def right(self, error: float) -> bool:
        return error <= TOLERANCE[self.dtype] * torch.finfo(self.dtype).eps

    @cached_property
    def _checked(self) -> Inputs:
        """The first set, in which rows that are not compared have no influence on a loss or on parameters' gradients."""
        inputs, kept = self.sets[0], self.work.checked
        if kept == slice(None):
            return inputs
        incoming = [_only(gradient, kept, 0) if gradient.dim() else gradient for gradient in inputs.incoming]
        integers = inputs.integers
        if self.work.at_once:
            integers = [_only(targets, kept, IGNORED) for targets in integers]
        return inputs._replace(incoming=incoming, integers=integers)

    @cached_property
    def _exact(self) -> list[Tensor]:
        """Outputs and gradients in float64 for the rows that are compared."""
        inputs, kept = self.sets[0], self.work.checked
        parts = [*(t[kept] for t in inputs.activations), *inputs.masters]
        doubles = [t.detach().double().requires_grad_() for t in parts]
        incoming = [t[kept].double() if t.dim() else t.double() for t in inputs.incoming]
        with use_backend("torch"):
            truth = as_tuple(self.work.implementations[0].call(*doubles, *(t[kept] for t in inputs.integers)))
            return [*(y.detach() for y in truth), *torch.autograd.grad(truth, doubles, incoming)]


def _only(x: Tensor, rows: slice, other: int) -> Tensor:
    """x in those rows, another value in all others."""
    some = torch.full_like(x, other)
    some[rows] = x[rows]
    return some


def outputs_of(implementation: Implementation, inputs: Inputs) -> tuple[Tensor, ...]:
    return as_tuple(implementation.call(*inputs.leaves(implementation), *inputs.integers))


def gradients(
    implementation: Implementation, inputs: Inputs, outputs: tuple[Tensor, ...], retain_graph: bool = False
) -> tuple[Tensor, ...]:
    incoming = [gradient.to(y.dtype) for y, gradient in zip(outputs, inputs.incoming, strict=True)]
    return torch.autograd.grad(outputs, inputs.leaves(implementation), incoming, retain_graph=retain_graph)
