"""Dropout on its own: an element-wise kernel that applies the mask of `dropout_mask.py`."""

from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._triton import on_device_of, tl, triton
from ..backend import choose, register
from ..dropout_mask import (
    column_keys,
    dropout_key,
    int32_bits,
    keep_elements,
    keep_scale,
    masked,
    row_keys,
    threshold_bits,
)
from ..tiles import dropout_tile


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def _dropout_kernel(
    x, out, seed, stream, threshold, scale, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    across = tl.cdiv(columns, BLOCK)  # one grid axis: the others take no more than 65,535 programs
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    key = dropout_key(seed, stream)
    keep = keep_elements(row_keys(key, 0, row)[:, None], column_keys(key, column)[None, :], threshold)
    value = tl.load(x + at, mask=inside).to(tl.float32) * scale
    tl.store(out + at, tl.where(keep, value, 0.0), mask=inside)


def _launch(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """Moves each element twice, in and out. The mask of the backward is that of the forward."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns
    tile = dropout_tile(columns)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.block),)
    with on_device_of(x):
        _dropout_kernel[grid](
            x,
            out,
            seed,
            int32_bits(stream),
            threshold_bits(p),
            keep_scale(p),
            rows,
            columns,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return out


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.p, seed, ctx.stream = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    (seed,) = ctx.saved_tensors
    return None if grad is None else _dropout(grad, ctx.p, seed, ctx.stream), None, None, None


_dropout = register(
    "dropout(Tensor x, float p, Tensor seed, int stream) -> Tensor",
    _launch,
    lambda x, p, seed, stream: torch.empty_like(x, memory_format=torch.contiguous_format),
    _save,
    _backward,
)


def dropout(x: Tensor, p: float, seed: Tensor, stream: int = 0) -> Tensor:
    """x with every element dropped with probability p and the rest scaled by 1 / (1 - p).

    Args:
        x: any shape, floating; its last dimension gives the columns, all others the rows.
        p: in [0, 1], quantised to 2^-32.
        seed: int64, one element, on x's device.
        stream: which of a step's dropouts this is.

    Returns:
        A tensor like x.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or the probability.
    """
    checks.floating("dropout", x=x)
    checks.dropout("dropout", p, seed, x)
    if p == 0.0:
        return x
    if choose("dropout", x).backend == "triton":
        return _dropout(x, p, seed, stream)
    return masked(x, p, seed, stream)
