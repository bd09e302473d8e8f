"""The backward of attention in one pass: five matmuls where two passes take seven, and the same bits every time.

    prepare_kernel     rowsum(dout ∘ out) of every row, and zeros in the float32 sums of dq
    one_pass_kernel    a program owns a head: it walks the keys, and for each tile of them the queries
    finish_kernel      dq out of its sums

dk and dv of a tile of keys stay in registers. dq is summed over the keys in memory, by the copy engine where there is
one, into 4 bytes an element that only the head's own program adds to; at T = 1024 the sums of all the heads in work
stay in an H200's cache. A program a head: `attention.py` chooses this where heads are many and not long.
"""

from ..._triton import tl, triton
from ...dropout_mask import dropout_key
from .backward import _NOT_SPECIALISED, _key_gradients
from .tile_io import _finish_adding, _head, _load, _store, _store_stats


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def prepare_kernel(
    out,
    dout,
    lse,
    stats,
    total,
    dout_b,
    dout_t,
    dout_h,
    n_head,
    q_len,
    padded,
    keep_share,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The stats of `query_kernel`, and zeros in total: (B · H, padded, D). One program a tile of ROWS rows of a head."""
    tiles = padded // ROWS
    head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    batch, number = head // n_head, head % n_head
    row = start + tl.arange(0, ROWS)
    out = _head(out, batch, number, q_len.to(tl.int64) * (n_head * D), D)
    dout = _head(dout, batch, number, dout_b, dout_h)
    result = _load(out, batch, number, start, n_head * D, q_len, D, WIDTH, ROWS, True)
    slope = _load(dout, batch, number, start, dout_t, q_len, D, WIDTH, ROWS, True)
    sums = tl.sum(result.to(tl.float32) * slope.to(tl.float32), 1) * keep_share
    _store_stats(stats, lse, sums, head, row, q_len, padded)
    total += head.to(tl.int64) * padded * D
    _store(total, tl.zeros((ROWS, WIDTH), tl.float32), start, D, padded, D, WIDTH, ROWS)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def one_pass_kernel(
    q,
    k,
    v,
    dout,
    stats,
    total,
    dk,
    dv,
    first_key,
    seed,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    dout_b,
    dout_t,
    dout_h,
    dk_b,
    dk_t,
    n_head,
    q_len,
    k_len,
    padded,
    stream,
    threshold,
    scale,
    keep_scale,
    grad_scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv, and dq but for its factor, added to zeros in total: float32 (heads, padded, D).

    A program walks all the keys of one head. Nobody else adds to that head's sums, and what one tile of keys adds is in
    memory before the next one adds to it, so every sum has one order.
    """
    head = tl.program_id(0)
    batch, number = head // n_head, head % n_head
    key = dropout_key(seed, stream)
    q = _head(q, batch, number, q_b, q_h)
    k = _head(k, batch, number, k_b, k_h)
    v = _head(v, batch, number, v_b, v_h)
    dout = _head(dout, batch, number, dout_b, dout_h)
    dk = _head(dk, batch, number, dk_b, D)
    dv = _head(dv, batch, number, dk_b, D)
    for begin in tl.range(0, k_len, BLOCK, num_stages=1):
        dkeys, dvalues = _key_gradients(
            q,
            k,
            v,
            dout,
            stats,
            total,
            first_key,
            key,
            head,
            batch,
            number,
            begin,
            q_t,
            k_t,
            v_t,
            dout_t,
            q_len,
            k_len,
            padded,
            threshold,
            scale,
            D,
            WIDTH,
            CAUSAL,
            ROWS,
            BLOCK,
            STAGES,
        )
        _store(dk, dkeys * grad_scale, begin, dk_t, k_len, D, WIDTH, BLOCK)
        _store(dv, dvalues * keep_scale, begin, dk_t, k_len, D, WIDTH, BLOCK)
        _finish_adding(total)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def finish_kernel(
    total,
    dq,
    dq_b,
    dq_t,
    n_head,
    q_len,
    padded,
    grad_scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dq, with the strides of (B, Tq, H, D), out of the sums (B · H, padded, D). One program a tile of a head."""
    tiles = padded // ROWS
    head, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    total += head.to(tl.int64) * padded * D
    value = _load(total, 0, 0, start, D, padded, D, WIDTH, ROWS, False) * grad_scale
    dq = _head(dq, head // n_head, head % n_head, dq_b, D)
    _store(dq, value, start, dq_t, q_len, D, WIDTH, ROWS)
