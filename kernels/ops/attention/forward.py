"""The forward kernel of attention; `operator.py` has the formulas, the bytes it moves and the launcher."""

from ..._triton import tl, triton
from ...dropout_mask import dropout_key, keep_scores
from .tile_io import _first_keys, _head, _key_range, _load, _place, _store, _visible

_NOT_SPECIALISED = ["n_head", "q_len", "k_len", "padded", "group", "stream", "threshold"]


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    n_head,
    q_len,
    k_len,
    group,
    stream,
    threshold,
    scale,
    keep_scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out: (B, Tq, H, D) contiguous; lse: (B, H, Tq) float32, +inf for rows that see nothing.

    Softmax as it goes (Milakov and Gimelshein, 2018): `level` is the maximum so far, `total` the sum.
    """
    tiles = tl.cdiv(q_len, ROWS)
    head, turn = _place(tiles, group)
    batch, number = head // n_head, head % n_head
    begin = (tiles - 1 - turn) * ROWS  # the last rows see the most keys
    row = begin + tl.arange(0, ROWS)
    first = _first_keys(first_key, row, batch, q_len, k_len)
    low, whole, high = _key_range(begin, first, q_len, k_len, CAUSAL, ROWS, BLOCK)
    key = dropout_key(seed, stream)
    q = _head(q, batch, number, q_b, q_h)
    k = _head(k, batch, number, k_b, k_h)
    v = _head(v, batch, number, v_b, v_h)
    queries = _load(q, batch, number, begin, q_t, q_len, D, WIDTH, ROWS, True)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    level = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        stop = high if MASKED else whole
        # an encoder's masked loop has one tile at most: pipelined, its matrix instructions are serialized
        for start in tl.range(low, stop, BLOCK, num_stages=STAGES if CAUSAL or not MASKED else 1):
            column = start + tl.arange(0, BLOCK)
            keys = _load(k, batch, number, start, k_t, k_len, D, WIDTH, BLOCK, MASKED)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # (ROWS, BLOCK)
            if MASKED:
                seen = _visible(row, column, first, q_len, k_len, CAUSAL, False)
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(level, tl.max(scores, 1) * scale)
            shift = tl.where(
                higher == float("-inf"), 0.0, higher
            )  # a row that has seen nothing: not -inf - -inf
            weights = tl.exp2(scores * scale - shift[:, None])
            fade = tl.exp2(level - shift)
            total = total * fade + tl.sum(weights, 1)
            level = higher
            if key is not None:
                keep = keep_scores(key, head, row[:, None], column[None, :], threshold)
                weights = tl.where(keep, weights, 0.0)
            values = _load(v, batch, number, start, v_t, k_len, D, WIDTH, BLOCK, MASKED)
            acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        low = whole
    blind = total == 0.0  # and so is acc
    total = tl.where(blind, 1.0, total)
    acc *= (keep_scale / total)[:, None]
    out = _head(out, batch, number, q_len.to(tl.int64) * (n_head * D), D)
    _store(out, acc, begin, n_head * D, q_len, D, WIDTH, ROWS)
    lse += head.to(tl.int64) * q_len + row
    tl.store(lse, tl.where(blind, float("inf"), level + tl.log2(total)), mask=row < q_len)
