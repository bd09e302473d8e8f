"""The Triton kernels of attention; `attention.py` has the formulas, what they cost and the launchers.

Three passes over tiles of the score matrix, none with atomics, so the same inputs give the same bits:

    forward_kernel     a program owns queries and walks the keys: output and log-sum-exp
    query_kernel       the same walk backward: dq, and rowsum(dout ∘ out) for the pass after it
    key_kernel         a program owns keys and values and walks the queries: dk, dv

Tiles that every row sees whole run in a loop without masks, of scores and of loads; those on the diagonal and at ragged
ends in a second one. Scores are in units of log2, as exp2 is what the hardware has. Tile offsets are 64 bits wide.
"""

from typing import Any

from ._triton import tl, triton
from .dropout import dropout_key, keep_scores
from .tiles import ATTENTION_FORWARD, ATTENTION_KEY, ATTENTION_QUERY, Case, attention_tile, next_power_of_two

_NOT_SPECIALISED = ["n_head", "q_len", "k_len", "group", "stream", "threshold"]


@triton.jit
def _place(tiles, group):
    """The head of this program and which of its tiles.

    `group` heads, as many as the cache holds, take turns: all their first tiles come before all their second ones.
    """
    program = tl.program_id(0)
    first = program // (group * tiles) * group
    turns = tl.minimum(tl.num_programs(0) // tiles - first, group)
    within = program - first * tiles
    return first + within % turns, within // turns


@triton.jit
def _head(pointer, head, n_head, stride_b, stride_h):
    """Where a head of a (B, T, H, D) tensor begins."""
    return pointer + (head // n_head).to(tl.int64) * stride_b + (head % n_head).to(tl.int64) * stride_h


@triton.jit
def _at(pointer, start, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to a tile of rows from `start` on. Offsets within a tile fit in 32 bits: the launcher sees to it."""
    within = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return pointer + tl.cast(start, tl.int64) * stride + within


@triton.jit
def _inside(start, length, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Which elements of a tile exist, or None where all do. MASKED: rows may lie beyond `length`."""
    rows = (start + tl.arange(0, ROWS) < length)[:, None]
    columns = (tl.arange(0, WIDTH) < D)[None, :]
    if MASKED:
        inside = rows & columns if WIDTH != D else rows
    elif WIDTH != D:
        inside = columns
    else:
        inside = None
    return inside


@triton.jit
def _load(
    pointer,
    start,
    stride,
    length,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile (ROWS, WIDTH) of one head, zeros where nothing is."""
    at = _at(pointer, start, stride, WIDTH, ROWS)
    inside = _inside(start, length, D, WIDTH, ROWS, MASKED)
    return tl.load(at) if inside is None else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(pointer, value, start, stride, length, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    at = _at(pointer, start, stride, WIDTH, ROWS)
    tl.store(at, value.to(pointer.dtype.element_ty), mask=_inside(start, length, D, WIDTH, ROWS, True))


@triton.jit
def _visible(row, column, first, q_len, k_len, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which of the keys `column` the queries `row` see: (row, column), or (column, row) where transposed."""
    # of rows that exist, causality leaves no key beyond k_len
    end = row + (1 + k_len - q_len) if CAUSAL else row * 0 + k_len
    if first is None:
        ends, columns = _crossed(end, column, TRANSPOSED)
        visible = columns < ends
    else:  # first <= column < end in one comparison: below zero is beyond every unsigned number
        firsts, columns = _crossed(first, column, TRANSPOSED)
        counts, _ = _crossed(tl.maximum(end - first, 0), column, TRANSPOSED)
        visible = (columns - firsts).to(tl.uint32) < counts.to(tl.uint32)
    return visible


@triton.jit
def _crossed(row, column, TRANSPOSED: tl.constexpr):
    """Both as matrices that broadcast together."""
    return (row[None, :], column[:, None]) if TRANSPOSED else (row[:, None], column[None, :])


@triton.jit
def _first_keys(first_key, row, batch, q_len, k_len):
    """The first keys of the rows, or None."""
    first = None
    if first_key is not None:
        first = tl.load(first_key + batch.to(tl.int64) * q_len + row, mask=row < q_len, other=k_len)
    return first


@triton.jit
def _key_range(begin, first, q_len, k_len, CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The keys that a tile of queries sees: (low, whole, high).

    Every row sees the whole of the tiles from low to whole, and not of those from whole to high. With first keys all
    tiles count as the latter.
    """
    high = k_len
    whole = k_len // BLOCK * BLOCK
    if CAUSAL:  # // rounds towards zero: only what is not negative may be divided
        high = tl.maximum(tl.minimum(begin + ROWS + k_len - q_len, k_len), 0)
        whole = tl.maximum(tl.minimum(begin + 1 + k_len - q_len, k_len), 0) // BLOCK * BLOCK
    low = whole * 0
    if first is not None:
        low = tl.minimum(tl.min(first, 0), high) // BLOCK * BLOCK
        whole = low
    return low, whole, high


@triton.jit
def _query_range(
    begin, tiles, q_len, k_len, first_key, CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The tiles of queries that see a tile of keys: (low, some, every).

    From tile `low` on, `some` tiles see a part of the keys and the next `every` tiles see them all. What follows is a
    ragged tile or nothing. With first_key any row may begin anywhere: all tiles count as masked.
    """
    low = tiles * 0
    some = tiles * 0
    if CAUSAL:
        late = begin + q_len - k_len  # the first row that sees the first key
        low = tl.minimum(tl.maximum(late, 0) // ROWS, tiles)
        some = tl.minimum(tl.cdiv(tl.maximum(late + BLOCK - 1, 0), ROWS), tiles) - low
    every = tl.maximum(q_len // ROWS - low - some, 0)
    if first_key is not None:
        some = tiles - low
        every = tiles * 0
    return low, some, every


@triton.jit
def _key(seed, stream):
    key = None
    if seed is not None:
        key = dropout_key(seed, stream)
    return key


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
    begin = (tiles - 1 - turn) * ROWS  # the last rows see the most keys
    row = begin + tl.arange(0, ROWS)
    first = _first_keys(first_key, row, head // n_head, q_len, k_len)
    low, whole, high = _key_range(begin, first, q_len, k_len, CAUSAL, ROWS, BLOCK)
    key = _key(seed, stream)
    q = _head(q, head, n_head, q_b, q_h)
    k = _head(k, head, n_head, k_b, k_h)
    v = _head(v, head, n_head, v_b, v_h)
    queries = _load(q, begin, q_t, q_len, D, WIDTH, ROWS, True)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    level = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        stop = high if MASKED else whole
        # an encoder's masked loop has one tile at most: pipelined, its matrix instructions are serialized
        for start in tl.range(low, stop, BLOCK, num_stages=STAGES if CAUSAL or not MASKED else 1):
            column = start + tl.arange(0, BLOCK)
            keys = _load(k, start, k_t, k_len, D, WIDTH, BLOCK, MASKED)
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
            values = _load(v, start, v_t, k_len, D, WIDTH, BLOCK, MASKED)
            acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        low = whole
    blind = total == 0.0  # and so is acc
    total = tl.where(blind, 1.0, total)
    acc *= (keep_scale / total)[:, None]
    out = _head(out, head, n_head, q_len.to(tl.int64) * (n_head * D), D)
    _store(out, acc, begin, n_head * D, q_len, D, WIDTH, ROWS)
    lse += head.to(tl.int64) * q_len + row
    tl.store(lse, tl.where(blind, float("inf"), level + tl.log2(total)), mask=row < q_len)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def query_kernel(
    q,
    k,
    v,
    out,
    dout,
    lse,
    delta,
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
    """dq, and delta = keep_share · rowsum(dout ∘ out) as (B, H, Tq) float32.

    Dropout's factor 1 / keep_share is left out of every element and comes back in grad_scale = scale / keep_share.
    """
    tiles = tl.cdiv(q_len, ROWS)
    head, turn = _place(tiles, group)
    begin = (tiles - 1 - turn) * ROWS
    row = begin + tl.arange(0, ROWS)
    first = _first_keys(first_key, row, head // n_head, q_len, k_len)
    low, whole, high = _key_range(begin, first, q_len, k_len, CAUSAL, ROWS, BLOCK)
    key = _key(seed, stream)
    q = _head(q, head, n_head, q_b, q_h)
    k = _head(k, head, n_head, k_b, k_h)
    v = _head(v, head, n_head, v_b, v_h)
    out = _head(out, head, n_head, q_len.to(tl.int64) * (n_head * D), D)
    dout = _head(dout, head, n_head, dout_b, dout_h)
    slope = _load(dout, begin, dout_t, q_len, D, WIDTH, ROWS, True)
    result = _load(out, begin, n_head * D, q_len, D, WIDTH, ROWS, True)
    sums = tl.sum(result.to(tl.float32) * slope.to(tl.float32), 1) * keep_share
    at = head.to(tl.int64) * q_len + row
    tl.store(delta + at, sums, mask=row < q_len)
    level = tl.load(lse + at, mask=row < q_len, other=float("inf"))
    queries = _load(q, begin, q_t, q_len, D, WIDTH, ROWS, True)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        stop = high if MASKED else whole
        # an encoder's masked loop has one tile at most: pipelined, its matrix instructions are serialized
        for start in tl.range(low, stop, BLOCK, num_stages=STAGES if CAUSAL or not MASKED else 1):
            column = start + tl.arange(0, BLOCK)
            keys = _load(k, start, k_t, k_len, D, WIDTH, BLOCK, MASKED)
            values = _load(v, start, v_t, k_len, D, WIDTH, BLOCK, MASKED)
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
    _store(_head(dq, head, n_head, dq_b, D), acc * grad_scale, begin, dq_t, q_len, D, WIDTH, ROWS)


@triton.jit(do_not_specialize=_NOT_SPECIALISED)
def key_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
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
    """dk and dv, of one layout. Reads the delta of `query_kernel`; scores are transposed here: (BLOCK, ROWS)."""
    head, turn = _place(tl.cdiv(k_len, BLOCK), group)
    begin = turn * BLOCK  # the first keys are seen by the most rows
    column = begin + tl.arange(0, BLOCK)
    key = _key(seed, stream)
    q = _head(q, head, n_head, q_b, q_h)
    k = _head(k, head, n_head, k_b, k_h)
    v = _head(v, head, n_head, v_b, v_h)
    dout = _head(dout, head, n_head, dout_b, dout_h)
    lse += head.to(tl.int64) * q_len
    delta += head.to(tl.int64) * q_len
    keys = _load(k, begin, k_t, k_len, D, WIDTH, BLOCK, True)
    values = _load(v, begin, v_t, k_len, D, WIDTH, BLOCK, True)
    # Tiles of queries from low on: `some` that see a part of these keys, `every` that see them all, and a ragged last.
    tiles = tl.cdiv(q_len, ROWS)
    low, some, every = _query_range(begin, tiles, q_len, k_len, first_key, CAUSAL, ROWS, BLOCK)
    dkeys = tl.zeros((BLOCK, WIDTH), tl.float32)
    dvalues = tl.zeros((BLOCK, WIDTH), tl.float32)
    for MASKED in tl.static_range(first_key is not None, 2):
        for index in tl.range(0, tiles - low - every if MASKED else every, num_stages=STAGES):
            if MASKED:
                start = (low + index + tl.where(index < some, 0, every)) * ROWS
            else:
                start = (low + some + index) * ROWS
            row = start + tl.arange(0, ROWS)
            queries = _load(q, start, q_t, q_len, D, WIDTH, ROWS, MASKED)
            slope = _load(dout, start, dout_t, q_len, D, WIDTH, ROWS, MASKED)
            if MASKED:  # rows that do not exist get weights of exp2(-inf)
                level = tl.load(lse + row, mask=row < q_len, other=float("inf"))
                sums = tl.load(delta + row, mask=row < q_len, other=0.0)
            else:
                level = tl.load(lse + row)
                sums = tl.load(delta + row)
            scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
            weights = tl.exp2(scores * scale - level[None, :])
            if MASKED:
                first = _first_keys(first_key, row, head // n_head, q_len, k_len)
                seen = _visible(row, column, first, q_len, k_len, CAUSAL, True)
                weights = tl.where(seen, weights, 0.0)
            dweights = tl.dot(values, tl.trans(slope), input_precision="ieee")
            kept = weights
            if key is not None:
                keep = keep_scores(key, head, row[None, :], column[:, None], threshold)
                kept = tl.where(keep, weights, 0.0)
                dweights = tl.where(keep, dweights, 0.0)
            dvalues = tl.dot(kept.to(slope.dtype), slope, dvalues, input_precision="ieee")
            dscores = weights * (dweights - sums[None, :])
            dkeys = tl.dot(dscores.to(queries.dtype), queries, dkeys, input_precision="ieee")
    _store(_head(dk, head, n_head, dk_b, D), dkeys * grad_scale, begin, dk_t, k_len, D, WIDTH, BLOCK)
    _store(_head(dv, head, n_head, dk_b, D), dvalues * keep_scale, begin, dk_t, k_len, D, WIDTH, BLOCK)


def compile_cases(architecture: str) -> list[Case]:
    """What `make kernels-report` compiles: every table row with its options, and the widths that share a row."""
    options = [(64, "bf16", False, False, False)]
    options += [(d, "bf16", True, dropout, False) for d in (64, 128) for dropout in (False, True)]
    options += [(d, "bf16", True, True, True) for d in (64, 128)]
    options += [(d, "bf16", True, True, False) for d in (16, 32, 80)]
    options += [(64, "fp32", True, True, False), (64, "fp32", True, True, True)]
    return [
        _case(kernel, *option, architecture)
        for option in options
        for kernel in (forward_kernel, query_kernel, key_kernel)
    ]


_TABLES = {
    "forward_kernel": ATTENTION_FORWARD,
    "query_kernel": ATTENTION_QUERY,
    "key_kernel": ATTENTION_KEY,
}
_FLOAT32 = ("lse", "delta")
_FLOATS = ("scale", "keep_scale", "keep_share", "grad_scale")


def _case(
    kernel: Any, d: int, dtype: str, causal: bool, dropout: bool, first_key: bool, architecture: str
) -> Case:
    tile = attention_tile(_TABLES[kernel.__name__], architecture, d, dtype == "fp32")
    pointers = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"}
    given: dict[str, Any] = {
        "first_key": "*i32" if first_key else None,
        "seed": "*i64" if dropout else None,
        "D": d,
        "WIDTH": max(16, next_power_of_two(d)),
        "CAUSAL": causal,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        "STAGES": tile.stages,
        **dict.fromkeys(pointers, f"*{dtype}"),
        **dict.fromkeys(_FLOAT32, "*fp32"),
        **dict.fromkeys(_FLOATS, "fp32"),
        **dict.fromkeys(_NOT_SPECIALISED, "i32"),
    }
    arguments = {name: given.get(name, "i32:16") for name in kernel.arg_names}  # the rest are strides
    name = f"attention {kernel.__name__.removesuffix('_kernel')} {dtype} D={d}"
    name += " encoder" * (not causal) + " dropout" * dropout + " first_key" * first_key
    return Case(name, kernel, arguments, tile)
