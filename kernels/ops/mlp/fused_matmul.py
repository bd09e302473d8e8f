"""GELU within matmuls of our own: the up-projection, and the gradient that the down-projection hands back.

Persistent programs; tiles come and go by tensor descriptors, which fill and clip what hangs over an edge. What the
passes of `gelu.py` do is here the last step of a tile, on the accumulator. A lone program of a multiprocessor
fetches its next tile during that step (FLAT); where two share one, each works during the other's.

The last step takes two instructions of the special-function unit (MUFU) an element, and with the loop that feeds it 14
to 17 instructions up and 29 to 35 down, on sm_90 with Triton 3.6 and 3.9.

Descriptors are read by a unit of Hopper and later GPUs. Compiled for older ones the same kernels spill: those GPUs have
the library's matmuls only.
"""

from typing import Any

from ..._triton import tl, triton
from ...tiles import MatmulTile
from .gelu import bias_of, gelu_and_slope


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _finish_up(total, bias, pre, a, row, column, F: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr):
    """Store WIDTH columns of the pre-activation, without its bias, and of the activation."""
    if pre is not None:
        pre.store([row, column], total.to(pre.dtype))
    value, _ = gelu_and_slope(total + bias_of(bias, column + tl.arange(0, WIDTH), F), EXACT)
    a.store([row, column], value.to(a.dtype))


@triton.jit(do_not_specialize=["rows"])
def up_kernel(
    x,
    w,
    bias,
    pre,
    a,
    rows,
    C: tl.constexpr,
    F: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
):
    """pre = x wᵀ and a = GELU(pre + bias): x (rows, C), w (F, C). Programs are persistent; pre may be None.

    Neighbours share rows of x, and w stays in the cache. The last step goes in SPLIT pieces: registers do not hold more.
    """
    PIECE: tl.constexpr = BLOCK // SPLIT
    across = tl.cdiv(F, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0), flatten=FLAT):
        row = tile // across * ROWS
        column = tile % across * BLOCK
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in tl.range(0, C, DEPTH, num_stages=STAGES):
            total = tl.dot(x.load([row, k]), w.load([column, k]).T, total, input_precision="ieee")
        if SPLIT == 1:
            _finish_up(total, bias, pre, a, row, column, F, EXACT, PIECE)
        else:
            left, right = _halves(total, ROWS, BLOCK)
            _finish_up(left, bias, pre, a, row, column, F, EXACT, PIECE)
            _finish_up(right, bias, pre, a, row, column + PIECE, F, EXACT, PIECE)


@triton.jit
def _finish_gradient(
    total, pre, bias, a, dpre, sums, row, column, F: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr
):
    """Store WIDTH columns of dpre, of the activation and of the sum of dpre's rows."""
    columns = column + tl.arange(0, WIDTH)
    # in the layout of `total`: left to itself, the compiler evaluates GELU in two, twice the instructions. Where total
    # is not finite, a is lost with all the gradients.
    before = pre.load([row, column]).to(tl.float32) + bias_of(bias, columns, F) + 0.0 * total
    value, slope = gelu_and_slope(before, EXACT)
    total *= slope
    dpre.store([row, column], total.to(dpre.dtype))
    if a is not None:
        a.store([row, column], value.to(a.dtype))
    if sums is not None:
        tl.store(sums + columns, tl.sum(total, 0), mask=columns < F)


@triton.jit(do_not_specialize=["rows"])
def down_gradient_kernel(
    dy,
    w,
    pre,
    bias,
    a,
    dpre,
    sums,
    rows,
    C: tl.constexpr,
    F: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
):
    """dpre = (dy w) · GELU'(pre + bias) and a = GELU(pre + bias): dy (rows, C), w (C, F). Programs are persistent.

    sums: (tiles of rows, F) float32, each tile's sum of dpre's rows. a and sums may be None; a may be pre.
    """
    PIECE: tl.constexpr = BLOCK // SPLIT
    across = tl.cdiv(F, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0), flatten=FLAT):
        row = tile // across * ROWS
        column = tile % across * BLOCK
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in tl.range(0, C, DEPTH, num_stages=STAGES):
            total = tl.dot(dy.load([row, k]), w.load([k, column]), total, input_precision="ieee")
        part = sums
        if sums is not None:
            part = sums + (tile // across).to(tl.int64) * F
        if SPLIT == 1:
            _finish_gradient(total, pre, bias, a, dpre, part, row, column, F, EXACT, PIECE)
        else:
            left, right = _halves(total, ROWS, BLOCK)
            if SPLIT == 2:
                _finish_gradient(left, pre, bias, a, dpre, part, row, column, F, EXACT, PIECE)
                _finish_gradient(right, pre, bias, a, dpre, part, row, column + PIECE, F, EXACT, PIECE)
            else:
                first, second = _halves(left, ROWS, BLOCK // 2)
                third, fourth = _halves(right, ROWS, BLOCK // 2)
                _finish_gradient(first, pre, bias, a, dpre, part, row, column, F, EXACT, PIECE)
                _finish_gradient(second, pre, bias, a, dpre, part, row, column + PIECE, F, EXACT, PIECE)
                _finish_gradient(third, pre, bias, a, dpre, part, row, column + 2 * PIECE, F, EXACT, PIECE)
                _finish_gradient(fourth, pre, bias, a, dpre, part, row, column + 3 * PIECE, F, EXACT, PIECE)


def constants(tile: MatmulTile) -> dict[str, Any]:
    """What a tile is to its kernel."""
    return {
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "DEPTH": tile.depth,
        "SPLIT": tile.split,
        "STAGES": tile.stages,
        "FLAT": tile.programs == 1,
    }
