"""Token and position embeddings: both look-ups, their sum and dropout in one operator.

    forward   x[b, t] = dropout(wte[ids[b, t]] + wpe[t])
    backward  dwte[v] = Σ over (b, t) with ids[b, t] = v of dx[b, t],   dwpe[t] = Σ over b of dx[b, t]

dx is the incoming gradient under the same dropout mask. Only ids are saved.
"""

import torch
from torch import Tensor

from . import checks, reference
from .backend import choose


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
    choose("embed", wte)
    try:
        return reference.embed(ids, wte, wpe, dropout_p, seed, stream, out_dtype or wte.dtype)
    except IndexError:
        low, high = ids.min().item(), ids.max().item()
        raise ValueError(
            f"embed: ids range from {low} to {high}; wte has the rows 0 to {len(wte) - 1}"
        ) from None
