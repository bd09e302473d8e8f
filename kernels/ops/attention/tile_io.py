"""What the attention kernels share: which tile a program owns, how tiles move, and which keys a row sees.

Tiles come through `_load` from a pointer, on any hardware, or from a tensor descriptor, which the copy engine of Hopper
and newer reads: then the hardware computes addresses and fills in zeros beyond the end of a sequence. Descriptors have
four dimensions, (B, H, T, D): with fewer, a ragged tile would run into the next sequence or the next head.
"""

from ..._triton import tl, triton


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
def _head(source, batch, number, stride_b, stride_h):
    """Where a head of a (B, T, H, D) tensor begins. A descriptor stays what it is: `_load` tells it the head."""
    if isinstance(source, tl.tensor_descriptor):
        return source
    else:
        return source + batch.to(tl.int64) * stride_b + number.to(tl.int64) * stride_h


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
    source,
    batch,
    number,
    start,
    stride,
    length,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile (ROWS, WIDTH) of one head, zeros where nothing is, through what `_head` gave: the seam of the two paths."""
    if isinstance(source, tl.tensor_descriptor):  # of (B, H, T, D); the hardware fills in the zeros
        return source.load([batch, number, start, 0]).reshape(ROWS, WIDTH)
    else:
        at = _at(source, start, stride, WIDTH, ROWS)
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
    begin,
    tiles,
    q_len,
    k_len,
    first_key,
    batch,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tiles of queries that see a tile of keys: (tiles, low, some, every).

    From tile `low` on, `some` tiles see a part of the keys and the next `every` tiles see them all. What follows, up to
    `tiles`, is a ragged tile or nothing. With first_key any row may begin anywhere: all tiles count as masked, up to
    the last one with a row that begins before these keys end.
    """
    low = tiles * 0
    some = tiles * 0
    if CAUSAL:
        late = begin + q_len - k_len  # the first row that sees the first key
        low = tl.minimum(tl.maximum(late, 0) // ROWS, tiles)
        some = tl.minimum(tl.cdiv(tl.maximum(late + BLOCK - 1, 0), ROWS), tiles) - low
    every = tl.maximum(q_len // ROWS - low - some, 0)
    if first_key is not None:
        end = low * 0
        for start in tl.range(low * ROWS, q_len, 512, num_stages=1):
            row = start + tl.arange(0, 512)
            first = _first_keys(first_key, row, batch, q_len, k_len)
            end = tl.maximum(end, tl.max(tl.where(first < begin + BLOCK, row + 1, 0)))
        tiles = tl.minimum(tl.cdiv(end, ROWS), tiles)
        some = tl.maximum(tiles - low, 0)
        every = low * 0
    return tiles, low, some, every


@triton.jit
def _load_stats(stats, row, start, padded, ROWS: tl.constexpr):
    """A row's numbers from start on, of float32 (rows, padded). From a descriptor in one request: by pointers Triton
    3.6 copies four bytes a time in every thread, which spills."""
    if isinstance(stats, tl.tensor_descriptor):
        return stats.load([row, start]).reshape(ROWS)
    else:
        return tl.load(stats + row.to(tl.int64) * padded + start + tl.arange(0, ROWS))


@triton.jit
def _store_stats(stats, lse, sums, head, row, q_len, padded):
    """What `_load_stats` reads of a head: the log-sum-exp, which is returned, and sums. Rows that do not exist get
    +inf, and so weights of exp2(-inf)."""
    level = tl.load(lse + head.to(tl.int64) * q_len + row, mask=row < q_len, other=float("inf"))
    at = stats + 2 * head.to(tl.int64) * padded + row
    tl.store(at, level, mask=row < padded)
    tl.store(at + padded, sums, mask=row < padded)
    return level


@triton.jit
def _add(total, head, start, padded, part, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """total[head, start : start + ROWS] += part, where this program is the only one to add there."""
    if isinstance(total, tl.tensor_descriptor):
        total.atomic_add([head, start, 0], part.reshape(1, ROWS, WIDTH))
    else:
        at = _at(total + head.to(tl.int64) * padded * D, start, D, WIDTH, ROWS)
        columns = tl.arange(0, WIDTH)[None, :] < D
        tl.store(at, tl.load(at, mask=columns, other=0.0) + part, mask=columns)


@triton.jit
def _finish_adding(total):
    """What was added is in memory before this program adds to the same place again: so sums have one order."""
    if isinstance(total, tl.tensor_descriptor):
        # Triton before 3.9 waits until the engine has read the shared memory, not until it has written
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
