"""The Triton kernels of the embedding; `embedding.py` has the formulas, the bytes they move and the launchers.

Rows of a table are summed from rows of the incoming gradient that stand in the table's order: sorted by id. A chunk of
that order which belongs to one table row alone is summed first, by a program of its own, so that a frequent token is
not one program's work; then every table row adds up its chunks and what is left before and behind them.
"""

from .._triton import tl, triton
from ..dropout_mask import column_keys, dropout_key, keep_elements, row_keys


@triton.jit(do_not_specialize=["stream", "threshold", "rows", "length", "vocabulary"])
def embed_kernel(
    ids,
    wte,
    wpe,
    out,
    seed,
    stream,
    threshold,
    scale,
    rows,
    length,
    vocabulary,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row b · length + t is wte[ids[b, t]] + wpe[t], NaN where there is no such row of wte."""
    across: tl.constexpr = (
        C + BLOCK - 1
    ) // BLOCK  # one grid axis: the others take no more than 65,535 programs
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & (column < C)[None, :]
    token = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    known = (token >= 0) & (token < vocabulary)
    x = tl.load(wte + token[:, None] * C + column[None, :], mask=here & known[:, None], other=float("nan"))
    position = tl.load(wpe + (row % length)[:, None] * C + column[None, :], mask=here, other=0.0)
    x = x.to(tl.float32) + position.to(tl.float32)
    key = dropout_key(seed, stream)
    if key is not None:
        keep = keep_elements(row_keys(key, 0, row)[:, None], column_keys(key, column)[None, :], threshold)
        x = tl.where(keep, x * scale, 0.0)
    tl.store(out + row[:, None] * C + column[None, :], x, mask=here)


@triton.jit
def _gathered(dx, order, at, end, column, C: tl.constexpr, key, threshold):
    """The float32 sum of those rows order[at] of dx with at < end, under the dropout mask but not yet scaled."""
    row = tl.load(order + at, mask=at < end, other=0)
    here = (at < end)[:, None] & (column < C)[None, :]
    grad = tl.load(dx + row[:, None] * C + column[None, :], mask=here, other=0.0).to(tl.float32)
    if key is not None:
        keep = keep_elements(row_keys(key, 0, row)[:, None], column_keys(key, column)[None, :], threshold)
        grad = tl.where(keep, grad, 0.0)
    return tl.sum(grad, 0)


@triton.jit(do_not_specialize=["stream", "threshold", "chunk"])
def chunk_sums_kernel(
    dx,
    keys,
    order,
    partial,
    seed,
    stream,
    threshold,
    chunk,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[i], float32: the sum over chunk i of the order where all of it has one key; else it is left as it is."""
    across: tl.constexpr = (C + BLOCK - 1) // BLOCK
    index = (tl.program_id(0) // across).to(tl.int64)
    begin = index * chunk
    end = begin + chunk
    if tl.load(keys + begin) == tl.load(keys + end - 1):
        column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
        key = dropout_key(seed, stream)
        total = tl.full((BLOCK,), 0.0, tl.float32)
        for start in tl.range(begin, end, ROWS):
            total += _gathered(dx, order, start + tl.arange(0, ROWS), end, column, C, key, threshold)
        tl.store(partial + index * C + column, total, mask=column < C)


@triton.jit(do_not_specialize=["stream", "threshold", "chunk"])
def row_sums_kernel(
    dx,
    order,
    offsets,
    partial,
    out,
    seed,
    stream,
    threshold,
    scale,
    chunk,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[v] is the sum over order[offsets[v]:offsets[v + 1]]: its whole chunks' sums, and the rows around them."""
    across: tl.constexpr = (C + BLOCK - 1) // BLOCK
    target = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + target)
    end = tl.load(offsets + target + 1)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    if begin < end:  # most of a vocabulary is absent from a batch
        key = dropout_key(seed, stream)
        first = (begin + chunk - 1) // chunk  # the whole chunks are first to last - 1
        last = end // chunk
        before = tl.minimum(first * chunk, end)
        behind = tl.maximum(last * chunk, before)
        for start in tl.range(0, before - begin + end - behind, ROWS):
            at = begin + start + tl.arange(0, ROWS)
            at = tl.where(at < before, at, at - before + behind)
            total += _gathered(dx, order, at, end, column, C, key, threshold)
        for start in tl.range(first, last, ROWS):
            at = (start + tl.arange(0, ROWS)).to(tl.int64)
            here = (at < last)[:, None] & (column < C)[None, :]
            total += tl.sum(tl.load(partial + at[:, None] * C + column[None, :], mask=here, other=0.0), 0)
        total *= scale
    tl.store(out + target * C + column, total, mask=column < C)
