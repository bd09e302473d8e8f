"""Causal self-attention straight from the packed projection (Vaswani et al., 2017, section 3.2).

    forward   S = scale · Q Kᵀ,  P = softmax(S over the visible keys),  O = (P ∘ mask / keep) V
    backward  dV = (P ∘ mask / keep)ᵀ dO,  dP = (dO Vᵀ) ∘ mask / keep,  dS = P ∘ (dP − rowsum(dO ∘ O))
              dQ = scale · dS K,  dK = scale · dSᵀ Q

Query i of Tq sees key j of Tk where j ≤ i + Tk − Tq (causal: the last query sees every key) and j ≥ first_key[b, i].
A row that sees no key gives zeros.

The (Tq, Tk) matrices never leave the chip (Dao et al., 2022). Saved: the inputs, O and the log-sum-exp of every row of S,
one float32; P = exp(S − log-sum-exp) is computed again. The kernels read heads by stride out of the packed projection and
write (B, T, C), and dQ, dK, dV side by side into one packed gradient: nothing is transposed or copied.

For A = B · H · D, s bytes an element and n visible pairs of a query and a key over all heads (B · H · T² / 2 causal):

    forward    2 matmuls, 4 n D FLOPs                           (Tq + 2 Tk + Tq) A s bytes: q, k, v in, O out
    backward   7 matmuls, 14 n D FLOPs: dQ 3, dK and dV 4       twice q, k, v and dO in, O in, dQ, dK, dV out

and 4 B · H · Tq bytes of float32 for the log-sum-exp and, within the backward, for rowsum(dO ∘ O). Keys and values are
read once for every tile of queries, all but the first time from the cache. Five matmuls are enough for a backward in one
pass, which needs atomic additions or an order among programs; two passes need neither and give the same bits every time.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from ._triton import on_device_of, triton
from .attention_kernels import forward_kernel, key_kernel, query_kernel
from .backend import autocast, choose, register
from .dropout import ATTENTION_LEVELS, attention_threshold, int32_bits, keep_scale
from .tiles import (
    ATTENTION_FORWARD,
    ATTENTION_KEY,
    ATTENTION_QUERY,
    Tile,
    attention_tile,
    hardware,
    next_power_of_two,
)

WIDEST = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}  # head_dim that the kernels take
_CACHED = 1 << 24  # bytes of keys and values that programs share at a time: a third of an H200's cache
_LONGEST_STRIDE = 1 << 23  # between rows: 128 of them stay within 32 bits


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor | None,
    p: float,
    seed: Tensor | None,
    stream: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """O: (B, Tq, H, D) and the log-sum-exp in units of log2: (B, H, Tq) float32, +inf where a row sees nothing."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    batch, q_len, n_head, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((batch, n_head, q_len), dtype=torch.float32)
    kept = keep_scale(attention_threshold(p) / ATTENTION_LEVELS)
    _launch(
        forward_kernel,
        ATTENTION_FORWARD,
        (q, k, v),
        (q, k, v, out, lse, first_key, seed),
        (*_strides(q), *_strides(k), *_strides(v)),
        (p, stream, scale, causal),
        (kept,),
    )
    return out, lse


def _launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    first_key: Tensor | None,
    p: float,
    seed: Tensor | None,
    stream: int,
    scale: float,
    causal: bool,
) -> None:
    """Writes dq, dk and dv. The heads of each lie side by side, and dk and dv have the same strides."""
    q, k, v, dout, out = _readable(q), _readable(k), _readable(v), _readable(dout), out.contiguous()
    delta = torch.empty_like(lse)
    strides = [stride for t in (q, k, v, dout) for stride in _strides(t)]
    options = (p, stream, scale, causal)
    dropped = attention_threshold(p) / ATTENTION_LEVELS
    kept = keep_scale(dropped)
    _launch(
        query_kernel,
        ATTENTION_QUERY,
        (q, k, v),
        (q, k, v, out, dout, lse, delta, dq, first_key, seed),
        (*strides, *dq.stride()[:2]),
        options,
        (1.0 - dropped, kept * scale),
    )
    _launch(
        key_kernel,
        ATTENTION_KEY,
        (q, k, v),
        (q, k, v, dout, lse, delta, dk, dv, first_key, seed),
        (*strides, *dk.stride()[:2]),
        options,
        (kept, kept * scale),
    )


def _launch(
    kernel: Any,
    table: dict[str, tuple[Tile, ...]],
    qkv: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    options: tuple[float, int, float, bool],
    factors: tuple[float, ...],
) -> None:
    """One program a tile of queries, or of keys in key_kernel, and head."""
    q, k, _ = qkv
    batch, q_len, n_head, head_dim = q.shape
    k_len = k.shape[1]
    p, stream, scale, causal = options
    tile = attention_tile(table, hardware(q.device).architecture, head_dim, q.dtype == torch.float32)
    tiles = triton.cdiv(k_len, tile.block) if kernel is key_kernel else triton.cdiv(q_len, tile.rows)
    heads = batch * n_head
    if tiles * heads == 0:
        return
    shared = 2 * (q_len if kernel is key_kernel else k_len) * head_dim * q.element_size()
    with on_device_of(q):
        kernel[(tiles * heads,)](
            *tensors,
            *strides,
            n_head,
            q_len,
            k_len,
            min(max(_CACHED // max(shared, 1), 1), heads),
            int32_bits(stream),
            attention_threshold(p),
            scale * math.log2(math.e),
            *factors,
            D=head_dim,
            WIDTH=max(16, next_power_of_two(head_dim)),
            CAUSAL=causal,
            ROWS=tile.rows,
            BLOCK=tile.block,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )


def _readable(x: Tensor) -> Tensor:
    """x as (B, T, H, D) with adjacent elements of a head; a copy where it has them apart."""
    return x if x.stride(3) == 1 and x.stride(1) < _LONGEST_STRIDE else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, position and head."""
    return x.stride()[:3]


def _heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a packed (B, T, 3C): q, k and v as (B, T, H, D)."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, n_head, width // (3 * n_head)).unbind(2)
    return q, k, v


_OPTIONS = "Tensor? first_key, float p, Tensor? seed, int stream, float scale, bool causal"


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _fake_backward(dout, q, k, v)
    _launch_backward(dout, q, k, v, out, lse, dq, dk, dv, *options)
    return dq, dk, dv


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention_backward = register(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, first_key, ctx.p, seed, ctx.stream, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, first_key, seed)


def _gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    *tensors, first_key, seed = ctx.saved_tensors
    options = (first_key, ctx.p, seed, ctx.stream, ctx.scale, ctx.causal)
    return *_attention_backward(dout, *tensors, *options), *(None,) * 6


_attention = register(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_forward,
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:1] + q.shape[2:0:-1], dtype=torch.float32)),
    _save,
    _gradients,
)


def _launch_packed(qkv: Tensor, n_head: int, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _launch_forward(*_heads(qkv, n_head), *options)
    return out.flatten(2), lse


def _fake_packed(qkv: Tensor, n_head: int, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    lse = qkv.new_empty((batch, n_head, length), dtype=torch.float32)
    return qkv.new_empty((batch, length, width // 3)), lse


def _packed_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, *options: Any
) -> Tensor:
    dqkv = _fake_packed_backward(dout, qkv)
    dout, out = dout.unflatten(2, (n_head, -1)), out.unflatten(2, (n_head, -1))
    _launch_backward(dout, *_heads(qkv, n_head), out, lse, *_heads(dqkv, n_head), *options)
    return dqkv


def _fake_packed_backward(dout: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


_packed_attention_backward = register(
    f"packed_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_head, {_OPTIONS}) -> Tensor",
    _packed_backward,
    _fake_packed_backward,
)


def _save_packed(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.n_head, first_key, ctx.p, seed, ctx.stream, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(qkv, *output, first_key, seed)


def _packed_gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    *tensors, first_key, seed = ctx.saved_tensors
    options = (first_key, ctx.p, seed, ctx.stream, ctx.scale, ctx.causal)
    return _packed_attention_backward(dout, *tensors, ctx.n_head, *options), *(None,) * 7


_packed_attention = register(
    f"packed_attention(Tensor qkv, int n_head, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_packed,
    _fake_packed,
    _save_packed,
    _packed_gradients,
)


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
    q, k, v = _heads(qkv, n_head)
    if scale is None or scale > 0.0:
        _check_options("causal_attention", q, dropout_p, seed, first_key)
        qkv = autocast(qkv)
        if _choose(q.shape[3], qkv) == "triton":
            seed = seed if dropout_p > 0.0 else None
            scale = scale or q.shape[3] ** -0.5
            options = (_first_key(first_key, k), dropout_p, seed, stream, scale, causal)
            return _packed_attention(qkv, n_head, *options)[0]
    return attention(q, k, v, dropout_p, seed, stream, scale, causal, first_key).flatten(2)  # (B, T, C)


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
    _check_options("attention", q, dropout_p, seed, first_key)
    q, k, v = autocast(q), autocast(k), autocast(v)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _choose(q.shape[3], q) == "torch":
        return reference.attention(q, k, v, dropout_p, seed, stream, scale, causal, first_key)
    if scale <= 0.0:  # the kernels look for the largest score before they scale
        q, scale = (-q, -scale) if scale else (0.0 * q, 1.0)
    seed = seed if dropout_p > 0.0 else None
    return _attention(q, k, v, _first_key(first_key, k), dropout_p, seed, stream, scale, causal)[0]


def _check_options(
    operator: str, q: Tensor, dropout_p: float, seed: Tensor | None, first_key: Tensor | None
) -> None:
    if first_key is not None:
        checks.integers(operator, first_key=first_key)
        checks.shape(operator, "first_key", first_key, *q.shape[:2])
        checks.same_device(operator, "the input", q, "first_key", first_key)
    checks.dropout(operator, dropout_p, seed, q)


def _choose(head_dim: int, x: Tensor) -> str:
    widest = WIDEST.get(x.dtype, head_dim)
    wide = f"{str(x.dtype)[6:]} heads are {head_dim} wide, and the kernel takes up to {widest}"
    return choose("attention", x, obstacle=wide if head_dim > widest else None).backend


def _first_key(first_key: Tensor | None, k: Tensor) -> Tensor | None:
    """As the kernels read it: int32, whatever number an int64 held."""
    return None if first_key is None else first_key.clamp(0, k.shape[1]).to(torch.int32).contiguous()
