"""Every operator in plain PyTorch, a few lines each: what a CPU runs and what every kernel is tested against.

Statistics and element-wise arithmetic are in float32 (float64 for float64 inputs), matmuls in the activation's dtype.
Weights are cast to the activation's dtype first. The public functions check the arguments.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from . import onednn
from .backend import without_autocast
from .dropout_mask import (
    ATTENTION_LEVELS,
    attention_keep_mask,
    attention_threshold,
    keep_mask,
    keep_scale,
)


def embed(
    ids: Tensor, wte: Tensor, wpe: Tensor, p: float, seed: Tensor | None, stream: int, out_dtype: torch.dtype
) -> Tensor:
    tokens, positions = F.embedding(ids, wte), wpe[: ids.shape[1]]  # (B, T, C), (T, C)
    x = tokens.add_(positions) if tokens.dtype == positions.dtype else tokens + positions
    return _cast(dropout(x, p, seed, stream), out_dtype)


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
    residual_out = _cast(residual + dropout(branch, p, seed, stream), residual.dtype)
    return layer_norm(residual_out, weight, bias, eps, x.dtype), residual_out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = _cast(weight, x.dtype), None if bias is None else _cast(bias, x.dtype)
    return onednn.Linear.apply(x, weight, bias) if onednn.takes(x, weight) else F.linear(x, weight, bias)


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
    square = causal and q_len == k_len and q_len > 1
    if p == 0.0 and first_key is None and (square or not causal or q_len == 1):
        # torch's kernel computes the same without the (T, T) matrix: 3 times faster on two cores at T = 256
        return F.scaled_dot_product_attention(q, k, v, is_causal=square, scale=scale).transpose(1, 2)

    # float32 scores, as in every fused kernel: rounding large ones to bfloat16 makes the output's error 6 times larger
    with without_autocast(q):
        scores = (_wide(q) * scale) @ _wide(k).mT  # (B, H, Tq, Tk)
    hidden = ~_visible(q_len, k_len, causal, first_key, q.device)
    weights = torch.softmax(scores.masked_fill_(hidden, -math.inf), -1)
    if first_key is not None or q_len > k_len:
        weights = weights.masked_fill(hidden, 0.0)  # 0, not NaN, in rows that see no key
    if p > 0.0:
        assert seed is not None  # checked by the public function
        keep = attention_keep_mask(seed, stream, q.shape[0] * q.shape[1], q_len, k_len, p)
        scale = keep_scale(attention_threshold(p) / ATTENTION_LEVELS)
        weights = weights * _keep_factor(keep, scale, weights.dtype).view(weights.shape)
    return (_cast(weights, v.dtype) @ v).transpose(1, 2)


def _visible(q_len: int, k_len: int, causal: bool, first_key: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees, bool, broadcastable to (B, H, Tq, Tk). Causal: the last query sees the last key."""
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


_GELU_C1 = 2 * math.sqrt(2 / math.pi)  # module constants: Dynamo cannot trace attributes of a Function
_GELU_C3 = 0.044715 * _GELU_C1


class TanhGELU(torch.autograd.Function):
    """0.5 x (1 + tanh u) with u = √(2/π) (x + 0.044715 x³), written as x · σ(2u) (Hendrycks and Gimpel, 2016).

    The forward computes GELU'(x) too and saves nothing else. ATen's takes 1.8 times as long on a CPU with AVX-512, 3 times
    with AVX2, forward and backward together (768 × 512, float32).
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # In place where possible: allocating a tensor costs more than its arithmetic.
        wide = _wide(x)
        z = torch.addcmul(wide.new_full((), _GELU_C1), wide, wide, value=_GELU_C3).mul_(wide)  # 2u
        gate = torch.sigmoid(z)
        y = wide * gate
        z.add_(wide, alpha=-2 / 3 * _GELU_C1)  # a third of x · d(2u)/dx = 3 · 2u - 2 C1 x
        z.addcmul_(z, gate, value=-1)  # times 1 - σ
        ctx.save_for_backward(gate.addcmul_(gate, z, value=3))  # GELU' = σ + x · d(2u)/dx · σ (1 - σ)
        return _cast(y, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return _cast(slope * dy, dy.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
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


def dropout(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    if p == 0.0:
        return x
    assert seed is not None  # checked by the public function
    columns = x.shape[-1] if x.dim() else 1
    keep = keep_mask(seed, stream, x.numel() // max(columns, 1), columns, p).view(x.shape)
    return (x * _keep_factor(keep, keep_scale(p), x.dtype)).to(x.dtype)


def _keep_factor(keep: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Mask and scale as one factor, float32 or wider.

    The backward multiplies by it once, in a sixth of the time that a bool and a number take on a CPU.
    """
    return keep.to(torch.promote_types(dtype, torch.float32)).mul_(scale)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype) without its 0.7 µs where nothing is to be done: 60 of them are 5 % of a small model's token."""
    return x if x.dtype == dtype else x.to(dtype)
