"""The forward kernels of LayerNorm. `operator.py` has the formulas, the bytes they move and the launchers.

One kernel keeps whole rows in registers, the other, `wide`, takes rows in blocks. The number of rows is never
specialised on, and offsets are 64 bits wide.
"""

from typing import Any, NamedTuple

from ..._triton import WARP_AXIS, tl, triton
from ...dropout_mask import dropout_key, keep_tile

ROWS = tl.constexpr(WARP_AXIS)  # the axis of rows in a tile of whole rows


class Inputs(NamedTuple):
    """What a forward kernel reads. A pointer that is None compiles away what depends on it."""

    x: Any  # (rows, C)
    x_bias: Any  # (C,) or None
    residual: Any  # (rows, C), or None: LayerNorm of x itself
    weight: Any  # (C,)
    bias: Any  # (C,) or None


class Outputs(NamedTuple):
    """What a forward kernel writes."""

    y: Any  # (rows, C)
    residual_out: Any  # (rows, C), or None without a residual
    stats: Any  # (2, rows) float32: mean and rstd, the reciprocal standard deviation


@triton.jit
def load_float32(pointer, at, here):
    return tl.load(pointer + at, mask=here, other=0.0).to(tl.float32)


@triton.jit
def load_parameter(pointer, column, inside):
    """A parameter's values as float32, None for a pointer that is None."""
    values = None
    if pointer is not None:
        values = load_float32(pointer, column, inside)
    return values


@triton.jit
def whole_rows(x, tile: tl.constexpr):
    """The columns and the first rows of a tile of whole rows of x: (spans, 1, SPAN) and (1, rows, 1), or the first two axes swapped.

    With as many rows as warps each warp takes rows of its own, so that no sum along a row leaves it: ROWS is the axis along
    which warps are laid, since a span is what one warp loads at once, 16 bytes a lane.
    """
    ONE: tl.constexpr = min(4096 // x.dtype.element_ty.primitive_bitwidth, tile.block)
    SPAN: tl.constexpr = ONE if tile.rows >= tile.warps else tile.block
    spans = SPAN * tl.arange(0, tile.block // SPAN)
    rows = tl.arange(0, tile.rows).to(tl.int64)
    within = tl.arange(0, SPAN)[None, None, :]
    if ROWS == 0:
        return spans[None, :, None] + within, rows[:, None, None]
    else:
        return spans[:, None, None] + within, rows[None, :, None]


@triton.jit
def sum_rows(x):
    """The sum of each row of a tile as `whole_rows` lays it out, in the shape of its rows."""
    return tl.sum(tl.sum(x, 1 - ROWS, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _add(inp, x_bias, key, at, row, column, here, threshold, scale):
    """h of a tile as float32, rounded to the residual's dtype. x_bias: loaded values; key: None without dropout."""
    h = load_float32(inp.x, at, here)
    if x_bias is not None:
        h += x_bias
    if key is not None:
        h = tl.where(keep_tile(key, row, column, threshold), h * scale, 0.0)
    if inp.residual is not None:
        h += load_float32(inp.residual, at, here)
        h = h.to(inp.residual.dtype.element_ty).to(tl.float32)
    return h


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def forward_kernel(inp, out, seed, stream, threshold, scale, eps, rows, C: tl.constexpr, tile: tl.constexpr):
    """Whole rows in registers, each read once. Programs are persistent and keep the parameters."""
    column, first = whole_rows(inp.x, tile)
    inside = column < C
    # In the shape of x, so that Triton loads them in x's layout: in another one it would convert y within the loop.
    everywhere = column + tl.zeros_like(first).to(tl.int32)
    w = load_parameter(inp.weight, everywhere, everywhere < C)
    b = load_parameter(inp.bias, everywhere, everywhere < C)
    x_bias = load_parameter(inp.x_bias, everywhere, everywhere < C)
    key = dropout_key(seed, stream)
    for i in tl.range(tl.program_id(0), tl.cdiv(rows, tile.rows), tl.num_programs(0), num_stages=tile.stages):
        row = i * tile.rows + first
        at = row * C + column
        here = (row < rows) & inside
        # beyond C zeros that the compiler knows, so that it leaves out what they would cost
        h = tl.where(inside, _add(inp, x_bias, key, at, row, column, here, threshold, scale), 0.0)
        if inp.residual is not None:
            tl.store(out.residual_out + at, h, mask=here)
        mean = sum_rows(h) / C
        centered = tl.where(inside, h - mean, 0.0)
        rstd = tl.rsqrt(sum_rows(centered * centered) / C + eps)
        y = centered * rstd
        y = y * w if b is None else tl.fma(y, w, b)
        tl.store(out.y + at, y, mask=here)
        tl.store(out.stats + row, mean, mask=row < rows)
        tl.store(out.stats + rows + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def wide_forward_kernel(
    inp, out, seed, stream, threshold, scale, eps, rows, C: tl.constexpr, tile: tl.constexpr
):
    """Rows in blocks: merge the blocks' statistics (Chan, Golub and LeVeque, 1983), then read h again."""
    row = (tl.program_id(0) * tile.rows + tl.arange(0, tile.rows).to(tl.int64))[:, None]
    key = dropout_key(seed, stream)
    mean = tl.full((tile.rows, 1), 0.0, tl.float32)
    m2 = tl.full((tile.rows, 1), 0.0, tl.float32)  # the sum of squared deviations from the mean
    for start in range(0, C, tile.block):
        column = start + tl.arange(0, tile.block)[None, :]
        inside = column < C
        at = row * C + column
        here = (row < rows) & inside
        x_bias = load_parameter(inp.x_bias, column, inside)
        h = _add(inp, x_bias, key, at, row, column, here, threshold, scale)
        if inp.residual is not None:
            tl.store(out.residual_out + at, h, mask=here)
        count = tl.minimum(C - start, tile.block).to(tl.float32)
        block_mean = tl.sum(tl.where(inside, h, 0.0), 1, keep_dims=True) / count
        centered = tl.where(inside, h - block_mean, 0.0)
        delta = block_mean - mean
        weight = count / (start + count)
        m2 += tl.sum(centered * centered, 1, keep_dims=True) + delta * delta * (start * weight)
        mean += delta * weight
    rstd = tl.rsqrt(m2 / C + eps)
    tl.store(out.stats + row, mean, mask=row < rows)
    tl.store(out.stats + rows + row, rstd, mask=row < rows)
    tl.debug_barrier()  # other threads of this program wrote the residual_out that is read below
    for start in range(0, C, tile.block):
        column = start + tl.arange(0, tile.block)[None, :]
        inside = column < C
        at = row * C + column
        here = (row < rows) & inside
        h = load_float32(inp.x if inp.residual is None else out.residual_out, at, here)
        y = (h - mean) * rstd * load_parameter(inp.weight, column, inside)
        if inp.bias is not None:
            y += load_parameter(inp.bias, column, inside)
        tl.store(out.y + at, y, mask=here)
