"""A linear projection: the library's matmul under the operators' dtype rules.

    forward   y = x Wᵀ + b
    backward  dx = dy W,   dW = dyᵀ x,   db = Σ rows of dy

W is cast to x's dtype. dW is rounded once, from the float32 accumulator to the weight's own dtype, or added to W's `.grad`
by its matmul (`matmul.gradients_in_place`). The forward's matmul adds the bias. One kernel that reads dy once (`column_sum.py`) computes db: M N s bytes for M rows of N elements of s
bytes.

Saved: x and the cast weight, each only where a gradient needs it. Casting again in the backward would save 2 bytes a
weight between the passes and move 6 more: for the 48 matrices of GPT-2 124M's blocks, 0.17 GB kept, which the backward
frees layer by layer, against 0.5 GB moved by 48 more launches. A checkpointed block keeps neither.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks, matmul, reference
from ..backend import autocast, choose, register
from ..matmul import own_gradient, weight_gradient
from .column_sum import column_sum


def _launch_backward(
    dy: Tensor,
    x: Tensor | None,
    cast: Tensor | None,
    weight_dtype: torch.dtype,
    by_column: bool,
    dbias: bool,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (empty without `cast`), dweight (empty without x or with `total`) and the float32 dbias (empty unless `dbias`)."""
    dx, dweight, db = (dy.new_empty(0, dtype=dtype) for dtype in (dy.dtype, weight_dtype, torch.float32))
    rows = _matrix(dy).contiguous()
    if cast is not None:
        dx = (rows @ cast).view(*dy.shape[:-1], cast.shape[1])
    if x is not None:
        dweight = weight_gradient(rows, _matrix(x), weight_dtype, by_column, total)
    if dbias:
        db = column_sum(rows)
    return dx, dweight, db


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    cast: Tensor | None,
    weight_dtype: torch.dtype,
    by_column: bool,
    dbias: bool,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(0 if cast is None else (*dy.shape[:-1], cast.shape[1]))
    dweight = dy.new_empty(0, dtype=weight_dtype)
    if x is not None and total is None:
        shape = (dy.shape[-1], x.shape[-1])
        dweight = dweight.new_empty(shape[::-1]).T if by_column else dweight.new_empty(shape)
    return dx, dweight, dy.new_empty(dy.shape[-1] if dbias else 0, dtype=torch.float32)


def _matrix(x: Tensor) -> Tensor:
    """(..., C) as (M, C)."""
    return torch.atleast_2d(x).flatten(0, -2)


_backward = register(
    "linear_backward(Tensor dy, Tensor? x, Tensor? cast, ScalarType weight_dtype, bool by_column, bool dbias, "
    "Tensor(a!)? total=None) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, cast, bias = inputs
    ctx.leaf, ctx.weight_dtype, ctx.by_column = matmul.leaf(weight), weight.dtype, matmul.by_column(weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    want_x, want_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if want_weight else None, cast if want_x else None)


def _gradients(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    want_x, want_weight, _, want_bias = ctx.needs_input_grad
    total = own_gradient(ctx.leaf) if want_weight else None
    dx, dweight, db = _backward(dy, *ctx.saved_tensors, ctx.weight_dtype, ctx.by_column, want_bias, total)
    return (
        dx if want_x else None,
        dweight if want_weight and total is None else None,
        None,
        db.to(ctx.bias_dtype) if want_bias else None,
    )


# cast: the weight in x's dtype, without gradient; `weight` itself is only read for its dtype and layout.
_linear = register(
    "linear(Tensor x, Tensor weight, Tensor cast, Tensor? bias) -> Tensor",
    lambda x, weight, cast, bias: reference.linear(x, cast, bias),
    lambda x, weight, cast, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    _save,
    _gradients,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear projection, x @ weight.T + bias.

    Args:
        x: (..., in) activations.
        weight: (out, in), any strides; cast to x's dtype.
        bias: (out,), optional.

    Returns:
        (..., out) in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: unsupported dtype, shape or device of an argument.
    """
    checks.floating("linear", x=x, weight=weight, bias=bias)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; it takes (out, in)"
        )
    checks.shape("linear", "bias", bias, weight.shape[0])
    x = autocast(x)
    # Without gradients both backends are the same library call, which saves decoding an operator's host time.
    if choose("linear", x, weight, bias).backend == "triton" and torch.is_grad_enabled():
        return _linear(x, weight, weight.detach().to(x.dtype), bias)
    return reference.linear(x, weight, bias)
