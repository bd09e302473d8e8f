"""Is every operator right on this machine? A parity check in seconds, and what is known of the compiler under it.

`gpt doctor` prints it. The rule is that of the tests: against float64, a kernel may err twice as much as plain PyTorch
in the same dtype, and by one unit in the last place of the largest value.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _triton
from .backend import OPERATORS, choose, requested, use_backend
from .ops.attention.operator import causal_attention
from .ops.cross_entropy import linear_cross_entropy
from .ops.dropout import dropout
from .ops.embedding import embed
from .ops.layer_norm.operator import add_layer_norm, layer_norm
from .ops.linear import linear
from .ops.mlp.operator import gelu_mlp

FIXED_PTXAS = (13, 3)  # earlier ones can miscompile Hopper matmuls whose first operand is in registers

B, T, C, V = 2, 70, 96, 131  # uneven on purpose
_Tensors = dict[str, Tensor]
# the shapes of an operator's floating arguments, a call of it; t also holds "seed", "ids" (B, T) and "targets" (B · T)
Example = tuple[dict[str, tuple[int, ...]], Callable[[_Tensors], Tensor | tuple[Tensor, ...]]]

EXAMPLES: dict[str, Example] = {
    "embed": (
        {"wte": (V, C), "wpe": (T, C)},
        lambda t: embed(t["ids"], t["wte"], t["wpe"], 0.1, t["seed"], 1),
    ),
    "layer_norm": (
        {"x": (B, T, C), "weight": (C,), "bias": (C,)},
        lambda t: layer_norm(t["x"], t["weight"], t["bias"]),
    ),
    "add_layer_norm": (
        {"x": (B, T, C), "residual": (B, T, C), "weight": (C,), "bias": (C,), "x_bias": (C,)},
        lambda t: add_layer_norm(
            t["x"], t["residual"], t["weight"], t["bias"], 1e-5, 0.1, t["seed"], 2, t["x_bias"]
        ),
    ),
    "linear": (
        {"x": (B, T, C), "weight": (V, C), "bias": (V,)},
        lambda t: linear(t["x"], t["weight"], t["bias"]),
    ),
    "attention": ({"qkv": (B, T, 3 * C)}, lambda t: causal_attention(t["qkv"], 3, 0.1, t["seed"], 3)),
    "gelu_mlp": (
        {"x": (B, T, C), "w_fc": (4 * C, C), "b_fc": (4 * C,), "w_proj": (C, 4 * C), "b_proj": (C,)},
        lambda t: gelu_mlp(t["x"], t["w_fc"], t["b_fc"], t["w_proj"], t["b_proj"]),
    ),
    "linear_cross_entropy": (
        {"x": (B * T, C), "weight": (V, C)},
        lambda t: linear_cross_entropy(t["x"], t["weight"], t["targets"], V - 3),
    ),
    "dropout": ({"x": (B, T, C)}, lambda t: dropout(t["x"], 0.1, t["seed"], 4)),
}


class Check(NamedTuple):
    operator: str
    backend: str
    reason: str  # why that backend
    error: float  # the largest difference from float64, outputs and gradients, over the largest value there
    tolerance: float  # what is allowed, for the output or gradient that comes closest to it
    ok: bool


def check_all(device: torch.device | str, dtype: torch.dtype | None = None) -> list[Check]:
    """Run every operator forward and backward as `auto` would and compare with float64.

    An operator that fails in another way, at its launch for example, is not `ok`, and says so in `reason`.

    Args:
        device: where to check.
        dtype: of the activations and parameters, by default bfloat16 on a GPU and float32 elsewhere.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return [_check(operator, device, dtype) for operator in OPERATORS]


def _check(operator: str, device: torch.device, dtype: torch.dtype) -> Check:
    backend, reason = requested(), ""
    try:
        backend, reason = choose(operator, torch.empty(1, dtype=dtype, device=device))
        error, tolerance = parity(EXAMPLES[operator], device, dtype)
    except (
        Exception
    ) as failure:  # whatever a compiler, a driver or a launch may throw; the others are still checked
        line = (str(failure).strip().splitlines() or [""])[0]
        return Check(operator, backend, f"{type(failure).__name__}: {line}", math.nan, math.nan, False)
    return Check(operator, backend, reason, error, tolerance, error <= tolerance)


def parity(example: Example, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The error of the output or gradient that comes closest to what it is allowed, and that.

    Both are relative to the largest value of the tensor in float64.
    """
    ours = _run(example, device, dtype, dtype)
    with use_backend("torch"):
        plain = _run(example, device, dtype, dtype)
        exact = _run(example, device, dtype, torch.float64)
    worst = (0.0, 1.0)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        largest = truth.abs().max().item()
        error, allowed = ((t.double() - truth).abs().max().item() / largest for t in (a, b))
        tolerance = 2 * allowed + torch.finfo(a.dtype).eps
        if not error / tolerance <= worst[0] / worst[1]:  # NaN counts as worst
            worst = (error, tolerance)
    return worst


def _run(example: Example, device: torch.device, rounded: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of the example, for values representable in `rounded`, computed in `dtype`."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(rounded).to(dtype)

    shapes, call = example
    tensors: _Tensors = {
        "seed": torch.tensor([1234567890123], device=device),
        "ids": torch.randint(V, (B, T), generator=generator, device=device),
        "targets": torch.randint(V - 3, (B * T,), generator=generator, device=device),
    }
    inputs = {name: drawn(shape, dtype).requires_grad_() for name, shape in shapes.items()}
    result = call(tensors | inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    incoming = [drawn(y.shape, y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, list(inputs.values()), incoming)]


def ptxas_version(architecture: str) -> str | None:
    """The release of the ptxas that Triton uses for an architecture such as "sm_90"; None without one."""
    if _triton.MISSING is not None or not architecture.startswith("sm_"):
        return None
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return get_ptxas(int(architecture[3:])).version
    except (ImportError, OSError, RuntimeError):  # a Triton without NVIDIA's tools
        return None


def may_miscompile(architecture: str, version: str | None) -> bool:
    """Whether this ptxas is one that can miscompile Hopper's matmuls (Triton issue 9433). sm_90 only."""
    if architecture != "sm_90" or version is None:
        return False
    return tuple(map(int, version.split(".")[:2])) < FIXED_PTXAS
