"""Forward and backward through torch.compile (`--compile`): whether it pays, and why it cannot be had.

The weights, the state and the rest of the step are those of the eager one, so a run may be resumed with it or without. On a
GPU our operators stay as they are, inside one graph, and Inductor launches on the stream that a CUDA graph is captured from.
"""

import os
import shutil
import time
from collections.abc import Callable

import torch

from ..config import ModelConfig
from .interruption import TrainingError
from .step import TrainStep

GAIN = 0.1  # fraction of a step's time that is saved on a CPU: 13 % of nanoGPT's CPU recipe on one core


def compilation_seconds(layers: int) -> float:
    """About how long a compilation takes with empty caches: 30 s for four layers on two cores."""
    return 10 + 5.0 * layers


def compile_step(step: TrainStep, shape: ModelConfig, say: Callable[[str], None]) -> None:
    """Compile the step where its settings ask for it, and say in a line what is done.

    Args:
        step: before its first step.
        shape: of its model.
        say: prints a line.

    Raises:
        TrainingError: "on", and it cannot be compiled.
    """
    wanted, cost = step.config.compile, compilation_seconds(shape.n_layer)
    if wanted == "off":
        return
    if wanted == "auto" and step.device.type != "cpu":
        say("--compile auto: not compiled, since a GPU's operators are fused already")
        return
    if wanted == "auto":
        seconds = run_seconds(step, shape)
        if GAIN * seconds < cost:
            say(
                f"--compile auto: not compiled, since the run will take about {seconds:,.0f} s, of which it would save a "
                f"tenth, and a compilation takes about {cost:.0f} s"
            )
            return
        say(f"--compile auto: compiling, about {cost:.0f} s, in a run of about {seconds / 60:,.0f} min")
    obstacle = obstacle_to_compiling(step.device) or _compile(step, shape)
    if obstacle and wanted == "on":
        raise TrainingError(f"--compile on: {obstacle}. --compile off or auto runs without it")
    if obstacle:
        say(f"--compile auto: not compiled: {obstacle}")


def run_seconds(step: TrainStep, shape: ModelConfig) -> float:
    """About how long the steps that are left will take on a CPU."""
    times = []
    for _ in range(3):  # the first allocates and starts threads
        start = time.perf_counter()
        _try_out(step, shape)
        times.append(time.perf_counter() - start)
    return min(times) * step.config.accumulation * (step.config.steps - step.step)


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Return what torch.compile would fail on in words of its own, or None."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r} (install g++, or name one in CXX)"
    if device.type == "cpu" and " " in (folder := os.path.dirname(torch.__file__)):
        return f"Inductor cannot link where torch's path has a blank, as {folder!r} has"
    return None


def _compile(step: TrainStep, shape: ModelConfig) -> str | None:
    """Compile the step's forward and backward; return why that failed, or None. The step is eager then."""
    step.forward = torch.compile(step.model, dynamic=False, fullgraph=True)
    try:
        _try_out(step, shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may throw
        step.forward = step.model
        step.abandon()
        cause = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
        return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
    return None


def _try_out(step: TrainStep, shape: ModelConfig) -> None:
    """Do a micro-step of the run's size and throw it away."""
    step.model.train()
    ids = torch.zeros(step.config.sequences, shape.context_length, dtype=torch.int64, device=step.device)
    step.micro_step(ids, ids.clone())  # two tensors: Dynamo compiles anew where one is no longer the other
    step.abandon()
