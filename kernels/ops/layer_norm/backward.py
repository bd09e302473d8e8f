"""The backward kernels of LayerNorm. `operator.py` has the formulas, the bytes they move and the launchers.

One kernel keeps whole rows in registers; for wider rows one kernel takes rows in blocks and another sums the parameters'
gradients. The number of rows is never specialised on, and offsets are 64 bits wide. Names are those of Triton's
LayerNorm tutorial: wdy = weight · dy, c1 = mean(x_hat · wdy), c2 = mean(wdy), for rows of h.
"""

from typing import Any, NamedTuple

from ..._triton import tl, triton
from ...dropout_mask import dropout_key, keep_tile
from .forward import ROWS, load_float32, load_parameter, sum_rows, whole_rows


class Incoming(NamedTuple):
    """What a backward kernel reads. A pointer that is None compiles away what depends on it."""

    dy: Any  # (rows, C) or None
    dresidual_out: Any  # (rows, C) or None
    h: Any  # (rows, C)
    weight: Any  # (C,)
    stats: Any  # (2, rows) float32: mean and rstd


class Gradients(NamedTuple):
    """What a backward kernel writes."""

    dh: Any  # (rows, C)
    dx: Any  # (rows, C), or None where it equals dh
    sums: Any  # (programs, the number of `Wanted`, C) float32: each program's partial dweight, dbias, dx_bias


class Wanted(NamedTuple):
    """Which parameters' gradients to sum."""

    dweight: bool
    dbias: bool
    dx_bias: bool


@triton.jit
def _load_stats(stats, row, rows):
    mean = tl.load(stats + row, mask=row < rows, other=0.0)
    rstd = tl.load(stats + rows + row, mask=row < rows, other=0.0)
    return mean, rstd


@triton.jit
def _store_gradients(out, dh, key, at, row, column, here, threshold, scale):
    """Store dh and, where it is another tensor, dx. Returns dx as float32."""
    tl.store(out.dh + at, dh, mask=here)
    dx = dh
    if key is not None:
        dx = tl.where(keep_tile(key, row, column, threshold) & here, dh * scale, 0.0)
    if out.dx is not None:
        tl.store(out.dx + at, dx, mask=here)
    return dx


@triton.jit
def _store_sums(sums, program, dw, db, dx_bias, column, inside, C: tl.constexpr, wanted: tl.constexpr):
    """Store one program's partial sums of the wanted gradients."""
    sums += program.to(tl.int64) * ((wanted.dweight + wanted.dbias + wanted.dx_bias) * C) + column
    if wanted.dweight:
        tl.store(sums, dw, mask=inside)
    if wanted.dbias:
        tl.store(sums + wanted.dweight * C, db, mask=inside)
    if wanted.dx_bias:
        tl.store(sums + (wanted.dweight + wanted.dbias) * C, dx_bias, mask=inside)


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def backward_kernel(
    inp, out, seed, stream, threshold, scale, rows, C: tl.constexpr, wanted: tl.constexpr, tile: tl.constexpr
):
    """Whole rows in registers, together with the partial sums over the rows this program has seen."""
    column, first = whole_rows(inp.h, tile)
    inside = column < C
    everywhere = column + tl.zeros_like(first).to(tl.int32)
    w = tl.where(inside, load_parameter(inp.weight, everywhere, everywhere < C), 0.0)
    key = dropout_key(seed, stream)
    # Added up over the rows of a tile after the loop: within it no thread waits for another.
    dw = tl.zeros_like(everywhere).to(tl.float32)
    db = dw
    dx_bias = dw
    for i in tl.range(tl.program_id(0), tl.cdiv(rows, tile.rows), tl.num_programs(0), num_stages=tile.stages):
        row = i * tile.rows + first
        at = row * C + column
        here = (row < rows) & inside
        dh = tl.zeros_like(dw)
        if inp.dresidual_out is not None:
            dh = load_float32(inp.dresidual_out, at, here)
        if inp.dy is not None:
            mean, rstd = _load_stats(inp.stats, row, rows)
            x_hat = tl.where(inside, (load_float32(inp.h, at, here) - mean) * rstd, 0.0)
            dy = tl.where(inside, load_float32(inp.dy, at, here), 0.0)
            if wanted.dweight:
                dw += dy * x_hat
            if wanted.dbias:
                db += dy
            wdy = dy * w
            c1 = sum_rows(wdy * x_hat) / C
            c2 = sum_rows(wdy) / C
            dh += rstd * (wdy - c2 - x_hat * c1)
        dh = tl.where(inside, dh, 0.0)
        dx = _store_gradients(out, dh, key, at, row, column, here, threshold, scale)
        if wanted.dx_bias:
            dx_bias += dx
    dw = tl.sum(dw, ROWS, keep_dims=True)
    db = tl.sum(db, ROWS, keep_dims=True)
    dx_bias = tl.sum(dx_bias, ROWS, keep_dims=True)
    _store_sums(out.sums, tl.program_id(0), dw, db, dx_bias, column, inside, C, wanted)


@triton.jit(do_not_specialize=["stream", "threshold", "rows"])
def wide_backward_kernel(inp, out, seed, stream, threshold, scale, rows, C: tl.constexpr, tile: tl.constexpr):
    """Rows in blocks: one pass for c1 and c2, one for the gradients."""
    row = (tl.program_id(0) * tile.rows + tl.arange(0, tile.rows).to(tl.int64))[:, None]
    key = dropout_key(seed, stream)
    mean, rstd = _load_stats(inp.stats, row, rows)
    c1 = tl.full((tile.rows, 1), 0.0, tl.float32)
    c2 = tl.full((tile.rows, 1), 0.0, tl.float32)
    if inp.dy is not None:
        for start in range(0, C, tile.block):
            column = start + tl.arange(0, tile.block)[None, :]
            inside = column < C
            at = row * C + column
            here = (row < rows) & inside
            wdy = load_float32(inp.dy, at, here) * load_parameter(inp.weight, column, inside)
            c2 += tl.sum(wdy, 1, keep_dims=True)
            c1 += tl.sum(wdy * (load_float32(inp.h, at, here) - mean) * rstd, 1, keep_dims=True)
    c1 /= C
    c2 /= C
    for start in range(0, C, tile.block):
        column = start + tl.arange(0, tile.block)[None, :]
        inside = column < C
        at = row * C + column
        here = (row < rows) & inside
        dh = tl.full((tile.rows, tile.block), 0.0, tl.float32)
        if inp.dresidual_out is not None:
            dh = load_float32(inp.dresidual_out, at, here)
        if inp.dy is not None:
            x_hat = (load_float32(inp.h, at, here) - mean) * rstd
            wdy = load_float32(inp.dy, at, here) * load_parameter(inp.weight, column, inside)
            dh += rstd * (wdy - c2 - x_hat * c1)
        _store_gradients(out, dh, key, at, row, column, here, threshold, scale)


@triton.jit(do_not_specialize=["rows"])
def wide_sums_kernel(inp, out, rows, C: tl.constexpr, wanted: tl.constexpr, tile: tl.constexpr):
    """The parameters' gradients of wide rows: a program takes a block of columns of every num_programs(1)th tile."""
    column = (tl.program_id(0) * tile.block + tl.arange(0, tile.block))[None, :]
    inside = column < C
    dw = tl.full((1, tile.block), 0.0, tl.float32)
    db = tl.full((1, tile.block), 0.0, tl.float32)
    dx_bias = tl.full((1, tile.block), 0.0, tl.float32)
    for i in tl.range(tl.program_id(1), tl.cdiv(rows, tile.rows), tl.num_programs(1)):
        row = (i * tile.rows + tl.arange(0, tile.rows).to(tl.int64))[:, None]
        at = row * C + column
        here = (row < rows) & inside
        if inp.dy is not None:
            dy = load_float32(inp.dy, at, here)
            if wanted.dweight:
                mean, rstd = _load_stats(inp.stats, row, rows)
                dw += tl.sum(dy * ((load_float32(inp.h, at, here) - mean) * rstd), 0, keep_dims=True)
            if wanted.dbias:
                db += tl.sum(dy, 0, keep_dims=True)
        if wanted.dx_bias:
            dx = load_float32(out.dh if out.dx is None else out.dx, at, here)
            dx_bias += tl.sum(dx, 0, keep_dims=True)
    _store_sums(out.sums, tl.program_id(1), dw, db, dx_bias, column, inside, C, wanted)
