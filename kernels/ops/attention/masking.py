"""Which keys a query sees: the mask of a tile of scores, and the ranges of tiles that a program walks.

Tiles that every query of a tile sees completely run in a loop without masks, of scores and of loads. Those on the
diagonal and at ragged ends run in a second one.
"""

from ..._triton import tl, triton


@triton.jit
def visible(offs_m, offs_n, first, q_len, k_len, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which of the keys offs_n the queries offs_m see: (M, N), or (N, M) where transposed."""
    # of queries that exist, causality leaves no key beyond k_len
    end = offs_m + (1 + k_len - q_len) if CAUSAL else offs_m * 0 + k_len
    if first is None:
        ends, columns = _crossed(end, offs_n, TRANSPOSED)
        mask = columns < ends
    else:  # first <= offs_n < end in one comparison: below zero is beyond every unsigned number
        firsts, columns = _crossed(first, offs_n, TRANSPOSED)
        counts, _ = _crossed(tl.maximum(end - first, 0), offs_n, TRANSPOSED)
        mask = (columns - firsts).to(tl.uint32) < counts.to(tl.uint32)
    return mask


@triton.jit
def _crossed(offs_m, offs_n, TRANSPOSED: tl.constexpr):
    """Both as matrices that broadcast together."""
    return (offs_m[None, :], offs_n[:, None]) if TRANSPOSED else (offs_m[:, None], offs_n[None, :])


@triton.jit
def first_keys(first_key, offs_m, batch, q_len, k_len, IN_LOOP: tl.constexpr = False):
    """The first key that each query sees, or None without first_key. IN_LOOP: in a pipelined loop."""
    first = None
    if first_key is not None and IN_LOOP:
        first = tl.zeros_like(offs_m) + k_len
        # always: in a branch Triton 3.6 does not make it 16 asynchronous copies in every thread, which spills
        if q_len > 0:
            first = tl.load(first_key + batch.to(tl.int64) * q_len + offs_m, mask=offs_m < q_len, other=k_len)
    elif first_key is not None:
        first = tl.load(first_key + batch.to(tl.int64) * q_len + offs_m, mask=offs_m < q_len, other=k_len)
    return first


@triton.jit
def key_range(start_m, first, q_len, k_len, meta):
    """The keys that the query tile at start_m sees: (low, whole, high).

    Every query sees all keys of the tiles from low to whole, and only some of those from whole to high. With first_key
    all tiles count as the latter.
    """
    high = k_len
    whole = k_len // meta.BLOCK_N * meta.BLOCK_N
    if meta.CAUSAL:  # // rounds towards zero: only what is not negative may be divided
        high = tl.maximum(tl.minimum(start_m + meta.BLOCK_M + k_len - q_len, k_len), 0)
        whole = tl.maximum(tl.minimum(start_m + 1 + k_len - q_len, k_len), 0) // meta.BLOCK_N * meta.BLOCK_N
    low = whole * 0
    if first is not None:
        low = tl.minimum(tl.min(first, 0), high) // meta.BLOCK_N * meta.BLOCK_N
        whole = low
    return low, whole, high


@triton.jit
def query_range(start_n, q_len, k_len, first_key, batch, meta):
    """The query tiles that see the key tile at start_n: (tiles, low, some, every).

    From tile `low` on, `some` tiles see a part of the keys and the next `every` tiles see them all. What follows, up to
    `tiles`, is a ragged tile or nothing. With first_key any query may begin anywhere: all tiles count as masked, up to
    the last one with a query whose first key lies before the end of these keys.
    """
    tiles = tl.cdiv(q_len, meta.BLOCK_M)
    low = tiles * 0
    some = tiles * 0
    if meta.CAUSAL:
        late = start_n + q_len - k_len  # the first query that sees the first key
        low = tl.minimum(tl.maximum(late, 0) // meta.BLOCK_M, tiles)
        some = tl.minimum(tl.cdiv(tl.maximum(late + meta.BLOCK_N - 1, 0), meta.BLOCK_M), tiles) - low
    every = tl.maximum(q_len // meta.BLOCK_M - low - some, 0)
    if first_key is not None:
        end = low * 0
        for start_m in tl.range(low * meta.BLOCK_M, q_len, 512, num_stages=1):
            offs_m = start_m + tl.arange(0, 512)
            first = first_keys(first_key, offs_m, batch, q_len, k_len)
            end = tl.maximum(end, tl.max(tl.where(first < start_n + meta.BLOCK_N, offs_m + 1, 0)))
        tiles = tl.minimum(tl.cdiv(end, meta.BLOCK_M), tiles)
        some = tl.maximum(tiles - low, 0)
        every = low * 0
    return tiles, low, some, every
