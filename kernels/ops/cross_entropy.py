"""The head and its loss: cross-entropy of a linear layer's logits, which are never all held at once.

    forward   z = x Wᵀ over the first V rows of W, the vocabulary
              lse_n = log Σ exp(z_n),  q_n = (1 − ε) onehot(target_n) + ε / V
              loss_n = lse_n − q_n · z_n + ζ lse_n²
    backward  dz_n = softmax(z_n) (1 + 2 ζ lse_n) − q_n,  dx = dz W,  dW = dzᵀ x

ε is the label smoothing (Szegedy et al., 2016; torch's definition), ζ the z-loss (Chowdhery et al., 2022, section 5).
Rows whose target is ignore_index have zero loss and gradient and do not count in the mean. The rows of W from
vocab_size on are padding: they stay out of the softmax and their gradient is zero.

The Triton path takes the rows in chunks whose logits stay within BUDGET bytes. A chunk is a library matmul in x's
dtype, one kernel that writes dz over the logits, a matmul for dx and one that adds to dW in float32. dz is rounded
unscaled, because 1 / N would push most of it below float16's range: factors are applied in float32 to dx and dW. When
gradients are wanted, "mean" and "sum" compute both in the forward, and the backward multiplies them by the incoming
gradient (dW on its way into W's `.grad`, within `matmul.gradients_in_place`); "none", where each row has its own incoming gradient, saves the log-sum-exp and computes the chunks again.

N rows of C elements of s bytes, V' rows of W, n chunks: 6 N V' C FLOPs, 8 N V' C for "none". The kernel reads and
writes the logits once in memory (2 N V' s bytes) and reads them a second time from the caches; the matmuls write
them once and read dz twice; dW's accumulator is written n times and read n - 1 times (4 (2 n - 1) V' C bytes). Memory
in addition to inputs and gradients: a chunk's logits, and W in x's dtype. At N = 65536, V' = 50304, C = 768 in bfloat16
with float32 masters that is 13 chunks of 5120 rows, 0.48 + 0.07 GiB; in the backward it is dx and dW before they are
scaled, 0.24 GiB. A chunk less saves 8 V' C bytes of dW and 2 V' C s of W, 0.46 GB here, and the chunk's logits may take as much
memory as the backward pass of the block below needs: more would raise the peak of a training step.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from .._triton import on_device_of, tl, triton
from ..backend import autocast, choose, register
from ..matmul import accumulate, leaf, own_gradient
from ..tiles import CROSS_ENTROPY, hardware, select

BUDGET = 512 * 2**20  # bytes of one chunk's logits, at most
ROWS = 128  # a chunk is a multiple of this many rows, the height of a matmul's tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # below every logit, and finite, so that no difference of two is NaN


@triton.jit
def _exp(z):
    return tl.exp2(z * LOG2E)


@triton.jit
def _load_last(logits, column, stride, V):
    """A block that reaches past the vocabulary, -inf there. stride, a multiple of 16, keeps the loads vectorised."""
    z = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
    return tl.where(column < V, z, float("-inf"))


@triton.jit
def _online(z, m, d):
    """Update each thread's maximum m and sum d of exp(z - m) with its next columns (Milakov and Gimelshein, 2018)."""
    m_new = tl.maximum(m, tl.max(z, 1))
    return m_new, d * _exp(m - m_new) + tl.sum(_exp(z - m_new[:, None]), 1)


@triton.jit(do_not_specialize=["targets", "loss", "lse", "V", "ignore_index"])
def cross_entropy_kernel(
    logits, targets, loss, lse, stride, V, ignore_index, epsilon, zeta, GRAD: tl.constexpr, tile: tl.constexpr
):
    """Loss and log-sum-exp of a row, then, with GRAD, dz over the row's logits, in place.

    One program takes one row of the logits (rows, stride), in blocks. Offsets are 64 bits wide, and nothing is
    specialised on a size except whether it is a multiple of 16. loss: None if the log-sum-exp is given and only the
    gradient is wanted. epsilon: None without label smoothing.
    """
    BLOCK: tl.constexpr = tile.block
    K: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # a thread reads 16 bytes at once
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK // K)[:, None] * K + tl.arange(0, K)[None, :]
    whole = V // BLOCK * BLOCK  # blocks up to here need no mask
    if target == ignore_index:
        if loss is not None:
            tl.store(loss + row, 0.0)
            tl.store(lse + row, 0.0)
        if GRAD:
            zeros = tl.zeros((BLOCK // K, K), tl.float32)
            for start in range(0, stride, BLOCK):
                tl.store(logits + start + lane, zeros, mask=start + lane < stride)
    else:
        # A target out of range turns loss and gradient into NaN.
        known = (target >= 0) & (target < V)
        z_target = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
        if loss is not None:
            m = tl.full((BLOCK // K,), LOWEST, tl.float32)
            d = tl.zeros((BLOCK // K,), tl.float32)
            # Summed along K after the loop: Triton 3.6 cannot compile that sum within it.
            z_sum = tl.zeros((BLOCK // K, K), tl.float32)
            for start in range(0, whole, BLOCK):
                z = tl.load(logits + start + lane).to(tl.float32)
                m, d = _online(z, m, d)
                if epsilon is not None:
                    z_sum += z
            if whole < V:
                z = _load_last(logits, whole + lane, stride, V)
                m, d = _online(z, m, d)
                if epsilon is not None:
                    z_sum += tl.where(whole + lane < V, z, 0.0)
            m_row = tl.max(m, 0)
            # A plain product would be contracted into the first addition of the sum across lanes: fma(d, e, other), where
            # the lane that holds `other` contracts its own product, and the two differ in the last bit.
            d_row = tl.sum(tl.fma(d, _exp(m - m_row), 0.0), 0)
            log_d = tl.log2(d_row) * LN2
            m_row = tl.where(known, m_row, float("nan"))
            lse_row = m_row + log_d
            # In this order a small loss with large logits is exact.
            loss_row = (m_row - z_target) + log_d + zeta * lse_row * lse_row
            if epsilon is not None:
                loss_row += epsilon * (z_target - tl.sum(tl.sum(z_sum, 1), 0) / V)
            tl.store(loss + row, loss_row)
            tl.store(lse + row, lse_row)
        else:
            lse_row = tl.load(lse + row)
            m_row = lse_row
            d_row = 1.0
        if GRAD:
            smooth = 0.0
            share = 1.0
            if epsilon is not None:
                smooth = epsilon / V
                share = 1.0 - epsilon
            z_grad = 2.0 * zeta * lse_row
            scale = (1.0 + z_grad) / d_row
            tl.debug_barrier()  # every thread has read z_target
            # Backwards: the columns read last are the likeliest to be in a cache still.
            for back in range(0, stride - whole, BLOCK):
                column = whole + back + lane
                dz = _exp(_load_last(logits, column, stride, V) - m_row) * scale - smooth
                tl.store(logits + column, tl.where(column < V, dz, 0.0), mask=column < stride)
            for back in range(BLOCK, whole + BLOCK, BLOCK):
                at = logits + (whole - back) + lane
                z = tl.load(at).to(tl.float32)
                tl.store(at, _exp(z - m_row) * scale - smooth)
            tl.debug_barrier()  # the target's column is written again
            # 1 is subtracted from a probability near 1 before anything is added.
            p = _exp(z_target - m_row) / d_row
            tl.store(logits + target, p - share + (p * z_grad - smooth), mask=known)


class Options(NamedTuple):
    vocab_size: int
    ignore_index: int
    label_smoothing: float
    z_loss: float


_OPTIONS = "SymInt vocab_size, int ignore_index, float label_smoothing, float z_loss"


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows per chunk: as few chunks as the budget allows, all but the last of one size."""
    most = max(BUDGET // row_bytes // ROWS, 1) * ROWS
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // (chunks * ROWS)), 1) * ROWS


def _chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: Options,
    lse: Tensor | None = None,
    row_factors: Tensor | None = None,
    want_dx: bool = False,
    want_dweight: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (N,) and log-sum-exp (N,), unless lse is given; dx in x's dtype and dweight in float32 where wanted.

    row_factors: (N, 1), multiplies the rows of x in dweight = dzᵀ x.
    """
    rows, columns = x.shape[0], len(weight)
    x, weight, targets = x.contiguous(), weight.to(x.dtype).contiguous(), targets.contiguous()
    loss = None if lse is not None else x.new_empty(rows, dtype=torch.float32)
    lse = x.new_empty(rows, dtype=torch.float32) if lse is None else lse
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    # The first chunk overwrites it.
    dweight = (x.new_empty if rows else x.new_zeros)(weight.shape if want_dweight else 0, dtype=torch.float32)
    stride = -(-columns // 64) * 64  # rows begin at multiples of 128 bytes
    step = chunk_rows(rows, stride * x.itemsize)
    buffer = x.new_empty(min(step, rows), stride)
    tile = select(CROSS_ENTROPY, hardware(x.device).architecture, stride)
    V, ignore_index, label_smoothing, z_loss = options
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        logits = buffer[: here.stop - start, :columns]
        torch.mm(x[here], weight.mT, out=logits)
        with on_device_of(x):
            cross_entropy_kernel[(len(logits),)](
                *(buffer, targets[here], None if loss is None else loss[here], lse[here]),
                *(stride, V, ignore_index, label_smoothing or None, z_loss),
                GRAD=want_dx or want_dweight,
                tile=tile,
                num_warps=tile.warps,
            )
        if want_dx:
            torch.mm(logits, weight, out=dx[here])
        if want_dweight:
            read = x[here] if row_factors is None else _scaled(x[here], row_factors[here], x.dtype)
            accumulate(dweight, logits.mT, read, first=start == 0)
    return x.new_empty(0, dtype=torch.float32) if loss is None else loss, lse, dx, dweight


def _scaled(t: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """t · factors in `dtype`, multiplied in float32 without a float32 copy of t. factors: float32, not 0-dimensional."""
    return torch.mul(t, factors, out=torch.empty_like(t, dtype=dtype))


def _launch_loss(x: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss, lse, _, _ = _chunks(x, weight, targets, _checked(targets, Options(*options)))
    return loss, lse


def _checked(targets: Tensor, options: Options) -> Options:
    if not targets.is_cuda:
        _check_range(targets, options)
    return options


def _check_range(targets: Tensor, options: Options) -> None:
    wrong = targets[(targets != options.ignore_index) & ((targets < 0) | (targets >= options.vocab_size))]
    if len(wrong):
        raise ValueError(
            f"linear_cross_entropy: target {wrong[0].item()} is outside [0, {options.vocab_size})"
        )


def _launch_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *given, want_dx, want_dweight = rest
    options = Options(*given)
    # dx is multiplied by the incoming gradients row by row. dW takes them through the rows of x, scaled to at most 1,
    # which float16 can hold.
    factors = dloss.masked_fill(targets == options.ignore_index, 0.0)[:, None]  # (N, 1)
    tiny = factors.new_full((1, 1), torch.finfo(torch.float32).tiny)
    largest = torch.cat((factors.abs(), tiny)).amax(0)
    _, _, dx, dweight = _chunks(x, weight, targets, options, lse, factors / largest, want_dx, want_dweight)
    if want_dx:
        torch.mul(dx, factors, out=dx)
    return dx, _scaled(dweight, largest, weight.dtype)


_backward = register(
    f"linear_cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor lse, {_OPTIONS}, "
    "bool want_dx, bool want_dweight) -> (Tensor, Tensor)",
    _launch_backward,
    lambda dloss, x, weight, targets, lse, v, i, e, z, want_dx, want_dweight: (
        x.new_empty(x.shape if want_dx else 0),
        weight.new_empty(weight.shape if want_dweight else 0),
    ),
)


def _save_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, targets, output[1])


def _loss_gradients(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 7
    wanted = ctx.needs_input_grad[:2]
    gradients = _backward(dloss, *ctx.saved_tensors, *ctx.options, *wanted)
    chosen = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return *chosen, *(None,) * 5


_loss = register(
    f"linear_cross_entropy_loss(Tensor x, Tensor weight, Tensor targets, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_loss,
    lambda x, *_: (_fake_rows(x), _fake_rows(x)),
    _save_loss,
    _loss_gradients,
)


def _fake_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _reduced(loss: Tensor, targets: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """The sum or mean of the rows' losses, and the factor of each row's gradients."""
    total = loss.sum()
    if not mean:
        return total, total.new_ones(())
    count = (targets != ignore_index).sum()
    # Without any target the mean is NaN and, as in torch, the gradient zero.
    return total / count, count.clamp(min=1).float().reciprocal()


def _launch_with_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the factor of the gradients, and the gradients without it: dx in x's dtype, dweight in float32."""
    *given, mean, want_dx, want_dweight = rest
    options = _checked(targets, Options(*given))
    wanted = {"want_dx": want_dx, "want_dweight": want_dweight}
    loss, _, dx, dweight = _chunks(x, weight, targets, options, **wanted)
    return *_reduced(loss, targets, options.ignore_index, mean), dx, dweight


def _fake_with_gradients(
    x, weight, targets, v, i, e, z, mean, want_dx, want_dweight
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if want_dx else 0),
        x.new_empty(weight.shape if want_dweight else 0, dtype=torch.float32),
    )


def _save_gradients(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.dtypes, ctx.leaf = (inputs[0].dtype, inputs[1].dtype), leaf(inputs[1])
    ctx.wanted = inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    scale, dx, dweight = ctx.saved_tensors
    (x_dtype, weight_dtype), (want_dx, want_dweight) = ctx.dtypes, ctx.wanted
    factor = (dloss * scale).view(1)
    total = own_gradient(ctx.leaf)
    if want_dweight and total is not None:
        total.addcmul_(dweight, factor)
        want_dweight = False
    return (
        _scaled(dx, factor, x_dtype) if want_dx else None,
        _scaled(dweight, factor, weight_dtype) if want_dweight else None,
        *(None,) * 8,
    )


_loss_with_gradients = register(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, {_OPTIONS}, bool mean, bool want_dx, "
    "bool want_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_with_gradients,
    _fake_with_gradients,
    _save_gradients,
    _scale_gradients,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy, in nats, of the logits x @ weight[:vocab_size].T against targets.

    Args:
        x: (..., C) activations, such as (B, T, C).
        weight: (V, C), any strides; cast to x's dtype.
        targets: (...) int32 or int64, one per row of x, each in [0, vocab_size) or ignore_index.
        vocab_size: how many rows of the weight are real, all by default.
        ignore_index: a target that does not count.
        reduction: "mean" over the targets that count, "sum", or "none".
        label_smoothing: in [0, 1], the share of each target that is spread evenly over the vocabulary (Szegedy et
            al., 2016, section 7).
        z_loss: coefficient, at least 0, of (log Σ exp(logits))², added to the loss of each row that counts (Chowdhery
            et al., 2022, section 5).

    Returns:
        float32 (float64 for float64 inputs): a scalar, or the targets' shape for "none". The mean over no targets is
        NaN.

    Raises:
        TypeError, ValueError: unsupported dtype, shape, device or value of an argument. A target out of range raises
            on a CPU; on a GPU its loss is NaN.
    """
    name = "linear_cross_entropy"
    checks.floating(name, x=x, weight=weight)
    checks.integers(name, targets=targets)
    checks.same_device(name, "x", x, "targets", targets)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (..., C) and (V, C)"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: targets {tuple(targets.shape)} and x {tuple(x.shape)} must be (...) and (..., C)"
        )
    vocab_size = len(weight) if vocab_size is None else vocab_size
    checks.numbers(name, int, vocab_size=vocab_size, ignore_index=ignore_index)
    checks.numbers(name, float, label_smoothing=label_smoothing, z_loss=z_loss)
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"{name}: vocab_size is {vocab_size}; the weight has {len(weight)} rows")
    checks.one_of(name, "reduction", reduction, "mean", "sum", "none")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing {label_smoothing} is outside [0, 1]")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss {z_loss} is not a finite coefficient of at least 0")
    shape, x, targets = targets.shape, autocast(x).reshape(-1, x.shape[-1]), targets.reshape(-1)
    options = Options(vocab_size, ignore_index, label_smoothing, z_loss)
    loss = _flat(x, weight, targets, options, reduction)
    return loss.view(shape) if reduction == "none" else loss


def _flat(x: Tensor, weight: Tensor, targets: Tensor, options: Options, reduction: str) -> Tensor:
    """`linear_cross_entropy` of x (N, C) and targets (N,)."""
    if choose("linear_cross_entropy", x, weight).backend == "torch":
        try:
            vocab_size, ignore_index, *rest = options
            return reference.linear_cross_entropy(
                x, weight, targets, vocab_size, ignore_index, reduction, *rest
            )
        except IndexError:
            _check_range(targets, options)
            raise
    mean = reduction == "mean"
    wanted = x.requires_grad, weight.requires_grad
    if reduction != "none" and torch.is_grad_enabled() and any(wanted):
        return _loss_with_gradients(x, weight, targets, *options, mean, *wanted)[0]
    loss = _loss(x, weight, targets, *options)[0]
    return loss if reduction == "none" else _reduced(loss, targets, options.ignore_index, mean)[0]
