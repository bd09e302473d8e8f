"""The backward kernels of attention; `operator.py` has the formulas, what they cost and the launchers.

Three passes over tiles of the score matrix, none with atomics, so the same inputs give the same bits:

    forward_kernel     a program owns queries and walks the keys: output and log-sum-exp
    query_kernel       the same walk backward: dq, and rowsum(dout ∘ out) for the pass after it
    key_kernel         a program owns keys and values and walks the queries: dk, dv

Tiles that every row sees whole run in a loop without masks, of scores and of loads; those on the diagonal and at ragged
ends in a second one. Scores are in units of log2, as exp2 is what the hardware has. Tile offsets are 64 bits wide.
"""

from ..._triton import tl, triton
from ...dropout_mask import dropout_key, keep_scores
from .forward import _NOT_SPECIALISED
from .tile_io import (
    _add,
    _first_keys,
    _head,
    _key_range,
    _load,
    _load_stats,
    _place,
    _query_range,
    _store,
    _store_stats,
    _visible,
)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def query_kernel(
    q,
    k,
    v,
    out,
    dout,
    lse,
    stats,
    dq,
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
    dq_b,
    dq_t,
    n_head,
    q_len,
    k_len,
    padded,
    group,
    stream,
    threshold,
    scale,
    keep_share,
    grad_scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq, and the stats of every row: (B · H, 2, padded) float32, the log-sum-exp and keep_share · rowsum(dout ∘ out).

    Dropout's factor 1 / keep_share is left out of every element and comes back in grad_scale = scale / keep_share.
    """
    tiles = tl.cdiv(q_len, ROWS)
    head, turn = _place(tiles, group)
    batch, number = head // n_head, head % n_head
    begin = (tiles - 1 - turn) * ROWS
    row = begin + tl.arange(0, ROWS)
    first = _first_keys(first_key, row, batch, q_len, k_len)
    low, whole, high = _key_range(begin, first, q_len, k_len, CAUSAL, ROWS, BLOCK)
    key = dropout_key(seed, stream)
    q = _head(q, batch, number, q_b, q_h)
    k = _head(k, batch, number, k_b, k_h)
    v = _head(v, batch, number, v_b, v_h)
    out = _head(out, batch, number, q_len.to(tl.int64) * (n_head * D), D)
    dout = _head(dout, batch, number, dout_b, dout_h)
    slope = _load(dout, batch, number, begin, dout_t, q_len, D, WIDTH, ROWS, True)
    result = _load(out, batch, number, begin, n_head * D, q_len, D, WIDTH, ROWS, True)
    sums = tl.sum(result.to(tl.float32) * slope.to(tl.float32), 1) * keep_share
    level = _store_stats(stats, lse, sums, head, row, q_len, padded)
    queries = _load(q, batch, number, begin, q_t, q_len, D, WIDTH, ROWS, True)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        stop = high if MASKED else whole
        # an encoder's masked loop has one tile at most: pipelined, its matrix instructions are serialized
        for start in tl.range(low, stop, BLOCK, num_stages=STAGES if CAUSAL or not MASKED else 1):
            column = start + tl.arange(0, BLOCK)
            keys = _load(k, batch, number, start, k_t, k_len, D, WIDTH, BLOCK, MASKED)
            values = _load(v, batch, number, start, v_t, k_len, D, WIDTH, BLOCK, MASKED)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # (ROWS, BLOCK)
            weights = tl.exp2(scores * scale - level[:, None])
            if MASKED:
                seen = _visible(row, column, first, q_len, k_len, CAUSAL, False)
                weights = tl.where(seen, weights, 0.0)
            dweights = tl.dot(slope, tl.trans(values), input_precision="ieee")
            if key is not None:
                keep = keep_scores(key, head, row[:, None], column[None, :], threshold)
                dweights = tl.where(keep, dweights, 0.0)
            dscores = weights * (dweights - sums[:, None])
            acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision="ieee")
        low = whole
    _store(_head(dq, batch, number, dq_b, D), acc * grad_scale, begin, dq_t, q_len, D, WIDTH, ROWS)


@triton.jit
def _key_gradients(
    q,
    k,
    v,
    dout,
    stats,
    dq,
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
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk and dv of one tile of keys, but for their factors; its part of dq is added to dq, where that is not None.

    Scores are transposed here, (BLOCK, ROWS), so that they multiply from registers.
    """
    column = begin + tl.arange(0, BLOCK)
    keys = _load(k, batch, number, begin, k_t, k_len, D, WIDTH, BLOCK, True)
    values = _load(v, batch, number, begin, v_t, k_len, D, WIDTH, BLOCK, True)
    # Tiles of queries from low on: `some` that see a part of these keys, `every` that see them all, and a ragged last.
    tiles = tl.cdiv(q_len, ROWS)
    tiles, low, some, every = _query_range(begin, tiles, q_len, k_len, first_key, batch, CAUSAL, ROWS, BLOCK)
    dkeys = tl.zeros((BLOCK, WIDTH), tl.float32)
    dvalues = tl.zeros((BLOCK, WIDTH), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        for index in tl.range(0, tiles - low - every if MASKED else every, num_stages=STAGES):
            if MASKED:
                start = (low + index + tl.where(index < some, 0, every)) * ROWS
            else:
                start = (low + some + index) * ROWS
            row = start + tl.arange(0, ROWS)
            queries = _load(q, batch, number, start, q_t, q_len, D, WIDTH, ROWS, MASKED)
            slope = _load(dout, batch, number, start, dout_t, q_len, D, WIDTH, ROWS, MASKED)
            level = _load_stats(stats, 2 * head, start, padded, ROWS)
            sums = _load_stats(stats, 2 * head + 1, start, padded, ROWS)
            scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
            weights = tl.exp2(scores * scale - level[None, :])
            if MASKED:
                first = _first_keys(first_key, row, batch, q_len, k_len)
                seen = _visible(row, column, first, q_len, k_len, CAUSAL, True)
                weights = tl.where(seen, weights, 0.0)
            dweights = tl.dot(values, tl.trans(slope), input_precision="ieee")
            kept = weights
            if key is not None:
                keep = keep_scores(key, head, row[None, :], column[:, None], threshold)
                kept = tl.where(keep, weights, 0.0)
                dweights = tl.where(keep, dweights, 0.0)
            dvalues = tl.dot(kept.to(slope.dtype), slope, dvalues, input_precision="ieee")
            dscores = (weights * (dweights - sums[None, :])).to(queries.dtype)
            dkeys = tl.dot(dscores, queries, dkeys, input_precision="ieee")
            if dq is not None:
                part = tl.dot(tl.trans(dscores), keys, input_precision="ieee")
                _add(dq, head, start, padded, part, D, WIDTH, ROWS)
    return dkeys, dvalues


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def key_kernel(
    q,
    k,
    v,
    dout,
    stats,
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
    group,
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
    """dk and dv, of one layout. Reads the stats of `query_kernel`."""
    head, turn = _place(tl.cdiv(k_len, BLOCK), group)
    batch, number = head // n_head, head % n_head
    key = dropout_key(seed, stream)
    q = _head(q, batch, number, q_b, q_h)
    k = _head(k, batch, number, k_b, k_h)
    v = _head(v, batch, number, v_b, v_h)
    dout = _head(dout, batch, number, dout_b, dout_h)
    dk = _head(dk, batch, number, dk_b, D)
    dv = _head(dv, batch, number, dk_b, D)
    begin = turn * BLOCK  # the first keys are seen by the most rows
    dkeys, dvalues = _key_gradients(
        q,
        k,
        v,
        dout,
        stats,
        None,
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
