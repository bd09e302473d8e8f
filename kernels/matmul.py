"""Library matmuls that keep the float32 accumulator, so that a weight's gradient is rounded once, to the weight's dtype.

cuBLAS can store float32 from bfloat16 or float16 operands. torch offers that on NVIDIA GPUs only; elsewhere the
operands are widened first, which gives the same result more slowly.
"""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) @ b (K, N) in `dtype` (M, N), rounded once from the accumulator. a and b: one dtype, any strides."""
    if a.dtype == dtype:
        return a @ b
    if dtype != torch.float32:  # narrower than the operands
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if _stores_float32(a) else a.float() @ b.float()


def by_column(weight: Tensor) -> bool:
    """Tell whether the weight is stored transposed, (in, out), as in transformers' GPT-2."""
    return weight.stride(0) == 1 < weight.stride(1)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, by_column: bool) -> Tensor:
    """dyᵀ x (out, in) in `dtype`, for dy (M, out) and x (M, in), in the weight's memory order: autograd would copy any other."""
    return product(x.T, dy, dtype).T if by_column else product(dy.T, x, dtype)


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a (M, K) @ b (K, N) in place. total: (M, N) float32; a and b: one dtype, any strides.

    first: overwrite total instead, which saves filling it with zeros and reading them back.
    """
    beta = 0 if first else 1
    if a.dtype != torch.float32 and _stores_float32(a):
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


def _stores_float32(a: Tensor) -> bool:
    return a.is_cuda and torch.version.hip is None
