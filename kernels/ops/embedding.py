"""Token and position embeddings: both lookups, their sum and dropout in one operator.

    forward   x[b, t] = dropout(wte[ids[b, t]] + wpe[t])
    backward  dwte[v] = Σ over (b, t) with ids[b, t] = v of dx[b, t],   dwpe[t] = Σ over b of dx[b, t]

dx is the incoming gradient under the same dropout mask. Only ids are saved.

Both gradients are one segmented sum: rows of dx, ordered by the table row they belong to, one segment per table row.
The order of the tokens is a stable sort, that of the positions is known. Sums are float32, in a fixed order, without
atomics. Of N ordered rows, every √N / 4 (rounded up to a power of two, at least 16) form a chunk. A chunk that lies in
one segment is summed first, by a program of its own; then every table row adds up its chunks and the rows before and
behind them. So the longest sum of one program grows as √N, even where all N rows belong to one token.

Bytes moved for N = B T rows of C elements of s bytes and tables of V and P rows with w bytes an element:

    forward   N C (w + s) + T C w: rows of wte in, x out; wpe comes from the cache except the first time
    backward  2 N C s + (V + P) C w: dx in once per table, both gradients out; 8 C more per chunk within one segment.
              Within `gradients_in_place`, 8 C for each table row of the batch instead: read from `.grad`, added, written

plus 8 to 12 bytes a row each time ids, keys and their order are read.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from .._triton import on_device_of, tl, triton
from ..backend import choose, register
from ..dropout_mask import dropout_key, int32_bits, keep_scale, keep_tile, threshold_bits
from ..matmul import leaf, own_gradient
from ..tiles import EMBED, ROW_SUMS, hardware, next_power_of_two, select


@triton.jit(do_not_specialize=["stream", "threshold", "rows", "T", "V"])
def embed_kernel(
    ids, wte, wpe, out, seed, stream, threshold, scale, rows, T, V, C: tl.constexpr, tile: tl.constexpr
):
    """Row b · T + t is wte[ids[b, t]] + wpe[t], NaN where wte has no such row."""
    across = tl.cdiv(C, tile.block)  # one grid axis: the others take at most 65,535 programs
    row = (tl.program_id(0) // across).to(tl.int64) * tile.rows + tl.arange(0, tile.rows)
    column = tl.program_id(0) % across * tile.block + tl.arange(0, tile.block)
    here = (row < rows)[:, None] & (column < C)[None, :]
    token = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    known = (token >= 0) & (token < V)
    x = tl.load(wte + token[:, None] * C + column[None, :], mask=here & known[:, None], other=float("nan"))
    position = tl.load(wpe + (row % T)[:, None] * C + column[None, :], mask=here, other=0.0)
    x = x.to(tl.float32) + position.to(tl.float32)
    key = dropout_key(seed, stream)
    if key is not None:
        x = tl.where(keep_tile(key, row[:, None], column[None, :], threshold), x * scale, 0.0)
    tl.store(out + row[:, None] * C + column[None, :], x, mask=here)


@triton.jit
def _gather_sum(dx, order, at, end, column, C: tl.constexpr, key, threshold):
    """The float32 sum of the rows order[at] of dx with at < end, under the dropout mask but not scaled."""
    row = tl.load(order + at, mask=at < end, other=0)
    here = (at < end)[:, None] & (column < C)[None, :]
    grad = tl.load(dx + row[:, None] * C + column[None, :], mask=here, other=0.0).to(tl.float32)
    if key is not None:
        grad = tl.where(keep_tile(key, row[:, None], column[None, :], threshold), grad, 0.0)
    return tl.sum(grad, 0)


@triton.jit(do_not_specialize=["stream", "threshold", "chunk"])
def chunk_sums_kernel(
    dx, keys, order, partial, seed, stream, threshold, chunk, C: tl.constexpr, tile: tl.constexpr
):
    """partial[i], float32: the sum over chunk i of the order if all of it has one key; not written otherwise."""
    across = tl.cdiv(C, tile.block)
    index = (tl.program_id(0) // across).to(tl.int64)
    begin = index * chunk
    end = begin + chunk
    if tl.load(keys + begin) == tl.load(keys + end - 1):
        column = tl.program_id(0) % across * tile.block + tl.arange(0, tile.block)
        key = dropout_key(seed, stream)
        acc = tl.full((tile.block,), 0.0, tl.float32)
        for start in tl.range(begin, end, tile.rows):
            acc += _gather_sum(dx, order, start + tl.arange(0, tile.rows), end, column, C, key, threshold)
        tl.store(partial + index * C + column, acc, mask=column < C)


@triton.jit(do_not_specialize=["stream", "threshold", "chunk"])
def row_sums_kernel(
    dx,
    order,
    offsets,
    partial,
    dw,
    seed,
    stream,
    threshold,
    scale,
    chunk,
    C: tl.constexpr,
    ADD: tl.constexpr,
    tile: tl.constexpr,
):
    """dw[v] is the sum over order[offsets[v]:offsets[v + 1]]: of its whole chunks' sums and the rows around them.

    ADD: it is added to dw[v]; rows without a summand are left alone.
    """
    across = tl.cdiv(C, tile.block)
    target = (tl.program_id(0) // across).to(tl.int64)
    column = tl.program_id(0) % across * tile.block + tl.arange(0, tile.block)
    begin = tl.load(offsets + target)
    end = tl.load(offsets + target + 1)
    acc = tl.full((tile.block,), 0.0, tl.float32)
    if begin < end:  # most of a vocabulary is absent from a batch
        key = dropout_key(seed, stream)
        first = (begin + chunk - 1) // chunk  # the whole chunks are first to last - 1
        last = end // chunk
        before = tl.minimum(first * chunk, end)
        behind = tl.maximum(last * chunk, before)
        for start in tl.range(0, before - begin + end - behind, tile.rows):
            at = begin + start + tl.arange(0, tile.rows)
            at = tl.where(at < before, at, at - before + behind)
            acc += _gather_sum(dx, order, at, end, column, C, key, threshold)
        for start in tl.range(first, last, tile.rows):
            at = (start + tl.arange(0, tile.rows)).to(tl.int64)
            here = (at < last)[:, None] & (column < C)[None, :]
            acc += tl.sum(tl.load(partial + at[:, None] * C + column[None, :], mask=here, other=0.0), 0)
        acc *= scale
        if ADD:
            acc += tl.load(dw + target * C + column, mask=column < C)
    if not ADD or begin < end:
        tl.store(dw + target * C + column, acc, mask=column < C)


def _launch_forward(
    ids: Tensor, wte: Tensor, wpe: Tensor, p: float, seed: Tensor | None, stream: int, out_dtype: torch.dtype
) -> Tensor:
    out = wte.new_empty((*ids.shape, wte.shape[1]), dtype=out_dtype)
    if out.numel() == 0:
        return out
    if not ids.is_cuda and (ids.min() < 0 or ids.max() >= len(wte)):
        raise _out_of_range(ids, wte)
    ids, wte, wpe = ids.contiguous(), wte.contiguous(), wpe.contiguous()
    T, (V, C) = ids.shape[1], wte.shape
    tile = select(EMBED, hardware(wte.device).architecture, C)
    programs = triton.cdiv(ids.numel(), tile.rows) * triton.cdiv(C, tile.block)
    mask = (seed, int32_bits(stream), threshold_bits(p), keep_scale(p))
    with on_device_of(wte):
        embed_kernel[(programs,)](
            ids, wte, wpe, out, *mask, ids.numel(), T, V, C=C, tile=tile, num_warps=tile.warps
        )
    return out


def _out_of_range(ids: Tensor, wte: Tensor) -> ValueError:
    low, high = ids.min().item(), ids.max().item()
    return ValueError(f"embed: ids range from {low} to {high}; wte has the rows 0 to {len(wte) - 1}")


def _launch_row_sums(
    dx: Tensor,
    keys: Tensor,
    order: Tensor,
    rows: int,
    dtype: torch.dtype,
    p: float,
    seed: Tensor | None,
    stream: int,
    total: Tensor | None = None,
) -> Tensor:
    """dw (rows, C) in dtype: dw[v] is the sum of the rows order[i] of dropout(dx), dx (..., C), with keys[i] = v.

    keys: (N,) int32, ascending; those outside [0, rows) belong to no row. order: (N,) int64. total: (rows, C) contiguous
    float32, to which dw is added; then dw is empty.
    """
    C = dx.shape[-1]
    result = dx.new_empty((rows, C) if total is None else 0, dtype=dtype)
    dw = result if total is None else total
    if dx.numel() == 0 or dw.numel() == 0:
        return result.zero_()
    dx = dx.contiguous()
    table = torch.arange(rows + 1, dtype=torch.int32, device=dx.device)
    offsets = torch.searchsorted(keys, table, out_int32=True)
    chunk = max(16, next_power_of_two(isqrt(len(keys)) // 4))
    partial = dx.new_empty((len(keys) // chunk, C), dtype=torch.float32)
    tile = select(ROW_SUMS, hardware(dx.device).architecture, C)
    across = triton.cdiv(C, tile.block)
    mask = (seed, int32_bits(stream), threshold_bits(p))
    sizes = {"C": C, "tile": tile, "num_warps": tile.warps}
    with on_device_of(dx):
        if len(partial):
            chunk_sums_kernel[(len(partial) * across,)](dx, keys, order, partial, *mask, chunk, **sizes)
        row_sums_kernel[(rows * across,)](
            dx, order, offsets, partial, dw, *mask, keep_scale(p), chunk, ADD=total is not None, **sizes
        )
    return result


_row_sums = register(
    "embedding_row_sums(Tensor dx, Tensor keys, Tensor order, int rows, ScalarType dtype, float p, Tensor? seed, "
    "int stream, Tensor(a!)? total=None) -> Tensor",
    _launch_row_sums,
    lambda dx, keys, order, rows, dtype, p, seed, stream, total=None: dx.new_empty(
        (rows, dx.shape[-1]) if total is None else 0, dtype=dtype
    ),
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, wte, wpe, ctx.p, seed, ctx.stream, _ = inputs
    ctx.tables = [(len(table), table.dtype, leaf(table)) for table in (wte, wpe)]
    ctx.save_for_backward(ids, seed)


def _gradients(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, ...]:
    if dx is None:
        return (None,) * 7
    ids, seed = ctx.saved_tensors
    wte, wpe = ctx.tables

    def gradient(table: tuple, keys: Tensor, order: Tensor) -> Tensor | None:
        rows, dtype, table_leaf = table
        total = own_gradient(table_leaf)
        dw = _row_sums(dx, keys, order, rows, dtype, ctx.p, seed, ctx.stream, total)
        return dw if total is None else None

    dwte = dwpe = None
    if ctx.needs_input_grad[1]:
        # 32 bits take half the passes of a radix sort. Clamping keeps an id out of range, whatever its value.
        dwte = gradient(wte, *ids.flatten().clamp(-1, wte[0]).int().sort(stable=True))
    if ctx.needs_input_grad[2]:
        batch, length = ids.shape
        order = torch.arange(batch * length, device=ids.device).view(batch, length).T.flatten()
        dwpe = gradient(wpe, (order % length).int(), order)
    return None, dwte, dwpe, None, None, None, None


_embed = register(
    "embed(Tensor ids, Tensor wte, Tensor wpe, float p, Tensor? seed, int stream, ScalarType out_dtype) -> Tensor",
    _launch_forward,
    lambda ids, wte, wpe, p, seed, stream, out_dtype: wte.new_empty(
        (*ids.shape, wte.shape[1]), dtype=out_dtype
    ),
    _save,
    _gradients,
)


def embed(
    ids: Tensor,
    wte: Tensor,
    wpe: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Add token and position embeddings and apply dropout.

    Args:
        ids: (B, T) int32 or int64, each in [0, V).
        wte: (V, C) token table.
        wpe: (P, C) position table with P ≥ T; row t belongs to position t.
        dropout_p: probability of dropping an element, in [0, 1].
        seed: int64, one element, on the ids' device; required if dropout_p > 0.
        stream: an integer that tells this dropout from others under the same seed.
        out_dtype: dtype of the result, wte's by default.

    Returns:
        (B, T, C) in out_dtype.

    Raises:
        TypeError, ValueError: unsupported dtype, shape, device or probability; an id out of range, on a CPU. On a GPU
            such an id makes a row of NaN.
    """
    checks.integers("embed", ids=ids)
    checks.floating("embed", wte=wte, wpe=wpe)
    checks.out_dtype("embed", out_dtype)
    checks.same_device("embed", "ids", ids, "wte", wte)
    if ids.dim() != 2:
        raise ValueError(f"embed: ids has shape {tuple(ids.shape)}; it takes (B, T)")
    if wte.dim() != 2 or wpe.dim() != 2 or wte.shape[1] != wpe.shape[1]:
        raise ValueError(
            f"embed: wte {tuple(wte.shape)} and wpe {tuple(wpe.shape)} must be (V, C) and (P, C)"
        )
    if ids.shape[1] > wpe.shape[0]:
        raise ValueError(f"embed: ids has {ids.shape[1]} positions but wpe only {wpe.shape[0]} rows")
    checks.dropout("embed", dropout_p, seed, ids, stream)
    out_dtype = out_dtype or wte.dtype
    if choose("embed", wte, wpe).backend == "triton":
        return _embed(ids, wte, wpe, dropout_p, seed if dropout_p > 0.0 else None, stream, out_dtype)
    try:
        return reference.embed(ids, wte, wpe, dropout_p, seed, stream, out_dtype)
    except IndexError:
        raise _out_of_range(ids, wte) from None
