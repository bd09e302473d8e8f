"""The library's matmuls with the accumulator's float32 kept: a weight's gradient is rounded once, to the weight's dtype.

cuBLAS stores float32 beside bfloat16 or float16 operands. Where torch offers that on NVIDIA GPUs alone, the operands
are widened first: the same result, slower.
"""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) @ b (K, N), of one dtype and any strides, as (M, N) in `dtype`, rounded once from the accumulator."""
    if a.dtype == dtype:
        return a @ b
    if dtype != torch.float32:  # narrower than the operands
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if _stores_float32(a) else a.float() @ b.float()


def by_column(weight: Tensor) -> bool:
    """Whether it is the transpose of what lies in memory: transformers' GPT-2 stores (in, out)."""
    return weight.stride(0) == 1 < weight.stride(1)


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype, by_column: bool) -> Tensor:
    """dyᵀ x of dy (M, out) and x (M, in), as (out, in) in `dtype`, in the weight's order: autograd would copy another."""
    return product(x.T, dy, dtype).T if by_column else product(dy.T, x, dtype)


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a (M, K) @ b (K, N) in place; total (M, N) is float32, a and b of one dtype and any strides.

    The first product is written over whatever total holds, which spares filling it with zeros and reading them.
    """
    beta = 0 if first else 1
    if a.dtype != torch.float32 and _stores_float32(a):
        torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


def _stores_float32(a: Tensor) -> bool:
    return a.is_cuda and torch.version.hip is None
