"""Token and position embeddings: both look-ups, their sum and dropout in one operator.

    forward   x[b, t] = dropout(wte[ids[b, t]] + wpe[t])
    backward  dwte[v] = Σ over (b, t) with ids[b, t] = v of dx[b, t],   dwpe[t] = Σ over b of dx[b, t]

dx is the incoming gradient under the same dropout mask. Only ids are saved.

Both gradients are one sum: rows of dx in the order of the table rows they belong to, a segment a table row. The
tokens' order is a stable sort, the positions' is known. Sums are float32, in a fixed order, without atomics. Of N rows in
order, every √N / 4 (rounded up to a power of two, 16 at least) are a chunk, and a chunk inside one segment is summed on
its own: so what one program adds up grows as √N, even where all N rows are one token's.

Bytes moved for N = B T rows of C elements of s bytes and tables of V and P rows with w bytes an element:

    forward   N C (w + s) + T C w: rows of wte in, x out; wpe comes from the cache but the first time
    backward  2 N C s + (V + P) C w: dx in once for each table, both gradients out; 8 C more a chunk inside a segment

and beside them 8 to 12 bytes a row for ids, keys and their order, each time one is looked at.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .. import checks, reference
from .._triton import on_device_of, triton
from ..backend import choose, register
from ..dropout_mask import int32_bits, keep_scale, threshold_bits
from ..tiles import EMBED, ROW_SUMS, hardware, next_power_of_two, select
from .embedding_kernels import chunk_sums_kernel, embed_kernel, row_sums_kernel


def _launch_forward(
    ids: Tensor, wte: Tensor, wpe: Tensor, p: float, seed: Tensor | None, stream: int, out_dtype: torch.dtype
) -> Tensor:
    out = wte.new_empty((*ids.shape, wte.shape[1]), dtype=out_dtype)
    if out.numel() == 0:
        return out
    if not ids.is_cuda and (ids.min() < 0 or ids.max() >= len(wte)):
        raise _out_of_range(ids, wte)
    ids, wte, wpe = ids.contiguous(), wte.contiguous(), wpe.contiguous()
    columns = wte.shape[1]
    tile = select(EMBED, hardware(wte.device).architecture, columns)
    with on_device_of(wte):
        embed_kernel[(triton.cdiv(ids.numel(), tile.rows) * triton.cdiv(columns, tile.block),)](
            ids,
            wte,
            wpe,
            out,
            seed,
            int32_bits(stream),
            threshold_bits(p),
            keep_scale(p),
            ids.numel(),
            ids.shape[1],
            len(wte),
            C=columns,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
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
) -> Tensor:
    """(rows, C) in dtype: row v is the sum of the rows order[i] of dropout(dx), dx (..., C), where keys[i] = v.

    keys: (N,) int32, ascending; those outside [0, rows) belong to no row. order: (N,) int64.
    """
    columns = dx.shape[-1]
    out = dx.new_empty((rows, columns), dtype=dtype)
    if dx.numel() == 0 or out.numel() == 0:
        return out.zero_()
    dx = dx.contiguous()
    table = torch.arange(rows + 1, dtype=torch.int32, device=dx.device)
    offsets = torch.searchsorted(keys, table, out_int32=True)
    chunk = max(16, next_power_of_two(isqrt(len(keys)) // 4))
    partial = dx.new_empty((len(keys) // chunk, columns), dtype=torch.float32)
    tile = select(ROW_SUMS, hardware(dx.device).architecture, columns)
    across = triton.cdiv(columns, tile.block)
    mask = (seed, int32_bits(stream), threshold_bits(p))
    sizes = {"C": columns, "ROWS": tile.rows, "BLOCK": tile.block, "num_warps": tile.warps}
    with on_device_of(dx):
        if len(partial):
            chunk_sums_kernel[(len(partial) * across,)](dx, keys, order, partial, *mask, chunk, **sizes)
        row_sums_kernel[(rows * across,)](
            dx, order, offsets, partial, out, *mask, keep_scale(p), chunk, **sizes
        )
    return out


_row_sums = register(
    "embedding_row_sums(Tensor dx, Tensor keys, Tensor order, int rows, ScalarType dtype, float p, Tensor? seed, "
    "int stream) -> Tensor",
    _launch_row_sums,
    lambda dx, keys, order, rows, dtype, *_: dx.new_empty((rows, dx.shape[-1]), dtype=dtype),
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, wte, wpe, ctx.p, seed, ctx.stream, _ = inputs
    ctx.tables = [(len(wte), wte.dtype), (len(wpe), wpe.dtype)]
    ctx.save_for_backward(ids, seed)


def _gradients(ctx: Any, dx: Tensor | None) -> tuple[Tensor | None, ...]:
    if dx is None:
        return (None,) * 7
    ids, seed = ctx.saved_tensors
    (tokens, wte_dtype), (positions, wpe_dtype) = ctx.tables
    mask = (ctx.p, seed, ctx.stream)
    dwte = dwpe = None
    if ctx.needs_input_grad[1]:
        # 32 bits are half the passes of a radix sort; an id out of range stays that, whatever number it was
        keys, order = ids.flatten().clamp(-1, tokens).int().sort(stable=True)
        dwte = _row_sums(dx, keys, order, tokens, wte_dtype, *mask)
    if ctx.needs_input_grad[2]:
        batch, length = ids.shape
        order = torch.arange(batch * length, device=ids.device).view(batch, length).T.flatten()
        dwpe = _row_sums(dx, (order % length).int(), order, positions, wpe_dtype, *mask)
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
    """Token plus position embedding, with dropout.

    Args:
        ids: (B, T) int32 or int64, each in [0, V).
        wte: (V, C) token table.
        wpe: (P, C) position table with P ≥ T; row t belongs to position t.
        dropout_p: probability of dropping an element, in [0, 1].
        seed: int64, one element, on the ids' device; needed where dropout_p > 0.
        stream: which of a step's dropouts this is.
        out_dtype: dtype of the result, wte's by default.

    Returns:
        (B, T, C) in out_dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or an id out of range (named on a CPU).
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
    checks.dropout("embed", dropout_p, seed, ids)
    out_dtype = out_dtype or wte.dtype
    if choose("embed", wte, wpe).backend == "triton":
        return _embed(ids, wte, wpe, dropout_p, seed if dropout_p > 0.0 else None, stream, out_dtype)
    try:
        return reference.embed(ids, wte, wpe, dropout_p, seed, stream, out_dtype)
    except IndexError:
        raise _out_of_range(ids, wte) from None
