"""The backward of attention in one pass: five matmuls where two passes take seven, and the same bits every time.

    prepare_kernel     delta = rowsum(dO ∘ O), and zeros in the float32 accumulator of dq
    one_pass_kernel    a program owns a head: it walks over the keys, and for each key tile over the queries
    finish_kernel      dq from its accumulator

dk and dv of a key tile stay in registers. dq is accumulated over the keys in memory, by the copy engine where there is
one, in 4 bytes an element that only the head's own program adds to; at T = 1024 the accumulators of all heads in flight
stay in an H200's cache. Since a program takes a whole head, `operator.py` chooses this where heads are many and short.
"""

from ..._triton import tl, triton
from ...dropout_mask import dropout_key
from .key_gradients import key_gradients
from .tile_io import (
    NOT_SPECIALISED,
    head_of,
    head_of_contiguous,
    load,
    rows_of,
    store,
    store_stats,
    wait_for_adds,
)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def prepare_kernel(o, do, lse, stats, dq_acc, do_strides, n_head, q_len, padded, keep_prob, meta):
    """The stats of `query_kernel`, and zeros in dq_acc: (B · H, padded, D). One program a query tile of a head."""
    tiles = padded // meta.BLOCK_M
    bh, start_m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * meta.BLOCK_M
    batch, head = bh // n_head, bh % n_head
    offs_m = start_m + tl.arange(0, meta.BLOCK_M)
    o_head = head_of_contiguous(o, n_head, batch, head, q_len, meta)
    do_head = head_of(do, do_strides, batch, head, q_len)
    o_tile = load(o_head, start_m, meta.BLOCK_M, True, meta)
    do_tile = load(do_head, start_m, meta.BLOCK_M, True, meta)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1) * keep_prob
    store_stats(stats, lse, delta, bh, offs_m, q_len, padded)
    zeros = tl.zeros((meta.BLOCK_M, meta.BLOCK_D), tl.float32)
    store(rows_of(dq_acc, bh, padded, meta), zeros, start_m, meta.BLOCK_M, meta)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def one_pass_kernel(
    q, k, v, do, stats, dq_acc, dk, dv, first_key, seed, q_strides, k_strides, v_strides, do_strides, dk_strides,
    n_head, q_len, k_len, padded, stream, threshold, scale, keep_scale, grad_scale, meta,
):  # fmt: skip
    """dk and dv of one head, and its unscaled dq, added to zeros in dq_acc: float32 (B · H, padded, D).

    The program walks over all keys of the head. No other program adds to this head's dq, and what one key tile adds is
    in memory before the next one adds to it, so every sum has one order.
    """
    bh = tl.program_id(0)
    batch, head = bh // n_head, bh % n_head
    key = dropout_key(seed, stream)
    q_head = head_of(q, q_strides, batch, head, q_len)
    k_head = head_of(k, k_strides, batch, head, k_len)
    v_head = head_of(v, v_strides, batch, head, k_len)
    do_head = head_of(do, do_strides, batch, head, q_len)
    dk_head = head_of(dk, dk_strides, batch, head, k_len)
    dv_head = head_of(dv, dk_strides, batch, head, k_len)
    for start_n in tl.range(0, k_len, meta.BLOCK_N, num_stages=1):
        dk_tile, dv_tile = key_gradients(
            q_head, k_head, v_head, do_head, stats, dq_acc, first_key, key, bh, start_n, padded, threshold, scale, meta
        )  # fmt: skip
        store(dk_head, dk_tile * grad_scale, start_n, meta.BLOCK_N, meta)
        store(dv_head, dv_tile * keep_scale, start_n, meta.BLOCK_N, meta)
        wait_for_adds(dq_acc)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def finish_kernel(dq_acc, dq, dq_strides, n_head, q_len, padded, grad_scale, meta):
    """dq = grad_scale · dq_acc. One program a query tile of a head."""
    tiles = padded // meta.BLOCK_M
    bh, start_m = tl.program_id(0) // tiles, tl.program_id(0) % tiles * meta.BLOCK_M
    dq_tile = load(rows_of(dq_acc, bh, padded, meta), start_m, meta.BLOCK_M, False, meta) * grad_scale
    dq_head = head_of(dq, dq_strides, bh // n_head, bh % n_head, q_len)
    store(dq_head, dq_tile, start_m, meta.BLOCK_M, meta)
