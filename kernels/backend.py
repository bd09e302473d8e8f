"""Which implementation runs for these tensors, and why.

`auto` takes a Triton kernel for CUDA and ROCm tensors wherever one exists and the reference for all else, so it
never fails where the reference would work; a forced backend that cannot run raises instead.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
OPERATORS = (
    "embed",
    "layer_norm",
    "add_layer_norm",
    "linear",
    "attention",
    "gelu_mlp",
    "linear_cross_entropy",
    "dropout",
)
TRITON_OPERATORS: frozenset[str] = frozenset()  # an operator joins with its kernel

# A plain global: Dynamo cannot trace a ContextVar, and autograd's own threads, which recompute checkpointed blocks,
# would not see its value.
_forced: str | None = None


class Choice(NamedTuple):
    backend: str
    reason: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the `with` block on one backend: "triton", "torch" or "auto" (the default).

    Wins over the environment variable FUSEDGPT_BACKEND. A forced backend that cannot run an operator raises there.

    Raises:
        ValueError: the name is none of the three.
    """
    global _forced
    outer, _forced = _forced, _known(name, "use_backend")
    try:
        yield
    finally:
        _forced = outer


def requested() -> str:
    """The backend asked for: `use_backend` first, then FUSEDGPT_BACKEND, then "auto"."""
    return _forced or _known(os.environ.get("FUSEDGPT_BACKEND") or "auto", "FUSEDGPT_BACKEND")


def _known(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}; it is one of {', '.join(BACKENDS)}")
    return name


def choose(operator: str, x: Tensor) -> Choice:
    """The backend for one call of `operator` on a tensor like x, with the reason as half a sentence.

    Raises:
        RuntimeError: "triton" was forced and cannot run here.
    """
    wanted = requested()
    if wanted == "torch":
        return Choice("torch", "it was asked for")
    obstacle = _obstacle(operator, x)
    if obstacle is None:
        return Choice(
            "triton", "it was asked for" if wanted == "triton" else f"{x.device.type} tensors have a kernel"
        )
    if wanted == "triton":
        raise RuntimeError(f"{operator}: the triton backend was asked for but cannot run: {obstacle}")
    return Choice("torch", obstacle)


def _obstacle(operator: str, x: Tensor) -> str | None:
    """What keeps the Triton kernel of an operator from running on a tensor like x, or None."""
    if operator not in TRITON_OPERATORS:
        return f"this version has no Triton kernel for {operator}"
    if not x.is_cuda:
        return f"the tensors are on {x.device}, and Triton kernels need a CUDA or ROCm device"
    return None


def explain(operator: str, x: Tensor) -> str:
    """One sentence: which backend `operator` uses for tensors of x's device and dtype, and why.

    Args:
        operator: a name out of `fusedgpt.kernels`, such as "layer_norm"; "causal_attention" is "attention".

    Raises:
        ValueError: there is no such operator.
        RuntimeError: "triton" was forced and cannot run here.
    """
    operator = {"causal_attention": "attention"}.get(operator, operator)
    if operator not in OPERATORS:
        raise ValueError(f"explain: unknown operator {operator!r}; it is one of {', '.join(OPERATORS)}")
    choice = choose(operator, x)
    implementation = "its Triton kernel" if choice.backend == "triton" else "plain PyTorch"
    return f"{operator} runs in {implementation} for {str(x.dtype)[6:]} on {x.device}: {choice.reason}."


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device; float64 stays as it is.

    The public functions call it argument by argument: a rule registered with autocast would cast a float32
    residual too.
    """
    if not _autocasts(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off for x's device: what an operator holds in float32 by then, it holds so on purpose."""
    return torch.autocast(x.device.type, enabled=False) if _autocasts(x) else nullcontext()


def _autocasts(x: Tensor) -> bool:
    device = x.device.type  # not every device has autocast: meta tensors know none
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
