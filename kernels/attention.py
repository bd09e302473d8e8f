"""Causal self-attention straight from the packed projection (Vaswani et al., 2017, section 3.2).

    forward   S = scale · Q Kᵀ,  P = softmax(S over the visible keys),  O = (P ∘ mask / keep) V
    backward  dV = (P ∘ mask / keep)ᵀ dO,  dP = (dO Vᵀ) ∘ mask / keep,  dS = P ∘ (dP − rowsum(dO ∘ O))
              dQ = scale · dS K,  dK = scale · dSᵀ Q

Query i of Tq sees key j of Tk where j ≤ i + Tk − Tq (causal: the last query sees every key) and j ≥ first_key[b, i].
A row that sees no key gives zeros.
"""

import math

from torch import Tensor

from . import checks, reference
from .backend import autocast, choose


def causal_attention(
    qkv: Tensor,
    n_head: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    scale: float | None = None,
    causal: bool = True,
    first_key: Tensor | None = None,
) -> Tensor:
    """Self-attention over a packed projection, in the layout that the next projection reads.

    Args:
        qkv: (B, T, 3C): queries, keys and values side by side, each of n_head heads of C / n_head.
        n_head: number of heads.
        dropout_p: probability of dropping an attention weight, quantised to 1/128 (see `kernels/dropout.py`).
        seed: int64, one element, on qkv's device; needed where dropout_p > 0.
        stream: which of a step's dropouts this is.
        scale: of the scores, 1 / √head_dim by default.
        causal: False for an encoder, where every position sees every other.
        first_key: (B, T) int32 or int64, optional: position (b, t) sees no key before first_key[b, t].

    Returns:
        (B, T, C) in qkv's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or the probability.
    """
    checks.floating("causal_attention", qkv=qkv)
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head) or qkv.shape[2] == 0:
        raise ValueError(
            f"causal_attention: qkv has shape {tuple(qkv.shape)}; with {n_head} heads it takes (B, T, 3C) where n_head divides C"
        )
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, n_head, width // (3 * n_head)).unbind(2)  # (B, T, H, D)
    out = attention(q, k, v, dropout_p, seed, stream, scale, causal, first_key)
    return out.reshape(batch, length, width // 3)  # (B, T, C)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    scale: float | None = None,
    causal: bool = True,
    first_key: Tensor | None = None,
) -> Tensor:
    """Attention of queries over keys and values with lengths of their own.

    Args:
        q: (B, Tq, H, D).
        k, v: (B, Tk, H, D).
        causal: bottom-right aligned, as decoding with a cache needs: the last query sees every key.
        first_key: (B, Tq) int32 or int64, optional: query (b, i) sees no key before first_key[b, i].
        dropout_p, seed, stream, scale: as in `causal_attention`.

    Returns:
        (B, Tq, H, D) in q's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or the probability.
    """
    checks.floating("attention", q=q, k=k, v=v)
    if q.dim() != 4 or 0 in q.shape[2:]:
        raise ValueError(f"attention: q has shape {tuple(q.shape)}; it takes (B, Tq, H, D)")
    if k.dim() != 4 or k.shape != (q.shape[0], k.shape[1], *q.shape[2:]):
        raise ValueError(
            f"attention: k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it takes (B, Tk, H, D)"
        )
    checks.shape("attention", "v", v, *k.shape)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"attention: q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; they take one"
        )
    if first_key is not None:
        checks.integers("attention", first_key=first_key)
        checks.shape("attention", "first_key", first_key, *q.shape[:2])
        checks.same_device("attention", "q", q, "first_key", first_key)
    checks.dropout("attention", dropout_p, seed, q)
    q, k, v = autocast(q), autocast(k), autocast(v)
    choose("attention", q)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return reference.attention(q, k, v, dropout_p, seed, stream, scale, causal, first_key)
