"""Functions on device tensors as CUDA graphs: one launch instead of one per kernel.

One graph is captured per shape of the function's inputs:

    first call of a shape    runs uncaptured on the capture's stream: kernels compile, libraries initialise
    second                   is captured, then replayed
    all others               copy their inputs to where the graph reads them, and replay

Nothing is computed twice, everything is initialised before a capture, and a shape that occurs once is not captured.
What must outlive a call (gradients, losses, seeds) are tensors allocated outside, which the function changes in place.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_SHAPES = 8  # graphs per function; further shapes run uncaptured


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


class Captured:
    """The CUDA graphs of one function, by the shapes of its inputs.

    A failed capture is reported on stderr, and the function runs uncaptured from then on.

    Args:
        name: of the function in that message.
        place: where it runs and is captured.
    """

    def __init__(self, name: str, place: Place) -> None:
        self.name, self.place = name, place
        self.graphs: dict[Any, _Graph] = {}
        self.ran: set[Any] = set()  # shapes whose kernels and libraries are initialised
        self.failed = False

    def __call__(self, function: Callable[..., None], *inputs: Tensor) -> None:
        """Run function(*inputs), which changes tensors in place, returns nothing and keeps no input.

        Args:
            function: the same one at every call.
        """
        shape = tuple((tuple(t.shape), t.dtype) for t in inputs)
        if shape not in self.graphs:
            allowed = len(self.graphs) < MAX_SHAPES and not self.failed
            graph = self._capture(function, inputs) if shape in self.ran and allowed else None
            if graph is None:
                self.ran.add(shape)
                self._run(function, inputs)
                return
            self.graphs[shape] = graph
        for static, given in zip(self.graphs[shape].inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        self.graphs[shape].graph.replay()

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
            print(
                f"warning: {self.name} runs without a CUDA graph, kernel by kernel: {reason}", file=sys.stderr
            )
            return None
        return _Graph(static, graph)
