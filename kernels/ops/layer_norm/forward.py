"""The forward kernels of the LayerNorm family; `operator.py` has the formulas, the bytes they move and the launchers."""

from ..._triton import tl, triton
from ...dropout_mask import column_keys, dropout_key, keep_elements, row_keys


@triton.jit
def _add(x, x_bias, residual, key, at, row, column, here, threshold, scale):
    """h of a tile as float32, rounded as residual_out will be. x_bias: its values; key: None without dropout."""
    h = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if x_bias is not None:
        h += x_bias[None, :]
    if key is not None:
        keep = keep_elements(row_keys(key, 0, row)[:, None], column_keys(key, column)[None, :], threshold)
        h = tl.where(keep, h * scale, 0.0)
    if residual is not None:
        h += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        h = h.to(residual.dtype.element_ty).to(tl.float32)
    return h


@triton.jit
def _parameter(pointer, column, inside):
    """The values of a parameter as float32, or None where there is none."""
    values = None
    if pointer is not None:
        values = tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def forward_kernel(
    x,
    x_bias,
    residual,
    weight,
    bias,
    y,
    residual_out,
    stats,
    seed,
    stream,
    threshold,
    scale,
    eps,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Whole rows in registers, each read once; programs are persistent and keep the parameters."""
    column = tl.arange(0, BLOCK)
    inside = column < C
    w = _parameter(weight, column, inside)
    b = _parameter(bias, column, inside)
    xb = _parameter(x_bias, column, inside)
    key = dropout_key(seed, stream)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * C + column[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        h = _add(x, xb, residual, key, at, row, column, here, threshold, scale)
        if residual is not None:
            tl.store(residual_out + at, h, mask=here)
        mean = tl.sum(h, 1) / C
        centered = tl.where(inside[None, :], h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)
        out = centered * rstd[:, None] * w[None, :]
        if b is not None:
            out += b[None, :]
        tl.store(y + at, out, mask=here)
        tl.store(stats + row, mean, mask=row < rows)
        tl.store(stats + rows + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def wide_forward_kernel(
    x,
    x_bias,
    residual,
    weight,
    bias,
    y,
    residual_out,
    stats,
    seed,
    stream,
    threshold,
    scale,
    eps,
    rows,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows in blocks: the statistics of the blocks are merged (Chan, Golub and LeVeque, 1983), then h is read again."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    key = dropout_key(seed, stream)
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, C, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < C
        at = row[:, None] * C + column[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        xb = _parameter(x_bias, column, inside)
        h = _add(x, xb, residual, key, at, row, column, here, threshold, scale)
        if residual is not None:
            tl.store(residual_out + at, h, mask=here)
        count = tl.minimum(C - start, BLOCK).to(tl.float32)
        block_mean = tl.sum(tl.where(inside[None, :], h, 0.0), 1) / count
        centered = tl.where(inside[None, :], h - block_mean[:, None], 0.0)
        delta = block_mean - mean
        share = count / (start + count)
        squares += tl.sum(centered * centered, 1) + delta * delta * (start * share)
        mean += delta * share
    rstd = tl.rsqrt(squares / C + eps)
    tl.store(stats + row, mean, mask=row < rows)
    tl.store(stats + rows + row, rstd, mask=row < rows)
    tl.debug_barrier()  # what other threads of this program wrote to residual_out is read below
    for start in range(0, C, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < C
        at = row[:, None] * C + column[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        if residual is not None:
            h = tl.load(residual_out + at, mask=here, other=0.0).to(tl.float32)
        else:
            h = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        out = (h - mean[:, None]) * rstd[:, None] * _parameter(weight, column, inside)[None, :]
        if bias is not None:
            out += _parameter(bias, column, inside)[None, :]
        tl.store(y + at, out, mask=here)
