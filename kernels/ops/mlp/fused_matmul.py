"""Matmuls with GELU in their epilogue: the up-projection, and the gradient that the down-projection hands back.

Persistent programs load and store tiles through tensor descriptors, which fill and clip what reaches over an edge. The
passes of `gelu.py` become the epilogue, on the accumulator. If a multiprocessor runs one program, that program fetches
its next tile during the epilogue (`flatten`); if it runs two, each works during the other's.

The epilogue takes two instructions of the special-function unit (MUFU) per element, and with the loop that feeds it 14
to 17 instructions up and 29 to 35 down, on sm_90 with Triton 3.6 and 3.9.

Hopper and later GPUs read descriptors in hardware. Compiled for older ones the same kernels spill: those GPUs use the
library's matmuls only.
"""

from ..._triton import tl, triton
from .gelu import gelu_and_grad, load_bias


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of an accumulator's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _up_epilogue(acc, bias, pre, a, row, column, F: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr):
    """Store WIDTH columns of the pre-activation, without its bias, and of the activation."""
    if pre is not None:
        pre.store([row, column], acc.to(pre.dtype))
    value, _ = gelu_and_grad(acc + load_bias(bias, column + tl.arange(0, WIDTH), F), EXACT)
    a.store([row, column], value.to(a.dtype))


@triton.jit(do_not_specialize=["rows"])
def up_kernel(
    x, w, bias, pre, a, rows, C: tl.constexpr, F: tl.constexpr, EXACT: tl.constexpr, tile: tl.constexpr
):
    """pre = x wᵀ and a = GELU(pre + bias): x (rows, C), w (F, C). Programs are persistent; pre may be None.

    Neighbouring programs share rows of x, and w stays in the cache. The epilogue runs in tile.split pieces, because
    registers hold no more.
    """
    WIDTH: tl.constexpr = tile.block // tile.split
    across = tl.cdiv(F, tile.block)
    start = tl.program_id(0)
    tiles = tl.cdiv(rows, tile.rows) * across
    for i in tl.range(start, tiles, tl.num_programs(0), flatten=tile.programs == 1):
        row = i // across * tile.rows
        column = i % across * tile.block
        acc = tl.full((tile.rows, tile.block), 0.0, tl.float32)
        for k in tl.range(0, C, tile.depth, num_stages=tile.stages):
            acc = tl.dot(x.load([row, k]), w.load([column, k]).T, acc, input_precision="ieee")
        if tile.split == 1:
            _up_epilogue(acc, bias, pre, a, row, column, F, EXACT, WIDTH)
        else:
            left, right = _halves(acc, tile.rows, tile.block)
            _up_epilogue(left, bias, pre, a, row, column, F, EXACT, WIDTH)
            _up_epilogue(right, bias, pre, a, row, column + WIDTH, F, EXACT, WIDTH)


@triton.jit
def _gradient_epilogue(
    acc, pre, bias, a, dpre, db, row, column, F: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr
):
    """Store WIDTH columns of dpre, of the activation and of the sum of dpre's rows."""
    columns = column + tl.arange(0, WIDTH)
    # `0.0 * acc` puts this into acc's layout. Without it the compiler evaluates GELU in two layouts, twice the
    # instructions. Where acc is not finite, a is lost, as are all the gradients.
    before = pre.load([row, column]).to(tl.float32) + load_bias(bias, columns, F) + 0.0 * acc
    value, grad = gelu_and_grad(before, EXACT)
    acc *= grad
    dpre.store([row, column], acc.to(dpre.dtype))
    if a is not None:
        a.store([row, column], value.to(a.dtype))
    if db is not None:
        tl.store(db + columns, tl.sum(acc, 0), mask=columns < F)


@triton.jit(do_not_specialize=["rows"])
def down_gradient_kernel(
    dy,
    w,
    pre,
    bias,
    a,
    dpre,
    db,
    rows,
    C: tl.constexpr,
    F: tl.constexpr,
    EXACT: tl.constexpr,
    tile: tl.constexpr,
):
    """dpre = (dy w) · GELU'(pre + bias) and a = GELU(pre + bias): dy (rows, C), w (C, F). Programs are persistent.

    db: (tiles of rows, F) float32, each tile's sum of dpre's rows. a and db may be None; a may be pre.
    """
    WIDTH: tl.constexpr = tile.block // tile.split
    across = tl.cdiv(F, tile.block)
    start = tl.program_id(0)
    tiles = tl.cdiv(rows, tile.rows) * across
    for i in tl.range(start, tiles, tl.num_programs(0), flatten=tile.programs == 1):
        row = i // across * tile.rows
        column = i % across * tile.block
        acc = tl.full((tile.rows, tile.block), 0.0, tl.float32)
        for k in tl.range(0, C, tile.depth, num_stages=tile.stages):
            acc = tl.dot(dy.load([row, k]), w.load([k, column]), acc, input_precision="ieee")
        part = db
        if db is not None:
            part = db + (i // across).to(tl.int64) * F
        if tile.split == 1:
            _gradient_epilogue(acc, pre, bias, a, dpre, part, row, column, F, EXACT, WIDTH)
        else:
            left, right = _halves(acc, tile.rows, tile.block)
            if tile.split == 2:
                _gradient_epilogue(left, pre, bias, a, dpre, part, row, column, F, EXACT, WIDTH)
                _gradient_epilogue(right, pre, bias, a, dpre, part, row, column + WIDTH, F, EXACT, WIDTH)
            else:
                first, second = _halves(left, tile.rows, tile.block // 2)
                third, fourth = _halves(right, tile.rows, tile.block // 2)
                _gradient_epilogue(first, pre, bias, a, dpre, part, row, column, F, EXACT, WIDTH)
                _gradient_epilogue(second, pre, bias, a, dpre, part, row, column + WIDTH, F, EXACT, WIDTH)
                _gradient_epilogue(third, pre, bias, a, dpre, part, row, column + 2 * WIDTH, F, EXACT, WIDTH)
                _gradient_epilogue(fourth, pre, bias, a, dpre, part, row, column + 3 * WIDTH, F, EXACT, WIDTH)
