"""The backward of attention in one pass: five matmuls where two passes take seven, and the same bits every time.

A program owns a head at a time. It writes delta = rowsum(dO ∘ O) and zeros in its own accumulator of dq, walks over the keys, for each
key tile over the queries, and at last writes dq out of the accumulator.

dk and dv of a key tile stay in registers. dq is accumulated over the keys in memory, by the copy engine where there is
one, in 4 bytes an element that only this program adds to. There are as many accumulators as programs, used again for every head:
at T = 1024 they stay in an H200's cache. Since a program takes a whole head, `operator.py` chooses this where heads are many and short.
"""

from ..._triton import tl, triton
from ...dropout_mask import dropout_key
from .key_gradients import key_gradients
from .tile_io import (
    NOT_SPECIALISED,
    head_of,
    head_of_contiguous,
    load,
    load_scratch,
    store,
    store_scratch,
    store_stats,
    wait_for_scratch,
)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def one_pass_kernel(
    q, k, v, o, do, lse, stats, dq_acc, dq, dk, dv, first_key, seed,
    q_strides, k_strides, v_strides, do_strides, dq_strides, dk_strides,
    heads, n_head, q_len, k_len, padded, stream, threshold, scale, keep_prob, keep_scale, grad_scale, meta,
):  # fmt: skip
    """dq, dk and dv. Program i takes the heads i, i + programs, ...

    stats: (2 · programs, padded) and dq_acc: (programs, padded, D), float32, are this kernel's own: rows of program i at 2i and i.
    No other program adds to them, and what one key tile adds is in memory before the next one adds to it, so every sum has one order.
    """
    program = tl.program_id(0)
    key = dropout_key(seed, stream)
    for bh in tl.range(program, heads, tl.num_programs(0), num_stages=1):
        batch, head = bh // n_head, bh % n_head
        q_head = head_of(q, q_strides, batch, head, q_len)
        k_head = head_of(k, k_strides, batch, head, k_len)
        v_head = head_of(v, v_strides, batch, head, k_len)
        o_head = head_of_contiguous(o, n_head, batch, head, q_len, meta)
        do_head = head_of(do, do_strides, batch, head, q_len)
        dq_head = head_of(dq, dq_strides, batch, head, q_len)
        dk_head = head_of(dk, dk_strides, batch, head, k_len)
        dv_head = head_of(dv, dk_strides, batch, head, k_len)
        for start_m in tl.range(0, padded, meta.BLOCK_M, num_stages=1):
            o_tile = load(o_head, start_m, meta.BLOCK_M, True, meta)
            do_tile = load(do_head, start_m, meta.BLOCK_M, True, meta)
            delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1) * keep_prob
            store_stats(stats, lse, delta, bh, program, start_m, q_len, padded, meta.BLOCK_M)
            zeros = tl.zeros((meta.BLOCK_M, meta.BLOCK_D), tl.float32)
            store_scratch(dq_acc, program, start_m, padded, zeros, meta.BLOCK_M, meta)
        wait_for_scratch(dq_acc)
        for start_n in tl.range(0, k_len, meta.BLOCK_N, num_stages=1):
            dk_tile, dv_tile = key_gradients(
                q_head, k_head, v_head, do_head, stats, dq_acc, first_key, key, bh, program, start_n, padded, threshold,
                scale, meta,
            )  # fmt: skip
            store(dk_head, dk_tile * grad_scale, start_n, meta.BLOCK_N, meta)
            store(dv_head, dv_tile * keep_scale, start_n, meta.BLOCK_N, meta)
            wait_for_scratch(dq_acc)
        for start_m in tl.range(0, padded, meta.BLOCK_M, num_stages=1):
            dq_tile = load_scratch(dq_acc, program, start_m, padded, meta.BLOCK_M, meta)
            store(dq_head, dq_tile * grad_scale, start_m, meta.BLOCK_M, meta)
        tl.debug_barrier()  # before the next head writes to its scratch memory
