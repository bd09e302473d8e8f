"""Triton where it is installed, inert stand-ins where it is not, so that every operator file imports anywhere.

Kernels are decorated when their module is imported. Without Triton the decorators return the functions unchanged,
nothing launches them, and `backend.py` gives the reason.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Contract a · b + c to one rounding. Set explicitly because the default changes between releases.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


class _Absent:
    """A stand-in for a missing module: takes any attribute, any call, any decorator."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


triton: Any
tl: Any
TensorDescriptor: Any
MISSING: str | None = None  # why there is no Triton
WARP_AXIS = 1  # of a tile of three axes, along which warps are laid where the last axis takes but one
try:
    import triton  # type: ignore[no-redef,import-untyped]
    import triton.language as tl  # type: ignore[no-redef,import-untyped]
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[no-redef,import-untyped]

    if triton.__version__.startswith("3.6."):
        WARP_AXIS = 0
except ImportError as error:
    MISSING = str(error)
    triton = tl = TensorDescriptor = _Absent()

# With TRITON_INTERPRET=1 at import, kernels of this process run in Triton's interpreter, on CPU tensors.
INTERPRETED: bool = MISSING is None and bool(triton.knobs.runtime.interpret)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make x's device the current one, which is where Triton launches."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
