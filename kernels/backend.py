"""Choose the implementation for given tensors, give the reason, and register Triton operators with PyTorch.

`auto` uses Triton kernels for CUDA and ROCm tensors and the reference for everything else, so it never fails where the
reference would work. A forced backend that cannot run raises.
"""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _triton, checks
from ._triton import tl, triton

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = (8, 0)  # NVIDIA GPUs from here on have bfloat16 arithmetic and asynchronous copies

# Plain globals: Dynamo cannot trace a ContextVar, and autograd's threads, which recompute checkpointed blocks, would
# not see its value.
_forced: str | None = None
# Operators and reasons; a new dict for each change, so that outer blocks keep theirs.
_replaced: dict[str, str] = {}


class Choice(NamedTuple):
    backend: str
    reason: str


class BackendError(RuntimeError):
    """A backend was asked for that cannot run."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the `with` block on one backend: "triton", "torch" or "auto" (the default).

    Overrides the environment variable FUSEDGPT_BACKEND and applies to all threads. An operator that the forced backend
    cannot run raises RuntimeError. What `replace` does inside the block ends with it.

    Raises:
        ValueError: unknown name.
    """
    global _forced, _replaced
    outer = _forced, _replaced
    _forced = _known(name, "use_backend")
    try:
        yield
    finally:
        _forced, _replaced = outer


def replace(operator: str, reason: str) -> None:
    """Run one operator in plain PyTorch from now on, even where "triton" is forced, because its kernel is wrong.

    It holds for all threads until the `use_backend` block around it ends.

    Args:
        operator: as `explain` takes it.
        reason: a clause, which `explain` gives.
    """
    global _replaced
    _replaced = {**_replaced, operator: reason}


def replaced() -> dict[str, str]:
    """The operators that `replace` keeps in plain PyTorch, and why."""
    return dict(_replaced)


def requested() -> str:
    """Return the requested backend: `use_backend` first, then FUSEDGPT_BACKEND, then "auto"."""
    return _forced or _known(os.environ.get("FUSEDGPT_BACKEND") or "auto", "FUSEDGPT_BACKEND")


def _known(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{origin}: unknown backend {checks.describe(name)}; it is one of {', '.join(BACKENDS)}"
        )
    return name


def choose(operator: str, x: Tensor, *others: Tensor | None, obstacle: str | None = None) -> Choice:
    """Choose the backend for one call of `operator` on x and the other tensors, with the reason as a clause.

    Args:
        obstacle: why the operator's own kernel cannot take this call, such as an unsupported shape.

    Raises:
        BackendError: "triton" was forced and cannot run here.
    """
    wanted = requested()
    if wanted == "torch":
        return Choice("torch", "it was asked for")
    if operator in _replaced:
        return Choice("torch", _replaced[operator])
    obstacle = _obstacle(wanted, x, others) or obstacle
    if obstacle is None:
        return Choice(
            "triton", "it was asked for" if wanted == "triton" else f"{x.device.type} tensors have a kernel"
        )
    if wanted == "triton":
        raise BackendError(f"{operator}: the triton backend was asked for but cannot run: {obstacle}")
    return Choice("torch", obstacle)


def _obstacle(wanted: str, x: Tensor, others: tuple[Tensor | None, ...]) -> str | None:
    """Return why a Triton kernel cannot run on these tensors, or None."""
    if _triton.MISSING is not None:
        return f"Triton cannot be imported ({_triton.MISSING})"
    if _triton.INTERPRETED:
        if wanted != "triton":
            return "Triton's interpreter runs only on request"
    elif not x.is_cuda:
        return f"the tensors are on {x.device}, and Triton kernels need a CUDA or ROCm device"
    if any(t is not None and t.dtype == torch.float64 for t in (x, *others)):
        return "float64 exists in plain PyTorch only"
    if _triton.INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter is wrong in bfloat16 (its tl.dot multiplies bit patterns); take float16 or float32"
    return None if _triton.INTERPRETED else unusable(x.device)


def unusable(device: torch.device) -> str | None:
    """Return why compiled Triton kernels cannot run on a CUDA or ROCm device, or None. Probed once per device."""
    return _probe(device.index if device.index is not None else torch.cuda.current_device())


# As torch.compiler.assume_constant_result does; importing that takes half of our own import time.
unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _probe(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < MIN_CAPABILITY:
        got, needed = (
            ".".join(map(str, c)) for c in (torch.cuda.get_device_capability(index), MIN_CAPABILITY)
        )
        return f"{torch.cuda.get_device_name(index)} has compute capability {got}; the kernels need {needed}"
    try:
        with torch.cuda.device(index):
            flag = torch.zeros(1, device="cuda")
            _probe_kernel[(1,)](flag)
            if flag.item() == 1.0:
                return None
        obstacle = "a first Triton kernel ran but gave a wrong result"
    except Exception as error:  # compilers, drivers and launchers raise anything
        lines = str(error).strip().splitlines() or [""]
        obstacle = f"a first Triton kernel failed with {type(error).__name__}: {lines[0]}"
    obstacle = "; ".join([obstacle, *missing_tools()])
    warnings.warn(f"fusedgpt: the GPU runs without Triton kernels: {obstacle}", RuntimeWarning, stacklevel=2)
    return obstacle


@triton.jit
def _probe_kernel(flag):
    tl.store(flag, 1.0)


def missing_tools() -> list[str]:
    """List what Triton needs to build its launcher and this machine lacks, each with a remedy."""
    missing = []
    if shutil.which(os.environ.get("CC", "cc")) is None and not (
        shutil.which("gcc") or shutil.which("clang")
    ):
        missing.append("there is no C compiler (install gcc, or name one in CC)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python's headers are missing (install python3-dev or the equivalent)")
    return missing


def explain(operator: str, x: Tensor) -> str:
    """Say in one sentence which backend `operator` uses for tensors of x's device and dtype, and why.

    Args:
        operator: a function of `fusedgpt.kernels`, such as "layer_norm"; "causal_attention" means "attention".
        x: a tensor of the device and dtype in question.

    Raises:
        TypeError: x is not a tensor.
        ValueError: unknown operator.
        BackendError: "triton" was forced and cannot run here.
    """
    from .examples import (
        SMALL,
    )  # here, since the examples call the public functions, which import this module

    operator = "attention" if operator == "causal_attention" else operator
    if operator not in [*SMALL]:
        raise ValueError(
            f"explain: unknown operator {checks.describe(operator)}; it is one of {', '.join(SMALL)}"
        )
    checks.floating("explain", x=x)
    choice = choose(operator, x)
    implementation = "its Triton kernel" if choice.backend == "triton" else "plain PyTorch"
    return f"{operator} runs in {implementation} for {str(x.dtype)[6:]} on {x.device}: {choice.reason}."


def autocast(x: Tensor) -> Tensor:
    """Cast x to autocast's dtype where autocast is enabled for its device; float64 is left alone.

    The public functions call it per argument: a rule registered with autocast would cast a float32 residual too.
    """
    if not _autocasts(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Disable autocast for x's device, so that what an operator keeps in float32 stays float32."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def _autocasts(x: Tensor) -> bool:
    # meta tensors know no autocast; torch.amp.is_autocast_available would say so, but Dynamo cannot trace it before 2.12
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


_library = torch.library.Library("fusedgpt", "DEF")


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    save: Callable | None = None,
    backward: Callable | None = None,
) -> Any:
    """Register a launcher as the PyTorch operator `fusedgpt::<name>` and return the operator.

    It goes straight to the dispatcher: the wrappers of `torch.library.custom_op` cost host time at every call.

    Args:
        schema: "name(Tensor x, ...) -> Tensor"; no output may alias an input or another output.
        implementation: takes the arguments in the schema's order.
        fake: the same, for tensors without data.
        save: called with (ctx, inputs, output); saves what the backward needs.
        backward: called with (ctx, *gradients), None for the gradient of an unused output.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedgpt::{name}", fake, lib=_library)
    if backward is not None:

        def save_sparingly(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)  # None, not a tensor of zeros, for an unused output
            if save is not None:
                save(ctx, inputs, output)

        torch.library.register_autograd(
            f"fusedgpt::{name}", backward, setup_context=save_sparingly, lib=_library
        )
    return getattr(torch.ops.fusedgpt, name).default
