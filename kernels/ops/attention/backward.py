"""The backward of attention in two passes. Neither uses atomics: the same inputs give the same bits.

    query_kernel       a program owns a query tile and walks over the keys: dq, and delta for the pass after it
    key_kernel         a program owns a key tile and walks over the queries: dk, dv

`operator.py` has the mathematics, what they cost and the launchers. Scores are in units of log2, as exp2 is what the
hardware has. Tile offsets are 64 bits wide.
"""

from ..._triton import tl, triton
from ...dropout_mask import dropout_key, keep_signs
from .key_gradients import key_gradients
from .masking import first_keys, key_range, visible
from .tile_io import (
    NOT_SPECIALISED,
    drop,
    head_of,
    head_of_contiguous,
    load,
    place,
    store,
    store_stats,
)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def query_kernel(
    q, k, v, o, do, lse, stats, dq, first_key, seed, q_strides, k_strides, v_strides, do_strides, dq_strides,
    n_head, q_len, k_len, padded, group, stream, threshold, scale, keep_prob, grad_scale, meta,
):  # fmt: skip
    """dq of one query tile, and the stats of its rows: (B · H, 2, padded) float32, lse and delta.

    delta = keep_prob · rowsum(dO ∘ O). Dropout's factor 1 / keep_prob is left out of every element and comes back in
    grad_scale = scale / keep_prob.
    """
    tiles = tl.cdiv(q_len, meta.BLOCK_M)
    bh, index = place(tiles, group)
    batch, head = bh // n_head, bh % n_head
    start_m = (tiles - 1 - index) * meta.BLOCK_M  # the last queries see the most keys
    rows = tl.arange(0, meta.BLOCK_M)
    columns = tl.arange(0, meta.BLOCK_N)
    offs_m = start_m + rows
    first = first_keys(first_key, offs_m, batch, q_len, k_len)
    low, whole, high = key_range(start_m, first, q_len, k_len, meta)
    key = dropout_key(seed, stream)
    q_head = head_of(q, q_strides, batch, head, q_len)
    k_head = head_of(k, k_strides, batch, head, k_len)
    v_head = head_of(v, v_strides, batch, head, k_len)
    o_head = head_of_contiguous(o, n_head, batch, head, q_len, meta)
    do_head = head_of(do, do_strides, batch, head, q_len)
    do_tile = load(do_head, start_m, meta.BLOCK_M, True, meta)
    o_tile = load(o_head, start_m, meta.BLOCK_M, True, meta)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1) * keep_prob
    lse_i = store_stats(stats, lse, delta, bh, bh, start_m, q_len, padded, meta.BLOCK_M)
    q_tile = load(q_head, start_m, meta.BLOCK_M, True, meta)
    acc = tl.zeros((meta.BLOCK_M, meta.BLOCK_D), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        stop = high if MASKED else whole
        # an encoder's masked loop has one tile at most: pipelined, its matrix instructions are serialized
        for start_n in tl.range(
            low, stop, meta.BLOCK_N, num_stages=meta.STAGES if meta.CAUSAL or not MASKED else 1
        ):
            offs_n = start_n + columns
            k_tile = load(k_head, start_n, meta.BLOCK_N, MASKED, meta)
            v_tile = load(v_head, start_n, meta.BLOCK_N, MASKED, meta)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            p = tl.exp2(qk * scale - lse_i[:, None])
            if MASKED:
                p = tl.where(visible(offs_m, offs_n, first, q_len, k_len, meta.CAUSAL, False), p, 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            if key is not None:
                keep = keep_signs(
                    key, bh, start_m, rows[:, None], start_n, columns[None, :], threshold, meta.PTX
                )
                dp = drop(dp, keep, meta)
            ds = p * (dp - delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
        low = whole
    dq_head = head_of(dq, dq_strides, batch, head, q_len)
    store(dq_head, acc * grad_scale, start_m, meta.BLOCK_M, meta)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def key_kernel(
    q, k, v, do, stats, dk, dv, first_key, seed, q_strides, k_strides, v_strides, do_strides, dk_strides,
    n_head, q_len, k_len, padded, group, stream, threshold, scale, keep_scale, grad_scale, meta,
):  # fmt: skip
    """dk and dv of one key tile; both have dk_strides. Reads the stats that `query_kernel` wrote."""
    bh, index = place(tl.cdiv(k_len, meta.BLOCK_N), group)
    batch, head = bh // n_head, bh % n_head
    key = dropout_key(seed, stream)
    q_head = head_of(q, q_strides, batch, head, q_len)
    k_head = head_of(k, k_strides, batch, head, k_len)
    v_head = head_of(v, v_strides, batch, head, k_len)
    do_head = head_of(do, do_strides, batch, head, q_len)
    dk_head = head_of(dk, dk_strides, batch, head, k_len)
    dv_head = head_of(dv, dk_strides, batch, head, k_len)
    start_n = index * meta.BLOCK_N  # the first keys are seen by the most queries
    dk_tile, dv_tile = key_gradients(
        q_head, k_head, v_head, do_head, stats, None, first_key, key, bh, bh, start_n, padded, threshold, scale, meta
    )  # fmt: skip
    store(dk_head, dk_tile * grad_scale, start_n, meta.BLOCK_N, meta)
    store(dv_head, dv_tile * keep_scale, start_n, meta.BLOCK_N, meta)
