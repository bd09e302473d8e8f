"""Functions on device tensors as CUDA graphs: one launch instead of one per kernel.

One graph is captured per shape of the function's inputs:

    first call of a shape    runs uncaptured on the capture's stream: kernels compile, libraries initialise
    second                   is captured, then replayed
    all others               copy their inputs to where the graph reads them, and replay

Everything is initialised before a capture, and a shape that occurs once is not captured. What must outlive a call
(gradients, losses, seeds) are tensors allocated outside, which the function changes in place.

The second call also runs uncaptured, from the same state, and a graph that changes these tensors otherwise is not used.
The call leaves them as one call does.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..output import warn
from .verify import reject

MAX_SHAPES = 8  # graphs per function; further shapes run uncaptured
ROUNDING = 0.1  # the largest relative difference of a change that is not an error; a wrong graph's is about 1


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device: cuBLAS keeps a workspace of 32 MiB per stream it has seen."""
    return torch.cuda.Stream(device)


class Place:
    """The stream and memory pool shared by functions that run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _stream(device)
        self.pool = torch.cuda.graph_pool_handle()


class _Graph(NamedTuple):
    inputs: tuple[Tensor, ...]  # the tensors that the graph reads
    graph: torch.cuda.CUDAGraph

    def replay(self, inputs: tuple[Tensor, ...]) -> None:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self.graph.replay()


class Captured:
    """The CUDA graphs of one function, by the shapes of its inputs.

    A failed capture and a wrong graph are reported on stderr, and the function runs uncaptured from then on.

    Args:
        name: of the function in that message.
        place: where it runs and is captured.
        verify: "off": graphs are not compared; "strict": a wrong one raises TrainingError.
    """

    def __init__(self, name: str, place: Place, verify: str = "auto") -> None:
        self.name, self.place, self.verify = name, place, verify
        self.graphs: dict[Any, _Graph] = {}
        self.ran: set[Any] = set()  # shapes whose kernels and libraries are initialised
        self.failed = False

    def __call__(
        self,
        function: Callable[..., None],
        *inputs: Tensor,
        changed: Callable[[Callable[..., None]], list[Tensor]],
    ) -> None:
        """Run function(*inputs), which changes tensors in place, returns nothing and keeps no input.

        Args:
            function: the same one at every call.
            changed: lists the tensors that the function changes.
        """
        shape = tuple((tuple(t.shape), t.dtype) for t in inputs)
        if shape in self.graphs:
            self.graphs[shape].replay(inputs)
            return
        if shape not in self.ran or self.failed or len(self.graphs) == MAX_SHAPES:
            self.ran.add(shape)
            self._run(function, inputs)
            return
        if self.verify == "off":
            if graph := self._capture(function, inputs):
                graph.replay(inputs)
            else:
                self._run(function, inputs)
        else:
            graph = self._compared(function, inputs, changed(function))
        if graph:
            self.graphs[shape] = graph

    def _compared(
        self, function: Callable[..., None], inputs: tuple[Tensor, ...], tensors: list[Tensor]
    ) -> _Graph | None:
        """Capture and return the graph if it changes the tensors as the function does; they are changed once."""
        before = _copies(tensors)
        self._run(function, inputs)  # first: a graph holds the memory of its intermediates
        expected = _bits(tensors)
        graph = self._capture(function, inputs)
        if graph is None:
            return None
        _restore(tensors, before)
        graph.replay(inputs)
        if torch.equal(_bits(tensors), expected):
            return graph
        replayed = _copies(tensors)
        graph.graph.reset()  # the run needs its memory
        _restore(tensors, before)
        self._run(function, inputs)
        difference = max(map(_difference, replayed, tensors, before))
        if difference <= ROUNDING:  # an operator is not deterministic, or the library chose another matmul
            return self._capture(function, inputs)
        self.failed = True
        what = f"the CUDA graph of {self.name} is wrong here: what it changes differs by {difference:.1e} from an eager step"
        reject(
            what, self.verify == "strict", "This run launches each kernel separately, with the same losses"
        )
        return None

    def _run(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        current = torch.cuda.current_stream(self.place.device)
        # copies, aligned like those of the capture: Triton compiles a kernel again for other alignments
        copies = tuple(t.clone() for t in inputs)
        self.place.stream.wait_stream(current)
        with torch.cuda.stream(self.place.stream):
            function(*copies)
        current.wait_stream(self.place.stream)

    def _capture(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> _Graph | None:
        static = tuple(t.clone() for t in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # if the capture fails, `graph` leaves its stream current; the outer context restores the previous one
            with (
                torch.cuda.stream(self.place.stream),
                torch.cuda.graph(graph, pool=self.place.pool, stream=self.place.stream),
            ):
                function(*static)
        except Exception as error:  # any operation that a capture forbids, of a library or an operator
            causes: list[BaseException] = [error]
            while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
                causes.append(cause)
            # otherwise the allocator would stay in the pool of a capture that could not be ended
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.place.stream.device_index, self.place.pool)
            for cause in causes:
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            self.failed = True
            reason = (str(causes[-1]).strip() or type(causes[-1]).__name__).splitlines()[0]
            warn(f"{self.name} runs without a CUDA graph, kernel by kernel: {reason}")
            return None
        return _Graph(static, graph)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in host memory: a run may fill the GPU's."""
    return [t.to("cpu", copy=True) for t in tensors]


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _bits(tensors: list[Tensor]) -> Tensor:
    """A sum of every tensor's bits, int64."""
    return torch.stack([t.view(torch.int32).sum(dtype=torch.int64) for t in tensors])


def _difference(replayed: Tensor, tensor: Tensor, before: Tensor) -> float:
    """The norm of the difference from `tensor` over that of what it changed by; infinite where nothing was to change."""
    if torch.equal(replayed.to(tensor.device), tensor):
        return 0.0
    if not tensor.is_floating_point():
        return math.inf
    replayed, before = replayed.to(tensor.device), before.to(tensor.device)
    difference, change = ((tensor - other).double().norm().item() for other in (replayed, before))
    return difference / change if change and math.isfinite(difference) else math.inf
