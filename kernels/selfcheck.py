"""Is every operator right on this machine? A parity check in seconds, and what is known about the compiler.

`gpt doctor` prints it. The rule is that of the tests, `examples.compare`.
"""

import math
from typing import NamedTuple

import torch

from . import _triton
from .backend import choose, requested
from .examples import Example, parity, small

FIXED_PTXAS = (13, 3)  # earlier ones can miscompile Hopper matmuls whose first operand is in registers
FIXED_TRITON = (3, 7)  # earlier ones leave out barriers around tl.dot on data-centre Blackwell


class Check(NamedTuple):
    operator: str  # "attention, one pass" for its other backward
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
    return [_check(example, device, dtype) for example in small(device, dtype)]


def _check(example: Example, device: torch.device, dtype: torch.dtype) -> Check:
    operator = f"{example.operator}, one pass" if example.one_pass else example.operator
    backend, reason = requested(), ""
    try:
        backend, reason = choose(example.operator, torch.empty(1, dtype=dtype, device=device))
        result = parity(example, device, dtype)
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
    return architecture == "sm_90" and version is not None and _release(version) < FIXED_PTXAS


def may_race(architecture: str, version: str) -> bool:
    """Whether this Triton can leave out barriers around `tl.dot` (Triton issue 9871). sm_100 and sm_103 only."""
    return architecture in ("sm_100", "sm_103") and _release(version) < FIXED_TRITON


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))
