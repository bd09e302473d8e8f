"""The forward kernel of attention. `operator.py` has the mathematics, the bytes it moves and the launcher."""

from ..._triton import tl, triton
from ...dropout_mask import dropout_key, keep_signs
from .masking import first_keys, key_range, visible
from .tile_io import NOT_SPECIALISED, as_operand, drop, head_of, head_of_contiguous, load, place, store


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def forward_kernel(
    q, k, v, o, lse, first_key, seed, q_strides, k_strides, v_strides,
    n_head, q_len, k_len, group, stream, threshold, scale, keep_scale, meta,
):  # fmt: skip
    """O and the log-sum-exp of one query tile. The program walks over the key tiles.

    o: (B, Tq, H, D) contiguous. lse: (B, H, Tq) float32 in units of log2, +inf for queries that see no key.
    Online softmax (Milakov and Gimelshein, 2018): m_i is the running maximum of S, l_i the running sum of P.
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
    q_tile = load(q_head, start_m, meta.BLOCK_M, True, meta)
    acc = tl.zeros((meta.BLOCK_M, meta.BLOCK_D), tl.float32)
    m_i = tl.full((meta.BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((meta.BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        stop = high if MASKED else whole
        # an encoder's masked loop has one tile at most: pipelined, its matrix instructions are serialized
        for start_n in tl.range(
            low, stop, meta.BLOCK_N, num_stages=meta.STAGES if meta.CAUSAL or not MASKED else 1
        ):
            offs_n = start_n + columns
            k_tile = load(k_head, start_n, meta.BLOCK_N, MASKED, meta)
            qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            if MASKED:
                mask = visible(offs_m, offs_n, first, q_len, k_len, meta.CAUSAL, False)
                qk = tl.where(mask, qk, float("-inf"))
            m_ij = tl.maximum(m_i, tl.max(qk, 1) * scale)
            # for a query that has seen no key yet, -inf - -inf would be NaN
            shift = tl.where(m_ij == float("-inf"), 0.0, m_ij)
            p = tl.exp2(qk * scale - shift[:, None])
            alpha = tl.exp2(m_i - shift)
            l_i = l_i * alpha + tl.sum(p, 1)
            m_i = m_ij
            if key is not None:
                keep = keep_signs(
                    key, bh, start_m, rows[:, None], start_n, columns[None, :], threshold, meta.PTX
                )
                p = drop(as_operand(p, k_tile.dtype, meta), keep, meta)
            v_tile = load(v_head, start_n, meta.BLOCK_N, MASKED, meta)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
        low = whole
    blind = l_i == 0.0  # and so is acc
    l_i = tl.where(blind, 1.0, l_i)
    acc *= (keep_scale / l_i)[:, None]
    store(head_of_contiguous(o, n_head, batch, head, q_len, meta), acc, start_m, meta.BLOCK_M, meta)
    lse += bh.to(tl.int64) * q_len + offs_m
    tl.store(lse, tl.where(blind, float("inf"), m_i + tl.log2(l_i)), mask=offs_m < q_len)
