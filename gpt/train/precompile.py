"""Compile the kernels of a training step in parallel while the data is prepared.

There is no list of what to compile: a step and an evaluation of the same model with one block, at the run's widths, pass
their operators' calls to `_Calls`, which records them and returns uninitialised memory. Forward and backward operators are
then called from threads with those arguments, so every kernel is compiled for the dtypes, widths, strides and alignments of
the run. Further blocks and sequences need no others.

The results are discarded. No random numbers are drawn, so the run's random state does not change.
"""

import logging
from collections.abc import Callable
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

LOG = logging.getLogger(__name__)
Call = tuple[Callable[..., Any], tuple[Any, ...]]
TOKENS = 2**15  # maximum per batch to compile with: memory for one block and the head


def precompile(config: RunConfig, device: torch.device) -> Thread:
    """Start to compile what a run needs for its first step; join the thread before that step.

    It does nothing if the operators run in plain PyTorch. Errors are only logged, which `--debug` shows: the step would
    raise them too.

    Args:
        config: the run's, with vocabulary, dtype and micro-batch settled.
        device: to train on.
    """
    thread = Thread(target=_precompile, args=(config, device), daemon=True)  # a signal waits for no compiler
    thread.start()
    return thread


def _precompile(config: RunConfig, device: torch.device) -> None:
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        _try("the step", _compile, config, device)
    torch.cuda.empty_cache()  # the step's own stream and graphs could not use what this stream has freed
    torch.cuda.reset_peak_memory_stats(device)


def _compile(config: RunConfig, device: torch.device) -> None:
    # the first launch, in one thread: it initialises CUDA and Triton
    probe = torch.empty(0, dtype=DTYPES[config.train.dtype], device=device)
    if choose("a training step", probe).backend == "torch":
        return
    calls = operator_calls(config, device)
    threads = [Thread(target=_try, args=(name, run, each), daemon=True) for name, each in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _try(what: str, work: Callable[..., None], *arguments: Any) -> None:
    try:
        work(*arguments)
    except Exception:  # whatever a compiler, a driver or a launch may throw
        LOG.debug("%s could not be compiled ahead", what, exc_info=True)


def operator_calls(config: RunConfig, device: torch.device) -> dict[str, list[Call]]:
    """The operator calls of a training step and an evaluation of one block and the head, by thread.

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
    """Make the calls, which compiles their kernels."""
    with torch.no_grad():
        for function, arguments in calls:
            function(*arguments)


class _Calls(TorchDispatchMode):
    """Record our operators' calls instead of making them, and skip the drawing of weights; everything else runs."""

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
    """The thread of an operator: operators that launch the same kernel share one, and so do those with matmuls.

    Triton creates a kernel's cache at its first launch, and of two simultaneous ones one would be lost. cuBLAS keeps a
    workspace of 32 MiB per thread it has seen.
    """
    if operator.startswith(("linear", "gelu_mlp")):
        return "matmuls"
    return operator.removeprefix("add_")
