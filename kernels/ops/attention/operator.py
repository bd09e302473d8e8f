"""Causal self-attention straight from the packed projection (Vaswani et al., 2017, section 3.2).

    forward   S = scale · Q Kᵀ,  P = softmax(S over the visible keys),  O = (P ∘ mask / keep) V
    backward  dV = (P ∘ mask / keep)ᵀ dO,  dP = (dO Vᵀ) ∘ mask / keep,  delta = rowsum(dO ∘ O),  dS = P ∘ (dP − delta)
              dQ = scale · dS K,  dK = scale · dSᵀ Q

Query i of Tq sees key j of Tk where j ≤ i + Tk − Tq (causal: the last query sees every key) and j ≥ first_key[b, i].
A query that sees no key gives zeros.

The (Tq, Tk) matrices never leave the chip (Dao et al., 2022). Saved: the inputs, O and the log-sum-exp of every row of S,
one float32; the backward computes P = exp(S − log-sum-exp) again (Dao, 2023, section 3.1). The kernels read heads by
stride out of the packed projection and write (B, T, C), and dQ, dK, dV into one packed gradient: nothing is transposed
or copied.

For A = B · H · D, s bytes an element and n visible pairs of a query and a key over all heads (B · H · T² / 2 causal):

    forward      2 matmuls, 4 n D FLOPs                           (Tq + 2 Tk + Tq) A s bytes: q, k, v in, O out
    two passes   7 matmuls, 14 n D FLOPs: dQ 3, dK and dV 4       twice q, k, v and dO in, O in, dQ, dK, dV out
    one pass     5 matmuls, 10 n D FLOPs                          q, k, v, O and dO in, dQ, dK, dV out

and 4 B · H · Tq bytes of float32 for the log-sum-exp and, within the backward, twice that again for it and delta, in
whole tiles. Keys and values are read once for every query tile, all but the first time from the cache. Both backwards
are deterministic: in two passes no program adds to another's sum, in one pass a program owns a head, whose dQ it sums in
the cache, 8 n D / BLOCK_N bytes there and back, in an accumulator of 4 Tq D bytes that it uses again for its next head. One pass takes fewer matmuls and exponentials, and one hash of each
dropout word instead of two; two passes take any number of heads.

On Hopper and Blackwell tiles are loaded by tensor descriptors, elsewhere and from odd strides by pointers, by the same
kernels.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ... import checks, reference
from ..._triton import INTERPRETED, TensorDescriptor, on_device_of, tl, triton
from ...backend import autocast, choose, register
from ...dropout_mask import ATTENTION_LEVELS, attention_threshold, int32_bits, keep_scale
from ...tiles import (
    ATTENTION_DECODE,
    ATTENTION_FORWARD,
    ATTENTION_KEY,
    ATTENTION_ONE_PASS,
    ATTENTION_QUERY,
    DESCRIPTORS,
    OnePassTile,
    Tile,
    attention_row,
    attention_tile,
    hardware,
    next_power_of_two,
)
from .backward import key_kernel, query_kernel
from .backward_one_pass import one_pass_kernel
from .forward import forward_kernel
from .tile_io import Meta, Strides

WIDEST = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}  # head_dim that the kernels take
DECODED = 16  # queries that still fit in the smallest tile
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
    """O: (B, Tq, H, D) and the log-sum-exp in units of log2: (B, H, Tq) float32, +inf where a query sees no key."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    batch, q_len, n_head, _ = q.shape
    k_len = k.shape[1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((batch, n_head, q_len), dtype=torch.float32)
    tile = _tile(ATTENTION_DECODE if q_len <= DECODED else ATTENTION_FORWARD, q, k, v)
    sources = _sources((q, tile.rows), (k, tile.block), (v, tile.block))
    _run(
        forward_kernel, triton.cdiv(q_len, tile.rows) * batch * n_head, tile, q, causal,
        *sources, o, lse, first_key, seed, _strides(q), _strides(k), _strides(v),
        n_head, q_len, k_len, _group(q, k_len), *_options(p, stream, scale),
        keep_scale(attention_threshold(p) / ATTENTION_LEVELS),
    )  # fmt: skip
    return o, lse


def _launch_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
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
    """Write dq, dk and dv. The heads of each are adjacent, and dk and dv have the same strides."""
    q, k, v, do, o = _readable(q), _readable(k), _readable(v), _readable(do), o.contiguous()
    batch, q_len, n_head, head_dim = q.shape
    k_len, heads = k.shape[1], batch * n_head
    one_pass = _one_pass_tile(q, k, v, do, o)
    tile = one_pass or _tile(ATTENTION_KEY, q, k, v, do, o)
    padded = triton.cdiv(q_len, tile.rows) * tile.rows
    # a program of the one pass takes several heads, one after the other
    programs = min(heads, hardware(q.device).multiprocessors * one_pass.programs) if one_pass else heads
    stats = lse.new_empty((2 * programs, padded))
    sources = _sources((q, tile.rows), (k, tile.block), (v, tile.block), (do, tile.rows), (stats, tile.rows))
    strides = _strides(q), _strides(k), _strides(v), _strides(do)
    lengths, options = (n_head, q_len, k_len, padded), _options(p, stream, scale)
    dropped = attention_threshold(p) / ATTENTION_LEVELS
    keep_prob, kept = 1.0 - dropped, keep_scale(dropped)
    if one_pass:
        dq_acc = lse.new_empty((programs, padded, head_dim))
        # the interpreter cannot add by descriptor
        added = dq_acc if INTERPRETED else _descriptor(dq_acc, tile.rows)
        _run(
            one_pass_kernel, programs, tile, q, causal,
            *sources[:3], o, sources[3], lse, sources[4], added, dq, dk, dv, first_key, seed, *strides,
            _gradient_strides(dq), _gradient_strides(dk),
            heads, *lengths, *options, keep_prob, kept, kept * scale,
        )  # fmt: skip
        return
    query = _tile(ATTENTION_QUERY, q, k, v, do, o)
    _run(
        query_kernel, triton.cdiv(q_len, query.rows) * heads, query, q, causal,
        *_sources((q, query.rows), (k, query.block), (v, query.block), (o, query.rows), (do, query.rows)),
        lse, stats, dq, first_key, seed, *strides, _gradient_strides(dq),
        *lengths, _group(q, k_len), *options, keep_prob, kept * scale,
    )  # fmt: skip
    _run(
        key_kernel, triton.cdiv(k_len, tile.block) * heads, tile, q, causal,
        *sources, dk, dv, first_key, seed, *strides, _gradient_strides(dk),
        *lengths, _group(q, q_len), *options, kept, kept * scale,
    )  # fmt: skip


def _run(
    kernel: Any, programs: int, tile: Tile | OnePassTile, q: Tensor, causal: bool, *arguments: Any
) -> None:
    if programs == 0:
        return
    with on_device_of(q):
        meta = _meta(q.shape[3], tile, causal, hardware(q.device).architecture)
        kernel[(programs,)](*arguments, meta, num_warps=tile.warps)


@cache
def _meta(head_dim: int, tile: Tile | OnePassTile, causal: bool, architecture: str) -> Meta:
    block_d = max(16, next_power_of_two(head_dim))
    sizes = (head_dim, block_d, tile.rows, tile.block, tile.stages)
    wgmma, ptx = architecture == "sm_90", architecture.startswith("sm_")
    return Meta(*map(tl.constexpr, (*sizes, causal, wgmma, ptx)))


def _options(p: float, stream: int, scale: float) -> tuple[int, int, float]:
    """stream, threshold and scale. Scores are in units of log2, as exp2 is what the hardware has."""
    return int32_bits(stream), attention_threshold(p), scale * math.log2(math.e)


def _row_name(*read: Tensor) -> str:
    """The name of the table rows for kernels that read these tensors."""
    architecture = hardware(read[0].device).architecture
    return attention_row(architecture, read[0].dtype == torch.float32, all(map(_describable, read)))


def _tile(table: dict[str, tuple[Tile, ...]], *read: Tensor) -> Tile:
    return attention_tile(table, _row_name(*read), read[0].shape[3])


def _one_pass_tile(*read: Tensor) -> OnePassTile | None:
    """The tile of the backward in one pass where that is expected to win; None for two passes."""
    return one_pass_tile(_row_name(*read), read[0].shape, read[0].device)


def one_pass_tile(row_name: str, shape: Sequence[int], device: torch.device) -> OnePassTile | None:
    """The same for queries of this shape, (B, T, H, D).

    A program owns a head, so heads have to fill the multiprocessors, and the accumulators of dq of those in flight have
    to stay in the cache: the table row says how much of both.
    """
    batch, length, n_head, head_dim = shape
    tile = attention_tile(ATTENTION_ONE_PASS, row_name, head_dim)
    if not tile.rows:
        return None
    in_flight = hardware(device).multiprocessors * tile.programs
    heads = batch * n_head
    filled = 100 * heads >= tile.busy * triton.cdiv(heads, in_flight) * in_flight
    accumulators = min(heads, in_flight) * length * head_dim * 4
    return tile if filled and accumulators <= tile.cached << 20 else None


def _group(q: Tensor, length: int) -> int:
    batch, _, n_head, head_dim = q.shape
    return heads_in_turn(length, head_dim, q.element_size(), batch * n_head)


def heads_in_turn(length: int, head_dim: int, element: int, heads: int) -> int:
    """How many heads take turns: as many as have their keys and values, or queries and dO, of `length` in the cache.

    element: bytes.
    """
    shared = 2 * length * head_dim * element
    return min(max(_CACHED // max(shared, 1), 1), heads)


def _sources(*tensors_and_rows: tuple[Tensor, int]) -> list[Any]:
    """The tensors as the kernels load them, in tiles of so many rows: all by descriptor, or all by pointer.

    A descriptor holds an address and goes to the GPU with the launch, as a pointer does: a captured graph keeps it, and
    its memory with it.
    """
    tensors = [tensor for tensor, _ in tensors_and_rows]
    if _row_name(*tensors) not in DESCRIPTORS or not all(map(_describable, tensors)):
        return tensors
    return [_descriptor(tensor, rows) for tensor, rows in tensors_and_rows]


def _describable(x: Tensor) -> bool:
    """Whether a descriptor can hold x: its address and strides are multiples of 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def _descriptor(x: Tensor, rows: int) -> Any:
    """Tiles of so many rows: of (B, T, H, D) as (B, H, T, D), of (heads, T, D), or of (heads, T)."""
    x = x.transpose(1, 2) if x.dim() == 4 else x
    block_d = max(16, next_power_of_two(x.shape[-1]))
    block = [1, rows] if x.dim() == 2 else [*[1] * (x.dim() - 2), rows, block_d]
    return TensorDescriptor.from_tensor(x, block)


def _readable(x: Tensor) -> Tensor:
    """x: (B, T, H, D), copied where the elements of a head are not adjacent or its rows are too far apart."""
    return x if x.stride(3) == 1 and x.stride(1) < _LONGEST_STRIDE else x.contiguous()


def _strides(x: Tensor) -> Strides:
    return Strides(x.stride(0), x.stride(1), x.stride(2))


def _gradient_strides(x: Tensor) -> Strides:
    """Of dq, dk or dv, whose heads are adjacent: their distance is a compile-time constant."""
    return Strides(x.stride(0), x.stride(1), tl.constexpr(x.shape[3]))


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


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """For both operators. inputs: q, k, v or qkv, n_head; then the options."""
    *operands, first_key, ctx.p, seed, ctx.stream, ctx.scale, ctx.causal = inputs
    tensors = [x for x in operands if isinstance(x, Tensor)]
    ctx.save_for_backward(*output, first_key, seed, *tensors)


def _gradients(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    out, lse, first_key, seed, *qkv = ctx.saved_tensors
    options = (first_key, ctx.p, seed, ctx.stream, ctx.scale, ctx.causal)
    if len(qkv) == 3:
        return *_attention_backward(dout, *qkv, out, lse, *options), *(None,) * 6
    return _packed_attention_backward(dout, *qkv, out, lse, lse.shape[1], *options), *(None,) * 7


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


_packed_attention = register(
    f"packed_attention(Tensor qkv, int n_head, {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_packed,
    _fake_packed,
    _save,
    _gradients,
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
        dropout_p: probability of dropping an attention weight, quantised to 1/128 (see `kernels/dropout_mask.py`).
        seed: int64, one element, on qkv's device; needed where dropout_p > 0.
        stream: which of a step's dropouts this is.
        scale: of the scores, positive; 1 / √head_dim by default.
        causal: False for an encoder, where every position sees every other.
        first_key: (B, T) int32 or int64, optional: position (b, t) sees no key before first_key[b, t].

    Returns:
        (B, T, C) in qkv's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device, the probability, or the scale.
    """
    checks.floating("causal_attention", qkv=qkv)
    if isinstance(n_head, Tensor):
        raise TypeError(
            "causal_attention: n_head is of type Tensor; it takes an integer, after q, k and v packed into one tensor: "
            "torch.cat((q, k, v), -1) where each is (B, T, C). For q, k and v of (B, T, H, D) call attention(q, k, v)"
        )
    checks.numbers("causal_attention", int, n_head=n_head)
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head) or qkv.shape[2] == 0:
        raise ValueError(
            f"causal_attention: qkv has shape {tuple(qkv.shape)}; with {n_head} heads it takes (B, T, 3C) where n_head divides C"
        )
    q, k, v = _heads(qkv, n_head)
    _check_options("causal_attention", q, dropout_p, seed, stream, scale, causal, first_key)
    qkv = autocast(qkv)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _choose(q.shape[3], qkv) == "torch":
        q, k, v = _heads(qkv, n_head)
        out = reference.attention(q, k, v, dropout_p, seed, stream, scale, causal, first_key)
        return out.flatten(2)  # (B, T, C)
    seed = seed if dropout_p > 0.0 else None
    options = (_first_key(first_key, k), dropout_p, seed, stream, scale, causal)
    return _packed_attention(qkv, n_head, *options)[0]


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
    """Attention of queries over keys and values, each with a length of its own.

    Args:
        q: (B, Tq, H, D).
        k, v: (B, Tk, H, D).
        causal: bottom-right aligned, as decoding with a cache needs: the last query sees every key.
        first_key: (B, Tq) int32 or int64, optional: query (b, i) sees no key before first_key[b, i].
        dropout_p, seed, stream, scale: as in `causal_attention`.

    Returns:
        (B, Tq, H, D) in q's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device, the probability, or the scale.
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
    _check_options("attention", q, dropout_p, seed, stream, scale, causal, first_key)
    q, k, v = autocast(q), autocast(k), autocast(v)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _choose(q.shape[3], q) == "torch":
        return reference.attention(q, k, v, dropout_p, seed, stream, scale, causal, first_key)
    seed = seed if dropout_p > 0.0 else None
    return _attention(q, k, v, _first_key(first_key, k), dropout_p, seed, stream, scale, causal)[0]


def _check_options(
    operator: str,
    q: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    scale: float | None,
    causal: bool,
    first_key: Tensor | None,
) -> None:
    checks.numbers(operator, int, causal=causal)
    if scale is not None:
        checks.numbers(operator, float, scale=scale)
        if not scale > 0.0:
            raise ValueError(f"{operator}: scale is {scale}; it takes a positive number")
    if first_key is not None:
        checks.integers(operator, first_key=first_key)
        checks.shape(operator, "first_key", first_key, *q.shape[:2])
        checks.same_device(operator, "the input", q, "first_key", first_key)
    checks.dropout(operator, dropout_p, seed, q, stream)


def _choose(head_dim: int, x: Tensor) -> str:
    widest = WIDEST.get(x.dtype, head_dim)
    wide = f"{str(x.dtype)[6:]} heads are {head_dim} wide, and the kernel takes up to {widest}"
    return choose("attention", x, obstacle=wide if head_dim > widest else None).backend


def _first_key(first_key: Tensor | None, k: Tensor) -> Tensor | None:
    """first_key as the kernels read it: int32, whatever number an int64 held."""
    return None if first_key is None else first_key.clamp(0, k.shape[1]).to(torch.int32).contiguous()
