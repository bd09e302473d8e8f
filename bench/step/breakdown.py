"""Where the time of our training step goes: its parts, forward and backward.

The functions of `kernels` that the model calls are wrapped from outside during the measurement. A wrapped call records a
time stamp where it begins and where it ends, and inserts a node into autograd's graph after its outputs and one before
its inputs, so that the backward pass records the same two stamps. Autograd runs the nodes in the reverse order of
the forward pass, so the parts do not interleave. The time between two stamps belongs to the part that the first one begins; so
all shares add up to the whole step, and `other` is what no part claims. Stamps are events on a GPU's stream, and the host's
clock on a CPU.

A CUDA graph replays kernels without running Python, so here the step runs uncaptured; the host queues it behind a pause, so
the GPU never waits for a launch. It idles between the kernels no longer than in a captured step, except where the host
falls behind.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import Function, Variable
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...gpt import model as gpt_model
from ...gpt.device import keep_freed_memory
from ...kernels.examples import as_tuple
from .implementations import fusedgpt
from .sizes import Workload

# what gpt/model.py calls -> the part's name
PARTS = {
    "embed": "embedding",
    "layer_norm": "LayerNorm + residual",
    "add_layer_norm": "LayerNorm + residual",
    "causal_attention": "attention",
    "linear": "linear projections",
    "gelu_mlp": "MLP",
    "linear_cross_entropy": "head + cross-entropy",
}
CLIP, UPDATE, OTHER = "gradient norm + clip", "update", "other"
FORWARD, BACKWARD, ONCE = "forward", "backward", ""
HEAD_START = 200_000_000  # clock cycles, about 100 ms, in which the host queues the step and its stamps


@dataclass
class Row:
    """One part of the step in one direction."""

    name: str  # the part
    case: str
    side: str
    direction: str  # forward, backward, or empty where there is no such distinction
    milliseconds: float
    share: float  # of the step


class Stamp(NamedTuple):
    part: str  # what begins here
    direction: str
    at: Any  # seconds, or an event


class Timeline:
    """The stamps of one step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[Stamp] = []
        self.direction = FORWARD

    def start(self) -> None:
        self.stamps, self.direction = [], FORWARD
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(HEAD_START)
        self.stamp(OTHER)

    def begin_backward(self) -> None:
        """Called in the backward pass: the parts from now on belong to it, and the gradient norm follows it."""
        if self.direction == FORWARD:
            Variable._execution_engine.queue_callback(lambda: self.stamp(CLIP, ONCE))
        self.direction = BACKWARD

    def stamp(self, part: str, direction: str | None = None) -> None:
        if self.device.type == "cuda":
            at: Any = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        self.stamps.append(Stamp(part, self.direction if direction is None else direction, at))

    def stop(self) -> dict[tuple[str, str], float]:
        """Milliseconds since `start` by (part, direction)."""
        self.stamp(OTHER)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[tuple[str, str], float] = defaultdict(float)
        for (part, direction, at), (_, _, end) in pairwise(self.stamps):
            passed = at.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - at)
            found[part, ONCE if part == OTHER else direction] += passed
        return found


class _Border(Function):
    """The identity; calls back when the gradients of all these tensors have been computed."""

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.reached()
        return (None, *gradients)


def _watched(function: Callable, part: str, timeline: Timeline) -> Callable:
    def begin_backward() -> None:
        timeline.begin_backward()
        timeline.stamp(part)

    def call(*args: Any, **kwargs: Any) -> Any:
        # activations only: a parameter's gradient is accumulated inside the part
        activations = {
            i: t for i, t in enumerate(args) if isinstance(t, Tensor) and t.requires_grad and not t.is_leaf
        }
        if activations:
            bordered = _Border.apply(partial(timeline.stamp, OTHER), *activations.values())
            activations = dict(zip(activations, bordered, strict=True))
        timeline.stamp(part)
        results = function(*(activations.get(i, t) for i, t in enumerate(args)), **kwargs)
        timeline.stamp(OTHER)
        outputs = _Border.apply(begin_backward, *as_tuple(results))
        return outputs if isinstance(results, tuple) else outputs[0]

    return call


@contextmanager
def watch(timeline: Timeline) -> Iterator[None]:
    """Record the stamps of every training step inside the `with` block."""
    with ExitStack() as stack:
        for name, part in PARTS.items():
            wrapped = _watched(getattr(gpt_model, name), part, timeline)
            stack.enter_context(patch.object(gpt_model, name, wrapped))
        hooks = (
            register_optimizer_step_pre_hook(lambda *_: timeline.stamp(UPDATE, ONCE)),
            register_optimizer_step_post_hook(lambda *_: timeline.stamp(OTHER)),
        )
        for hook in hooks:
            stack.callback(hook.remove)
        yield


def measure(work: Workload, rounds: int = 20, seconds: float = 20) -> Iterator[Row]:
    """The parts of our step, the longest first.

    Args:
        rounds: steps; each part's time is its median over them.
        seconds: to spend at most, but at least three steps.
    """
    if work.device.type == "cpu":
        keep_freed_memory()
    ours = fusedgpt(work, captured=False)
    batches = work.batches()
    for _ in range(2):
        ours.step(*next(batches))
    samples: list[dict[tuple[str, str], float]] = []
    began = time.monotonic()
    timeline = Timeline(work.device)
    with watch(timeline):
        while len(samples) <= rounds and (len(samples) < 4 or time.monotonic() - began < seconds):
            inputs, targets = next(batches)
            timeline.start()
            ours.step(inputs, targets)
            samples.append(timeline.stop())
    samples = samples[1:]  # the first built the nodes' classes
    found = {key: statistics.median(sample.get(key, 0.0) for sample in samples) for key in samples[0]}
    whole = sum(found.values())
    totals: dict[str, float] = defaultdict(float)
    for (part, _), milliseconds in found.items():
        totals[part] += milliseconds
    for (part, direction), milliseconds in sorted(found.items(), key=lambda item: -totals[item[0][0]]):
        case = f"{work.case}, {direction}" if direction else work.case
        yield Row(part, case, ours.name, direction, milliseconds, milliseconds / whole)


COLUMNS = (
    ("step", "<52", "case", "{}"),
    ("part", "<24", "name", "{}"),
    ("ms", ">9", "milliseconds", "{:.2f}"),
    ("share", ">7", "share", "{:.1%}"),
)
