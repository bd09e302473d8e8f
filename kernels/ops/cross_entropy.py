"""The head and its loss: cross-entropy of a linear layer's logits, which are never all held at once.

    forward   z = x Wᵀ over the first V rows of W, the vocabulary
              lse_n = log Σ exp(z_n),  q_n = (1 − ε) onehot(target_n) + ε / V
              loss_n = lse_n − q_n · z_n + ζ lse_n²
    backward  dz_n = softmax(z_n) (1 + 2 ζ lse_n) − q_n,  dx = dz W,  dW = dzᵀ x

ε is the label smoothing (Szegedy et al., 2016; torch's definition), ζ the z-loss (Chowdhery et al., 2022, section 5).
Rows whose target is ignore_index have loss and gradient zero and do not count in the mean. The rows of W from
vocab_size on are padding: they stay out of the softmax and their gradient is zero.

The Triton side takes the rows in chunks whose logits stay within BUDGET bytes. A chunk is a matmul of the library in
x's dtype, one kernel that writes dz over the logits, a matmul for dx and one that adds to dW in float32. dz is rounded
unscaled, as 1 / N would push most of it below float16's range: factors are applied in float32 to dx and dW. With the
gradients wanted, "mean" and "sum" make both in the forward, and the backward multiplies them by the incoming gradient;
"none", where each row has an incoming gradient of its own, saves the log-sum-exp and computes the chunks again.

N rows of C elements of s bytes, V' rows of W, n chunks: 6 N V' C FLOPs, 8 N V' C for "none". The kernel reads and
writes the logits once in memory (2 N V' s bytes) and reads them a second time from the caches; the matmuls write
them once and read dz twice; dW's accumulator is written n times and read n - 1 times (4 (2 n - 1) V' C bytes). Memory
beside inputs and gradients: a chunk's logits and W in x's dtype. At N = 65536, V' = 50304, C = 768 in bfloat16 under
float32 masters that is 16 chunks of 4096 rows, 0.38 + 0.07 GiB; in the backward dx and dW before they are scaled,
0.24 GiB, instead.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from .._triton import on_device_of
from ..backend import autocast, choose, register
from ..matmul import accumulate
from ..tiles import CROSS_ENTROPY, hardware, select
from .cross_entropy_kernels import cross_entropy_kernel

BUDGET = 400 * 2**20  # bytes that the logits of one chunk may take
ROWS = 128  # a chunk is a multiple of this many rows, the height of a matmul's tile


def chunk_rows(rows: int, row_bytes: int) -> int:
    """Rows a chunk: as few chunks as the budget allows, of one size but for the last."""
    most = max(BUDGET // row_bytes // ROWS, 1) * ROWS
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // (chunks * ROWS)), 1) * ROWS


def _chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor | None,
    row_factors: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (N,) and log-sum-exp (N,) where lse is not given; dx in x's dtype and dweight in float32 where wanted.

    row_factors: (N, 1), multiplies the rows of x in dweight = dzᵀ x.
    """
    rows, columns = x.shape[0], len(weight)
    x, weight, targets = x.contiguous(), weight.to(x.dtype).contiguous(), targets.contiguous()
    loss = None if lse is not None else x.new_empty(rows, dtype=torch.float32)
    lse = x.new_empty(rows, dtype=torch.float32) if lse is None else lse
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    # the first chunk writes over it
    dweight = (x.new_empty if rows else x.new_zeros)(weight.shape if want_dweight else 0, dtype=torch.float32)
    stride = -(-columns // 64) * 64  # rows begin at multiples of 128 bytes
    step = chunk_rows(rows, stride * x.itemsize)
    buffer = x.new_empty(min(step, rows), stride)
    tile = select(CROSS_ENTROPY, hardware(x.device).architecture, stride)
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        logits = buffer[: here.stop - start, :columns]
        torch.mm(x[here], weight.mT, out=logits)
        with on_device_of(x):
            cross_entropy_kernel[(len(logits),)](
                buffer,
                targets[here],
                None if loss is None else loss[here],
                lse[here],
                stride,
                vocab_size,
                ignore_index,
                label_smoothing,
                z_loss,
                GRADIENT=want_dx or want_dweight,
                SMOOTHING=label_smoothing > 0.0,
                K=16 // x.itemsize,
                BLOCK=tile.block,
                num_warps=tile.warps,
            )
        if want_dx:
            torch.mm(logits, weight, out=dx[here])
        if want_dweight:
            read = x[here] if row_factors is None else _scaled(x[here], row_factors[here], x.dtype)
            accumulate(dweight, logits.mT, read, first=start == 0)
    return x.new_empty(0, dtype=torch.float32) if loss is None else loss, lse, dx, dweight


def _scaled(t: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """t · factors in `dtype`, multiplied in float32, which a copy of t never takes. factors: float32, not 0-dimensional."""
    return torch.mul(t, factors, out=torch.empty_like(t, dtype=dtype))


def _launch_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    if not targets.is_cuda:
        _check_range(targets, vocab_size, ignore_index)
    options = (vocab_size, ignore_index, label_smoothing, z_loss, False, False)
    return _chunks(x, weight, targets, None, None, *options)[:2]


def _check_range(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
    if len(wrong):
        raise ValueError(f"linear_cross_entropy: target {wrong[0].item()} is outside [0, {vocab_size})")


def _launch_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    options = (vocab_size, ignore_index, label_smoothing, z_loss, want_dx, want_dweight)
    # dx takes the incoming gradients row by row; in dW the rows of x do, at most 1 there, which float16 can hold
    factors = dloss.masked_fill(targets == ignore_index, 0.0)[:, None]  # (N, 1)
    tiny = factors.new_full((1, 1), torch.finfo(torch.float32).tiny)
    largest = torch.cat((factors.abs(), tiny)).amax(0)
    _, _, dx, dweight = _chunks(x, weight, targets, lse, factors / largest, *options)
    if want_dx:
        torch.mul(dx, factors, out=dx)
    return dx, _scaled(dweight, largest, weight.dtype)


_OPTIONS = "SymInt vocab_size, int ignore_index, float label_smoothing, float z_loss"

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
    return *_chosen(gradients, wanted), *(None,) * 5


def _chosen(gradients: tuple[Tensor, Tensor], wanted: tuple[bool, bool]) -> list[Tensor | None]:
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


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
    """The sum or mean of the rows' losses, and what the gradients of a row must be multiplied by."""
    total = loss.sum()
    if not mean:
        return total, total.new_ones(())
    count = (targets != ignore_index).sum()
    return total / count, count.clamp(
        min=1
    ).float().reciprocal()  # of no target: NaN and, as torch's, gradient zero


def _launch_with_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    mean: bool,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the factor of the gradients, and they without it: dx in x's dtype, dweight in float32."""
    if not targets.is_cuda:
        _check_range(targets, vocab_size, ignore_index)
    options = (vocab_size, ignore_index, label_smoothing, z_loss, want_dx, want_dweight)
    loss, _, dx, dweight = _chunks(x, weight, targets, None, None, *options)
    return *_reduced(loss, targets, ignore_index, mean), dx, dweight


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
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.wanted = inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    scale, *gradients = ctx.saved_tensors
    factor = (dloss * scale).view(1)
    scaled = [
        _scaled(gradient, factor, dtype) if want else None
        for gradient, dtype, want in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *scaled, *(None,) * 8


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
    """Cross-entropy in nats of the logits x @ weight[:vocab_size].T against targets.

    Args:
        x: (N, C) activations.
        weight: (V, C), of any strides; cast to x's dtype.
        targets: (N,) int32 or int64, each in [0, vocab_size) or ignore_index.
        vocab_size: how many rows of the weight are real, all by default.
        ignore_index: a target that does not count.
        reduction: "mean" over the targets that count, "sum", or "none".
        label_smoothing: in [0, 1], the share of each target that is spread evenly over the vocabulary (Szegedy et
            al., 2016, section 7).
        z_loss: coefficient, at least 0, of (log Σ exp(logits))², added to the loss of each row that counts (Chowdhery
            et al., 2022, section 5).

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (N,) for "none". The mean of no target is NaN.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or its range. A target out of range is named on a
            CPU; on a GPU it makes NaN of its loss.
    """
    name = "linear_cross_entropy"
    checks.floating(name, x=x, weight=weight)
    checks.integers(name, targets=targets)
    checks.same_device(name, "x", x, "targets", targets)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (N, C) and (V, C)"
        )
    checks.shape(name, "targets", targets, x.shape[0])
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"{name}: vocab_size is {vocab_size}; the weight has {len(weight)} rows")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}; it takes 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing {label_smoothing} is outside [0, 1]")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss {z_loss} is not a finite coefficient of at least 0")
    x = autocast(x)
    arguments = (x, weight, targets, vocab_size, ignore_index, label_smoothing, z_loss)
    if choose(name, x, weight).backend == "torch":
        try:
            return reference.linear_cross_entropy(*arguments, reduction)
        except IndexError:
            _check_range(targets, vocab_size, ignore_index)
            raise
    mean = reduction == "mean"
    wanted = x.requires_grad, weight.requires_grad
    if reduction != "none" and torch.is_grad_enabled() and any(wanted):
        return _loss_with_gradients(*arguments, mean, *wanted)[0]
    loss = _loss(*arguments)[0]
    return loss if reduction == "none" else _reduced(loss, targets, ignore_index, mean)[0]
