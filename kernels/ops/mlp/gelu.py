"""GELU beside the library's matmuls: a pass that makes the activation, and one that makes the pre-activation's gradient.

`operator.py` has the formulas, the bytes they move and the launchers.

One exponential and one reciprocal root an element serve value and slope: two instructions of the special-function
unit (MUFU) in the tanh form, forward and backward. `tanh.approx` would be one, but errs by 2⁻¹¹: at -3 that is a fifth
of GELU's value, and it is not to be had in the interpreter or on AMD. The exact form takes one in the forward, inside erf,
and two in the backward. Instructions an element over the whole kernel on sm_90, in bfloat16: 15 and 36, exact 38 and 58.
"""

import math

from ..._triton import tl, triton

# of 2u = 2 √(2/π) (x + 0.044715 x³) = x (c1 + c3 x²), the second pair in units of log2
_C1 = tl.constexpr(2 * math.sqrt(2 / math.pi))
_C3 = tl.constexpr(0.044715 * 2 * math.sqrt(2 / math.pi))
_LOG2_C1 = tl.constexpr(-2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_LOG2_C3 = tl.constexpr(-0.044715 * 2 * math.sqrt(2 / math.pi) * math.log2(math.e))
_HALF_LOG2E = tl.constexpr(-0.5 * math.log2(math.e))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_HUGE = tl.constexpr(2.0**126)
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))  # of the normal distribution at 0


@triton.jit
def gelu_and_slope(x, EXACT: tl.constexpr):
    """GELU and its slope, of float32 x. A caller that uses one of them pays for one."""
    square = x * x
    if EXACT:
        share = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        slope = share + x * (_DENSITY * tl.exp2(square * _HALF_LOG2E))
    else:  # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
        power = tl.exp2(x * (_LOG2_C1 + _LOG2_C3 * square))
        # the square of a reciprocal root: two instructions, where a division takes five
        root = tl.rsqrt(1.0 + power)
        share = root * root
        # 1 - share would err by 19 roundings of 1 at x = 4. Where the power overflows, share is 0 and so is the slope
        rest = tl.minimum(power, _HUGE) * share
        slope = share * (1.0 + rest * x * (_C1 + 3.0 * _C3 * square))
    return x * share, slope


@triton.jit
def bias_of(bias, column, F: tl.constexpr):
    """The columns' bias as a row of float32; 0 without one."""
    values = 0.0
    if bias is not None:
        values = tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit(do_not_specialize=["rows"])
def gelu_kernel(
    pre,
    bias,
    a,
    rows,
    F: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a = GELU(pre + bias), which may be written over pre. A program takes BLOCK columns of every nth tile of rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = bias_of(bias, column, F)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * F + column[None, :]
        here = (row < rows)[:, None] & (column < F)[None, :]
        value, _ = gelu_and_slope(tl.load(pre + at, mask=here, other=0.0).to(tl.float32) + b, EXACT)
        tl.store(a + at, value, mask=here)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(
    pre,
    bias,
    da,
    a,
    dpre,
    sums,
    rows,
    F: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dpre = da · GELU'(pre + bias), which may be written over da; a = GELU(pre + bias), which may be over pre.

    sums: (programs along the rows, F) float32, what each of them has seen of dpre. a and sums may be None.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = bias_of(bias, column, F)
    # summed over rows only at the end: until then no thread waits for another
    seen = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * F + column[None, :]
        here = (row < rows)[:, None] & (column < F)[None, :]
        grad = tl.load(da + at, mask=here, other=0.0).to(tl.float32)
        value, slope = gelu_and_slope(tl.load(pre + at, mask=here, other=0.0).to(tl.float32) + b, EXACT)
        grad *= slope
        tl.store(dpre + at, grad, mask=here)
        if a is not None:
            tl.store(a + at, value, mask=here)
        seen += grad
    if sums is not None:
        sums += tl.program_id(1).to(tl.int64) * F + column
        tl.store(sums, tl.sum(seen, 0), mask=column < F)
