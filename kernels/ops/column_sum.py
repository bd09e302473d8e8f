"""The sums of a matrix's columns, which are the gradient of a bias.

Programs share the rows. Each accumulates its own float32 sums and writes one partial row, and PyTorch adds those up in
a fixed order: no atomics, the same bits every time. A matrix (M, N) of s bytes an element is read once, M N s bytes;
the partial rows take 4 N bytes for each resident program.
"""

import torch
from torch import Tensor

from .._triton import on_device_of, tl, triton
from ..backend import register
from ..tiles import COLUMN_SUM, hardware, select


@triton.jit(do_not_specialize=["rows"])
def column_sum_kernel(x, sums, rows, columns, tile: tl.constexpr):
    """A program takes tile.block columns of every num_programs(1)th tile. sums: (num_programs(1), columns) float32."""
    column = tl.program_id(0).to(tl.int64) * tile.block + tl.arange(0, tile.block)
    inside = column < columns
    # Reduced over rows after the loop: within it no thread communicates.
    acc = tl.full((tile.rows, tile.block), 0.0, tl.float32)
    for i in tl.range(tl.program_id(1), tl.cdiv(rows, tile.rows), tl.num_programs(1)):
        row = i * tile.rows + tl.arange(0, tile.rows).to(tl.int64)
        here = (row < rows)[:, None] & inside[None, :]
        acc += tl.load(x + row[:, None] * columns + column[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(1).to(tl.int64) * columns + column, tl.sum(acc, 0), mask=inside)


def _launch(x: Tensor) -> Tensor:
    rows, columns = x.shape
    if x.numel() == 0:
        return x.new_zeros(columns, dtype=torch.float32)
    x = x.contiguous()
    where = hardware(x.device)
    tile = select(COLUMN_SUM, where.architecture, columns)
    blocks = triton.cdiv(columns, tile.block)
    splits = min(triton.cdiv(rows, tile.rows), triton.cdiv(tile.programs * where.multiprocessors, blocks))
    sums = x.new_empty((splits, columns), dtype=torch.float32)
    with on_device_of(x):
        column_sum_kernel[(blocks, splits)](x, sums, rows, columns, tile=tile, num_warps=tile.warps)
    return sums.sum(0)


# x: (M, N), float32, bfloat16 or float16, any strides. Returns (N,) float32.
column_sum = register(
    "column_sum(Tensor x) -> Tensor", _launch, lambda x: x.new_empty(x.shape[1], dtype=torch.float32)
)
