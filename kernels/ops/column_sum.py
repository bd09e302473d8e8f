"""The sums of a matrix's columns: what a bias's gradient is.

Programs share the rows, each keeps float32 sums of its own, writes one partial row, and PyTorch adds those up in a fixed
order: no atomics, the same bits every time. A matrix (M, N) of s bytes an element is read once, M N s bytes; the partial
rows are 4 N bytes for each of as many programs as are resident together.
"""

import torch
from torch import Tensor

from .._triton import on_device_of, tl, triton
from ..backend import register
from ..tiles import COLUMN_SUM, hardware, select


@triton.jit(do_not_specialize=["rows"])
def column_sum_kernel(x, sums, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes BLOCK columns of every num_programs(1)th tile of rows. sums: (num_programs(1), columns) float32."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros(
        (ROWS, BLOCK), tl.float32
    )  # summed over rows at the end: until then nothing leaves a thread
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        here = (row < rows)[:, None] & inside[None, :]
        total += tl.load(x + row[:, None] * columns + column[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(1).to(tl.int64) * columns + column, tl.sum(total, 0), mask=inside)


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
        column_sum_kernel[(blocks, splits)](
            x, sums, rows, columns, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps
        )
    return sums.sum(0)


# (M, N) of any floating dtype but float64 and any strides to (N,) float32
column_sum = register(
    "column_sum(Tensor x) -> Tensor", _launch, lambda x: x.new_empty(x.shape[1], dtype=torch.float32)
)
