"""Triton where it is installed and inert stand-ins where it is not, so that every operator file imports anywhere.

Kernels are decorated when their module is imported. Without Triton the decorators hand the functions back, nothing
launches them, and `backend.py` tells why.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Said aloud because its default changes from release to release: a · b + c in one rounding.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


class _Absent:
    """Stands in for a module that is missing: any attribute, any call, any decorator."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


triton: Any
tl: Any
TensorDescriptor: Any
MISSING: str | None = None  # why there is no Triton
try:
    import triton  # type: ignore[no-redef,import-untyped]
    import triton.language as tl  # type: ignore[no-redef,import-untyped]
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[no-redef,import-untyped]
except ImportError as error:
    MISSING = str(error)
    triton = tl = TensorDescriptor = _Absent()

# TRITON_INTERPRET=1 at import: the kernels of this process run in Triton's interpreter, on CPU tensors
INTERPRETED: bool = MISSING is None and bool(triton.knobs.runtime.interpret)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make that x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
