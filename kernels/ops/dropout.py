"""Dropout on its own: an elementwise kernel that applies the mask of `dropout_mask.py`.

    forward   y = x · keep / (1 - p)
    backward  dx = dy · keep / (1 - p)

Only the seed is saved; the backward derives the same mask. Each pass moves each element twice, in and out.
"""

from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from .._triton import on_device_of, tl, triton
from ..backend import choose, register
from ..dropout_mask import dropout_key, int32_bits, keep_scale, keep_tile, threshold_bits
from ..tiles import dropout_tile


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def dropout_kernel(x, out, seed, stream, threshold, scale, rows, columns, tile: tl.constexpr):
    across = tl.cdiv(columns, tile.block)  # one grid axis: the others take at most 65,535 programs
    row = (tl.program_id(0) // across).to(tl.int64) * tile.rows + tl.arange(0, tile.rows)
    column = (tl.program_id(0) % across).to(tl.int64) * tile.block + tl.arange(0, tile.block)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    keep = keep_tile(dropout_key(seed, stream), row[:, None], column[None, :], threshold)
    value = tl.load(x + at, mask=inside).to(tl.float32) * scale
    tl.store(out + at, tl.where(keep, value, 0.0), mask=inside)


def _launch(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns
    tile = dropout_tile(columns)
    mask = (seed, int32_bits(stream), threshold_bits(p), keep_scale(p))
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.block)
    with on_device_of(x):
        dropout_kernel[(programs,)](x, out, *mask, rows, columns, tile=tile, num_warps=tile.warps)
    return out


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.p, seed, ctx.stream = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    (seed,) = ctx.saved_tensors
    return None if dy is None else _dropout(dy, ctx.p, seed, ctx.stream), None, None, None


_dropout = register(
    "dropout(Tensor x, float p, Tensor seed, int stream) -> Tensor",
    _launch,
    lambda x, p, seed, stream: torch.empty_like(x, memory_format=torch.contiguous_format),
    _save,
    _backward,
)


def dropout(x: Tensor, p: float, seed: Tensor, stream: int = 0) -> Tensor:
    """Drop every element of x with probability p and scale the rest by 1 / (1 - p) (Srivastava et al., 2014).

    Args:
        x: any shape, floating; the last dimension gives the columns, all others the rows.
        p: in [0, 1], quantised to 2^-32.
        seed: int64, one element, on x's device.
        stream: an integer that tells this dropout from others under the same seed.

    Returns:
        A tensor of x's shape and dtype; x itself where p is 0.

    Raises:
        TypeError, ValueError: unsupported dtype, shape, device or probability.
    """
    checks.floating("dropout", x=x)
    checks.dropout("dropout", p, seed, x, stream)
    if p > 0.0 and choose("dropout", x).backend == "triton":
        return _dropout(x, p, seed, stream)
    return reference.dropout(x, p, seed, stream)
