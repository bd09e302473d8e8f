"""Is every operator right on this machine? A parity check in seconds, and what is known about the compiler.

`gpt doctor` prints it. The rule is that of the tests, `examples.compare`.
"""

import math
from typing import NamedTuple

import torch

from . import _triton
from .backend import choose, requested
from .examples import SMALL, parity

FIXED_PTXAS = (13, 3)  # earlier ones can miscompile Hopper matmuls whose first operand is in registers


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
    return [_check(operator, device, dtype) for operator in SMALL]


def _check(operator: str, device: torch.device, dtype: torch.dtype) -> Check:
    backend, reason = requested(), ""
    try:
        backend, reason = choose(operator, torch.empty(1, dtype=dtype, device=device))
        result = parity(SMALL[operator], device, dtype)
    # whatever a compiler, a driver or a launch may throw; the others are still checked
    except Exception as failure:
        line = (str(failure).strip().splitlines() or [""])[0]
        return Check(operator, backend, f"{type(failure).__name__}: {line}", math.nan, math.nan, False)
    return Check(operator, backend, reason, *result, result.ok)


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
