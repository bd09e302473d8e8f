"""The kernels of a training step, compiled side by side while the data is prepared: no wait for one after the other.

What to compile is not written down anywhere: a step and an evaluation of the same model with one block, at the run's own
widths, pass their operators' calls to `_Calls`, which keeps them and hands back memory as it is found. Forward and
backward operators are then called from threads with those arguments, and every kernel is built for the very dtypes,
widths, strides and alignments that the run will bring. Further blocks and sequences bring no others.

What was computed is thrown away. Nothing is drawn at random, so that the run's own random state stays as it was.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import repeat
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ...kernels.backend import choose
from ..config import RunConfig
from ..device import DTYPES
from ..model import GPT
from ..optim import build_optimizers
from .step import TrainStep

Call = tuple[Callable[..., Any], tuple[Any, ...]]
TOKENS = 2**15  # of a batch to compile with, at most: memory for one block and the head


def precompile(config: RunConfig, device: torch.device) -> Thread:
    """Start to compile what a run needs up to its first finished step; join the thread before that step.

    It does nothing where the operators are plain PyTorch, and says nothing where something fails: the step would meet
    that too, and reports it.

    Args:
        config: the run's, with vocabulary, dtype and micro-batch settled.
        device: to train on.
    """
    thread = Thread(target=_precompile, args=(config, device))
    thread.start()
    return thread


def _precompile(config: RunConfig, device: torch.device) -> None:
    if device.type != "cuda":
        return
    with torch.cuda.device(device), suppress(Exception):
        _compile(config, device)
    torch.cuda.empty_cache()  # the step's own stream and graphs could not use what this stream has freed
    torch.cuda.reset_peak_memory_stats(device)


def _compile(config: RunConfig, device: torch.device) -> None:
    # the first launch of all, before there are several threads: it initialises CUDA and Triton
    probe = torch.empty(0, dtype=DTYPES[config.train.dtype], device=device)
    if choose("attention", probe).backend == "torch":
        return
    calls = operator_calls(config, device).values()
    with ThreadPoolExecutor(len(calls)) as pool:
        for each in calls:
            pool.submit(run, each)


def operator_calls(config: RunConfig, device: torch.device) -> dict[str, list[Call]]:
    """What a training step and an evaluation of one block and the head call, by what can be compiled side by side.

    Args:
        config: as `precompile` takes it.
        device: of the arguments.
    """
    settings, length = replace(config.train, cuda_graph="off"), config.model.context_length
    sequences = min(settings.sequences, max(TOKENS // length, 1))
    with _Calls() as calls:
        model = GPT(replace(config.model, n_layer=1)).to_empty(device=device)
        ids = torch.zeros(sequences, length, dtype=torch.int64, device=device)
        step = TrainStep(model, build_optimizers(model, settings), repeat((ids, ids)), settings)
        step.micro_step(ids, ids)
        # as mean_loss evaluates, whose module imports libraries that a GPU machine may lack
        with torch.inference_mode():
            model.eval()(ids, ids, dtype=step.dtype, reduction="sum")
    return calls.found


def run(calls: list[Call]) -> None:
    """Make the calls, for the kernels that are compiled on the way."""
    with torch.no_grad():
        for function, arguments in calls:
            function(*arguments)


class _Calls(TorchDispatchMode):
    """Keeps our operators' calls instead of making them, and leaves weights undrawn; all else runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[Call]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        if func.namespace != "fusedgpt":
            return func(*args, **(kwargs or {}))
        self.found.setdefault(_thread(func.name().partition("::")[2]), []).append((func, args))
        device = next(t.device for t in args if isinstance(t, Tensor))
        shapes = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args))
        return tree_map_only(Tensor, lambda t: torch.empty_like(t, device=device), shapes)


def _thread(operator: str) -> str:
    """Which thread takes an operator: those that launch the same kernel share one, and so do those around matmuls.

    Triton makes a kernel's cache at its first launch, and of two at the same time one would be lost. cuBLAS keeps a workspace
    of 32 MiB for every thread that it has seen.
    """
    if operator.startswith(("linear", "gelu_mlp")):
        return "matmuls"
    return operator.removeprefix("add_")
