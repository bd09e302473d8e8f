"""Every operator in plain PyTorch, a few lines each: what a CPU runs, and what every kernel is tested against.

Statistics and element-wise arithmetic are in float32 (float64 for float64 inputs), matmuls in the activation's
dtype; weights are cast to the activation's dtype on the way in.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .backend import without_autocast
from .dropout_mask import (
    ATTENTION_LEVELS,
    attention_keep_mask,
    attention_threshold,
    keep_factor,
    keep_scale,
    masked,
)


def embed(
    ids: Tensor, wte: Tensor, wpe: Tensor, p: float, seed: Tensor | None, stream: int, out_dtype: torch.dtype
) -> Tensor:
    tokens, positions = F.embedding(ids, wte), wpe[: ids.shape[1]]  # (B, T, C), (T, C)
    x = tokens.add_(positions) if tokens.dtype == positions.dtype else tokens + positions
    return _cast(_dropout(x, p, seed, stream), out_dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    wide = _wide(x)
    bias = None if bias is None else _cast(bias, wide.dtype)
    y = F.layer_norm(wide, wide.shape[-1:], _cast(weight, wide.dtype), bias, eps)
    return _cast(y, out_dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    p: float,
    seed: Tensor | None,
    stream: int,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    branch = _wide(x) if x_bias is None else _wide(x) + x_bias
    residual_out = _cast(residual + _dropout(branch, p, seed, stream), residual.dtype)
    return layer_norm(residual_out, weight, bias, eps, x.dtype), residual_out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, _cast(weight, x.dtype), None if bias is None else _cast(bias, x.dtype))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float,
    seed: Tensor | None,
    stream: int,
    scale: float,
    causal: bool,
    first_key: Tensor | None,
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    q_len, k_len = q.shape[2], k.shape[2]
    square = (
        causal and q_len == k_len and q_len > 1 and scale > 0.0
    )  # torch's kernel gives NaN at other scales
    if p == 0.0 and first_key is None and (square or not causal or q_len == 1):
        # torch's own kernel computes the same without the (T, T) matrix: 3 times faster on two cores at T = 256
        return F.scaled_dot_product_attention(q, k, v, is_causal=square, scale=scale).transpose(1, 2)

    # scores are float32, as in every fused kernel: rounded to bfloat16, large ones cost the output 6 times the error
    with without_autocast(q):
        scores = (_wide(q) * scale) @ _wide(k).mT  # (B, H, Tq, Tk)
    hidden = ~_visible(q_len, k_len, causal, first_key, q.device)
    weights = torch.softmax(scores.masked_fill_(hidden, -math.inf), -1)
    if first_key is not None or q_len > k_len:
        weights = weights.masked_fill(hidden, 0.0)  # a row that sees nothing: 0, not NaN
    if p > 0.0:
        assert seed is not None  # checked by the public function
        keep = attention_keep_mask(seed, stream, q.shape[0] * q.shape[1], q_len, k_len, p)
        scale = keep_scale(attention_threshold(p) / ATTENTION_LEVELS)
        weights = weights * keep_factor(keep, scale, weights.dtype).view(weights.shape)
    return (_cast(weights, v.dtype) @ v).transpose(1, 2)


def _visible(q_len: int, k_len: int, causal: bool, first_key: Tensor | None, device: torch.device) -> Tensor:
    """Which keys a query sees, bool and broadcastable to (B, H, Tq, Tk): the last query sees up to the last key."""
    key = torch.arange(k_len, device=device)
    last = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    visible = key <= last if causal else torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    return visible if first_key is None else visible & (key >= first_key[:, None, :, None])


def gelu_mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    approximate: str,
    recompute: bool,
) -> Tensor:
    if recompute:
        return checkpoint(
            _mlp, x, w_fc, b_fc, w_proj, b_proj, approximate, use_reentrant=False, preserve_rng_state=False
        )
    return _mlp(x, w_fc, b_fc, w_proj, b_proj, approximate)


def _mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, approximate: str
) -> Tensor:
    pre = linear(x, w_fc, b_fc)  # (..., 4C)
    if approximate == "tanh" and torch.is_grad_enabled():
        activation = TanhGELU.apply(pre)
    else:
        activation = F.gelu(pre, approximate=approximate)
    return linear(activation, w_proj, b_proj)


_GELU_C1 = 2 * math.sqrt(2 / math.pi)  # constants of the module: Dynamo does not take a Function's attributes
_GELU_C3 = 0.044715 * _GELU_C1


class TanhGELU(torch.autograd.Function):
    """0.5 x (1 + tanh u) with u = √(2/π) (x + 0.044715 x³), written as x · σ(2u) (Hendrycks and Gimpel, 2016).

    ATen's own takes 1.6 times as long on a CPU, forward and backward together (768 × 512, float32).
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = _wide(x)
        gate = (wide * wide).mul_(_GELU_C3).add_(_GELU_C1).mul_(wide).sigmoid_()
        ctx.save_for_backward(x, gate)
        return (wide * gate).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        wide = _wide(x)
        slope = (wide * wide).mul_(3 * _GELU_C3).add_(_GELU_C1).mul_(wide)  # x · d(2u)/dx
        slope.addcmul_(slope, gate, value=-1).add_(1).mul_(
            gate
        )  # in place: a new tensor costs more than its arithmetic
        return slope.mul_(grad).to(x.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    logits = _wide(linear(x, weight[:vocab_size], None))  # (N, V)
    targets = targets.long()
    loss = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss == 0.0:
        return loss
    counts = targets != ignore_index
    squares = torch.logsumexp(logits, 1).square().masked_fill(~counts, 0.0)  # (N,)
    if reduction != "none":
        squares = squares.sum() / (counts.sum() if reduction == "mean" else 1)
    return loss + z_loss * squares


def _dropout(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    if p == 0.0:
        return x
    assert seed is not None  # checked by the public function
    return masked(x, p, seed, stream)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes 0.7 µs where there is nothing to do: 60 of them are 5 % of a token of a small model."""
    return x if x.dtype == dtype else x.to(dtype)
