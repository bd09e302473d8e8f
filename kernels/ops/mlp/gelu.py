"""Elementwise GELU kernels, run between the library's matmuls: the activation, and the pre-activation's gradient.

`operator.py` has the formulas, the bytes they move and the launchers.

One exponential and one reciprocal square root per element give both GELU and its derivative: two instructions of the
special-function unit (MUFU) in the tanh form, forward and backward. `tanh.approx` would be one, but errs by 2⁻¹¹, which
at -3 is a fifth of GELU's value, and neither the interpreter nor AMD has it. The exact form takes one in the forward,
inside erf, and two in the backward. Instructions per element of the whole kernel on sm_90, in bfloat16: 15 and 36, exact
38 and 58.
"""

import math

from ..._triton import tl, triton

# 2u = 2 √(2/π) (x + 0.044715 x³) = x (C1 + C3 x²); the second pair gives -2u · log2(e)
_C1 = tl.constexpr(2 * math.sqrt(2 / math.pi))
_C3 = tl.constexpr(0.044715 * 2 * math.sqrt(2 / math.pi))
_LOG2_C1 = tl.constexpr(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_LOG2_C3 = tl.constexpr(-0.044715 * 2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_HALF_LOG2E = tl.constexpr(-0.5 * math.log2(math.e))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_HUGE = tl.constexpr(2.0**126)
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the normal distribution at 0


@triton.jit
def gelu_and_grad(x, EXACT: tl.constexpr):
    """GELU and its derivative for float32 x. The compiler drops the one that the caller does not use."""
    square = x * x
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        grad = cdf + x * (_DENSITY * tl.exp2(square * _HALF_LOG2E))
    else:  # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
        exp = tl.exp2(x * (_LOG2_C1 + _LOG2_C3 * square))
        # The square of a reciprocal square root: two instructions, where a division takes five.
        root = tl.rsqrt(1.0 + exp)
        cdf = root * root
        # 1 - cdf would err by 19 roundings of 1 at x = 4. Where exp overflows, cdf is 0 and so is the derivative.
        rest = tl.minimum(exp, _HUGE) * cdf
        grad = cdf * (1.0 + rest * x * (_C1 + 3.0 * _C3 * square))
    return x * cdf, grad


@triton.jit
def load_bias(bias, column, F: tl.constexpr):
    """The bias of the columns, float32 (1, columns); 0 without one."""
    values = 0.0
    if bias is not None:
        values = tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit(do_not_specialize=["rows"])
def gelu_kernel(pre, bias, a, rows, F: tl.constexpr, EXACT: tl.constexpr, tile: tl.constexpr):
    """a = GELU(pre + bias), which may overwrite pre. A program takes tile.block columns of every nth tile of rows."""
    column = tl.program_id(0) * tile.block + tl.arange(0, tile.block)
    b = load_bias(bias, column, F)
    for i in tl.range(tl.program_id(1), tl.cdiv(rows, tile.rows), tl.num_programs(1)):
        row = i * tile.rows + tl.arange(0, tile.rows).to(tl.int64)
        at = row[:, None] * F + column[None, :]
        here = (row < rows)[:, None] & (column < F)[None, :]
        value, _ = gelu_and_grad(tl.load(pre + at, mask=here, other=0.0).to(tl.float32) + b, EXACT)
        tl.store(a + at, value, mask=here)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(
    pre, bias, da, a, dpre, sums, rows, F: tl.constexpr, EXACT: tl.constexpr, tile: tl.constexpr
):
    """dpre = da · GELU'(pre + bias), which may overwrite da; a = GELU(pre + bias), which may overwrite pre.

    sums: (programs along the rows, F) float32, each program's partial db. a and sums may be None.
    """
    column = tl.program_id(0) * tile.block + tl.arange(0, tile.block)
    b = load_bias(bias, column, F)
    # Reduced over rows after the loop: within it no thread waits for another.
    db = tl.full((tile.rows, tile.block), 0.0, tl.float32)
    for i in tl.range(tl.program_id(1), tl.cdiv(rows, tile.rows), tl.num_programs(1)):
        row = i * tile.rows + tl.arange(0, tile.rows).to(tl.int64)
        at = row[:, None] * F + column[None, :]
        here = (row < rows)[:, None] & (column < F)[None, :]
        dp = tl.load(da + at, mask=here, other=0.0).to(tl.float32)
        value, grad = gelu_and_grad(tl.load(pre + at, mask=here, other=0.0).to(tl.float32) + b, EXACT)
        dp *= grad
        tl.store(dpre + at, dp, mask=here)
        if a is not None:
            tl.store(a + at, value, mask=here)
        db += dp
    if sums is not None:
        sums += tl.program_id(1).to(tl.int64) * F + column
        tl.store(sums, tl.sum(db, 0), mask=column < F)
