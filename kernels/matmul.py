"""Library matmuls that keep the float32 accumulator, so that a weight's gradient is rounded once, to the weight's dtype.

cuBLAS can store float32 from bfloat16 or float16 operands. torch offers that on NVIDIA GPUs only; elsewhere the
operands are widened first, which gives the same result more slowly.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_in_place = False  # a plain global: autograd's threads read it


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Add weights' gradients to their `.grad` straight from the matmul, in every backward pass inside the `with` block.

    It holds for the Triton backend and weights that are leaves with a contiguous float32 `.grad`; autograd, which would write the
    gradient, read it and add it, gets none for them. All others get theirs as always, and so do all under torch.compile.
    The sums are the same up to the order of their terms where a weight is used twice.

    Use it around `Tensor.backward`, whose effect it does not change. `torch.autograd.grad` returns None for such a weight,
    and hooks on its gradient get None.
    """
    global _in_place
    outer, _in_place = _in_place, True
    try:
        yield
    finally:
        _in_place = outer


def leaf(weight: Tensor) -> Tensor | None:
    """The weight if it is a leaf: what a backward pass keeps to ask for `own_gradient`."""
    return weight if weight.is_leaf else None


def own_gradient(leaf: Tensor | None) -> Tensor | None:
    """The `.grad` that an operator's backward pass adds to itself; None where it returns the gradient to autograd."""
    if not _in_place or leaf is None or leaf.grad is None:
        return None
    return leaf.grad if leaf.grad.dtype == torch.float32 and leaf.grad.is_contiguous() else None


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


def weight_gradient(
    dy: Tensor, x: Tensor, dtype: torch.dtype, by_column: bool, total: Tensor | None = None
) -> Tensor:
    """dyᵀ x (out, in) in `dtype`, for dy (M, out) and x (M, in), in the weight's memory order: autograd would copy any other.

    Empty if `total` is given, to which it is added.
    """
    if total is not None:
        accumulate(total, dy.T, x)
        return dy.new_empty(0, dtype=dtype)
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
