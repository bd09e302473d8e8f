"""The Triton kernels of the LayerNorm family; `operator.py` has the formulas, the bytes they move and the launchers.

Each exists twice: for rows that fit in a program's registers and, as `wide`, for rows that are taken in blocks.
Pointers that may be None switch what depends on them off when a kernel is compiled. The number of rows is never
specialised on, and offsets are 64 bits wide.
"""

from ..._triton import tl, triton
from ...dropout_mask import column_keys, dropout_key, keep_elements, row_keys
from .forward import _parameter


@triton.jit
def _store_gradients(dh, dx, grad, key, at, row, column, here, threshold, scale):
    """Write the residual's gradient and, where it is another tensor, x's. Returns x's as float32."""
    tl.store(dh + at, grad, mask=here)
    if key is not None:
        keep = keep_elements(row_keys(key, 0, row)[:, None], column_keys(key, column)[None, :], threshold)
        grad = tl.where(keep, grad * scale, 0.0)
    if dx is not None:
        tl.store(dx + at, grad, mask=here)
    return grad


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def backward_kernel(
    dy,
    dresidual_out,
    h,
    weight,
    stats,
    dh,
    dx,
    sums,
    seed,
    stream,
    threshold,
    scale,
    rows,
    C: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    DX_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Whole rows in registers, and with them the sums of the rows that this program has seen.

    sums: (programs, DWEIGHT + DBIAS + DX_BIAS, C) float32.
    """
    column = tl.arange(0, BLOCK)
    inside = column < C
    w = _parameter(weight, column, inside)
    key = dropout_key(seed, stream)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dx_bias = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * C + column[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        if dresidual_out is not None:
            grad = tl.load(dresidual_out + at, mask=here, other=0.0).to(tl.float32)
        if dy is not None:
            mean = tl.load(stats + row, mask=row < rows, other=0.0)[:, None]
            rstd = tl.load(stats + rows + row, mask=row < rows, other=0.0)[:, None]
            normal = (tl.load(h + at, mask=here, other=0.0).to(tl.float32) - mean) * rstd
            slope = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
            if DWEIGHT:
                dweight += tl.sum(slope * normal, 0)
            if DBIAS:
                dbias += tl.sum(slope, 0)
            slope *= w[None, :]
            along = (tl.sum(slope * normal, 1) / C)[:, None]
            grad += rstd * (slope - (tl.sum(slope, 1) / C)[:, None] - normal * along)
        grad = _store_gradients(dh, dx, grad, key, at, row, column, here, threshold, scale)
        if DX_BIAS:
            dx_bias += tl.sum(grad, 0)
    sums += tl.program_id(0).to(tl.int64) * ((DWEIGHT + DBIAS + DX_BIAS) * C) + column
    if DWEIGHT:
        tl.store(sums, dweight, mask=inside)
    if DBIAS:
        tl.store(sums + DWEIGHT * C, dbias, mask=inside)
    if DX_BIAS:
        tl.store(sums + (DWEIGHT + DBIAS) * C, dx_bias, mask=inside)


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def wide_backward_kernel(
    dy,
    dresidual_out,
    h,
    weight,
    stats,
    dh,
    dx,
    seed,
    stream,
    threshold,
    scale,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows in blocks: one pass for the two means, one for the gradients."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    key = dropout_key(seed, stream)
    mean = tl.load(stats + row, mask=row < rows, other=0.0)[:, None]
    rstd = tl.load(stats + rows + row, mask=row < rows, other=0.0)[:, None]
    level = tl.zeros((ROWS,), tl.float32)
    along = tl.zeros((ROWS,), tl.float32)
    if dy is not None:
        for start in range(0, C, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < C
            at = row[:, None] * C + column[None, :]
            here = (row < rows)[:, None] & inside[None, :]
            slope = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
            slope *= _parameter(weight, column, inside)[None, :]
            level += tl.sum(slope, 1)
            along += tl.sum(slope * (tl.load(h + at, mask=here, other=0.0).to(tl.float32) - mean) * rstd, 1)
    for start in range(0, C, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < C
        at = row[:, None] * C + column[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        if dresidual_out is not None:
            grad = tl.load(dresidual_out + at, mask=here, other=0.0).to(tl.float32)
        if dy is not None:
            normal = (tl.load(h + at, mask=here, other=0.0).to(tl.float32) - mean) * rstd
            slope = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
            slope *= _parameter(weight, column, inside)[None, :]
            grad += rstd * (slope - (level / C)[:, None] - normal * (along / C)[:, None])
        _store_gradients(dh, dx, grad, key, at, row, column, here, threshold, scale)


@triton.jit(do_not_specialize=["rows"])
def wide_sums_kernel(
    dy,
    h,
    stats,
    dx,
    sums,
    rows,
    C: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    DX_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parameters' gradients of wide rows: a program takes BLOCK columns of every num_programs(1)th tile of rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dx_bias = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * C + column[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        if dy is not None:
            slope = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
            if DWEIGHT:
                mean = tl.load(stats + row, mask=row < rows, other=0.0)[:, None]
                rstd = tl.load(stats + rows + row, mask=row < rows, other=0.0)[:, None]
                normal = (tl.load(h + at, mask=here, other=0.0).to(tl.float32) - mean) * rstd
                dweight += tl.sum(slope * normal, 0)
            if DBIAS:
                dbias += tl.sum(slope, 0)
        if DX_BIAS:
            dx_bias += tl.sum(tl.load(dx + at, mask=here, other=0.0).to(tl.float32), 0)
    sums += tl.program_id(1).to(tl.int64) * ((DWEIGHT + DBIAS + DX_BIAS) * C) + column
    if DWEIGHT:
        tl.store(sums, dweight, mask=inside)
    if DBIAS:
        tl.store(sums + DWEIGHT * C, dbias, mask=inside)
    if DX_BIAS:
        tl.store(sums + (DWEIGHT + DBIAS) * C, dx_bias, mask=inside)
