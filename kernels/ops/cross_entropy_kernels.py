"""The Triton kernel of the head's loss; `cross_entropy.py` has the formulas, the bytes it moves and the launcher.

One program takes one row of a chunk's logits, in blocks. Offsets are 64 bits wide, and nothing is specialised on a
size except whether it is a multiple of 16.
"""

from .._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # below every logit, and finite like its differences, which would else be NaN


@triton.jit
def _last(logits, column, stride, vocab_size):
    """A block that reaches beyond the vocabulary, -inf there. stride, a multiple of 16, lets whole vectors be loaded."""
    z = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
    return tl.where(column < vocab_size, z, float("-inf"))


@triton.jit
def _exp(z):
    return tl.exp2(z * LOG2E)


@triton.jit
def _gather(z, tops, sums):
    """Maximum and sum over exp(z - maximum) of each thread's columns, with the next K of them."""
    above = tl.maximum(tops, tl.max(z, 1))
    return above, sums * _exp(tops - above) + tl.sum(_exp(z - above[:, None]), 1)


@triton.jit(do_not_specialize=["targets", "loss", "lse", "vocab_size", "ignore_index"])
def cross_entropy_kernel(
    logits,
    targets,
    loss,
    lse,
    stride,
    vocab_size,
    ignore_index,
    smoothing,
    z_loss,
    GRADIENT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and log-sum-exp of a row, then, with GRADIENT, the loss's gradient over the row's logits, in place.

    logits: (rows, stride). loss: None where the log-sum-exp is given and only the gradient is wanted. K: how many
    columns a thread reads at once, 16 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK // K)[:, None] * K + tl.arange(0, K)[None, :]
    whole = vocab_size // BLOCK * BLOCK  # up to here no block needs a mask
    if target == ignore_index:
        if loss is not None:
            tl.store(loss + row, 0.0)
            tl.store(lse + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK // K, K), tl.float32)
            for start in range(0, stride, BLOCK):
                tl.store(logits + start + lane, zeros, mask=start + lane < stride)
    else:
        # a target out of range makes NaN of the loss and the gradient
        known = (target >= 0) & (target < vocab_size)
        z_target = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
        if loss is not None:
            tops = tl.full((BLOCK // K,), LOWEST, tl.float32)
            sums = tl.zeros((BLOCK // K,), tl.float32)
            levels = tl.zeros(
                (BLOCK // K, K), tl.float32
            )  # Triton 3.6 cannot compile a sum along K in the loop
            for start in range(0, whole, BLOCK):
                z = tl.load(logits + start + lane).to(tl.float32)
                tops, sums = _gather(z, tops, sums)
                if SMOOTHING:
                    levels += z
            if whole < vocab_size:
                z = _last(logits, whole + lane, stride, vocab_size)
                tops, sums = _gather(z, tops, sums)
                if SMOOTHING:
                    levels += tl.where(whole + lane < vocab_size, z, 0.0)
            top = tl.max(tops, 0)
            total = tl.sum(sums * _exp(tops - top), 0)
            log_sum = tl.log2(total) * LN2
            top = tl.where(known, top, float("nan"))
            row_lse = top + log_sum
            # in this order a small loss beside large logits is exact
            value = (top - z_target) + log_sum + z_loss * row_lse * row_lse
            if SMOOTHING:
                value += smoothing * (z_target - tl.sum(tl.sum(levels, 1), 0) / vocab_size)
            tl.store(loss + row, value)
            tl.store(lse + row, row_lse)
        else:
            top = tl.load(lse + row)
            total = 1.0
            row_lse = top
        if GRADIENT:
            even = smoothing / vocab_size
            added = 2.0 * z_loss * row_lse
            scale = (1.0 + added) / total
            tl.debug_barrier()  # every thread has read z_target
            # the last columns first: what was read last is the likeliest to be in a cache still
            for back in range(0, stride - whole, BLOCK):
                column = whole + back + lane
                z = _last(logits, column, stride, vocab_size)
                grad = _exp(z - top) * scale - even
                grad = tl.where(column < vocab_size, grad, 0.0)
                tl.store(logits + column, grad, mask=column < stride)
            for back in range(BLOCK, whole + BLOCK, BLOCK):
                at = logits + (whole - back) + lane
                z = tl.load(at).to(tl.float32)
                tl.store(at, _exp(z - top) * scale - even)
            tl.debug_barrier()  # the target's own column is written over
            # what is near 1 is taken from 1 before anything is added
            share = _exp(z_target - top) / total
            tl.store(logits + target, share - (1.0 - smoothing) + (share * added - even), mask=known)
