"""The one definition of a dropout mask: a counter-based generator from (seed, stream, position) to a keep bit.

A mask is never stored. Forward, backward, every tile size and this file's PyTorch all derive the same bits from

    key   = mix(mix(mix(stream + G) ^ seed_high) ^ seed_low)
    r     = mix(mix(head ^ key) ^ row) | 1                     one a row
    c     = mix(column ^ mix(key + G))                         one a column
    w     = high32(r · (c ^ r)) ^ low32(r · (c ^ r))           one 32-bit word a position

in arithmetic modulo 2^32, where mix is a 32-bit finaliser of two xorshift-multiply rounds (C. Wellons, "Prospecting
for Hash Functions", 2018) and G = 0x9E3779B9. Rows and columns are mixed once each, so an element costs one wide
multiplication and two exclusive ors.

- **Rows and columns** (everything but attention): head = 0, one word an element, dropped where w < p · 2^32.
- **Attention** (batch · head, q, k): elements that differ only in bit 3 of q and bit 3 of k lie in one thread's
  registers in the layouts of tensor cores, so the four of them share the word of the position with both bits cleared;
  element (q, k) owns its byte 2 · bit3(q) + bit3(k) and is dropped where the low seven bits are < p · 128. So the
  probability of attention is quantised to 1/128 (0.1 is 13/128; never to 0, nor to 1 below 1), and what is kept
  is scaled by the exact probability of keeping.
"""

import torch
from torch import Tensor

from . import checks
from .backend import choose

GOLDEN = 0x9E3779B9
_LOW = 0xFFFFFFFF
ATTENTION_LEVELS = 128  # a quarter word has 8 bits; the eighth is left free for a packed comparison


def dropout(x: Tensor, p: float, seed: Tensor, stream: int = 0) -> Tensor:
    """x with every element dropped with probability p and the rest scaled by 1 / (1 - p).

    Args:
        x: any shape, floating; its last dimension gives the columns, all others the rows.
        p: in [0, 1], quantised to 2^-32.
        seed: int64, one element, on x's device.
        stream: which of a step's dropouts this is.

    Returns:
        A tensor like x.

    Raises:
        TypeError, ValueError: an argument's dtype or device, or the probability.
    """
    checks.floating("dropout", x=x)
    checks.dropout("dropout", p, seed, x)
    choose("dropout", x)
    if p == 0.0:
        return x
    columns = x.shape[-1] if x.dim() else 1
    keep = keep_mask(seed, stream, x.numel() // max(columns, 1), columns, p).view(x.shape)
    return x * keep * keep_scale(p)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by; 0 where nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def attention_threshold(p: float) -> int:
    """How many of ATTENTION_LEVELS equally likely values drop an element: p quantised, 0 and 1 only where p is."""
    return min(max(round(p * ATTENTION_LEVELS), p > 0.0), ATTENTION_LEVELS - (p < 1.0))


def keep_mask(seed: Tensor, stream: int, rows: int, columns: int, p: float) -> Tensor:
    """The mask of a (rows, columns) matrix: bool, True where an element is kept."""
    row, column = _positions(rows, columns, seed.device)
    return _words(seed, stream, torch.zeros_like(row), row, column) >= round(p * 2**32)


def attention_keep_mask(seed: Tensor, stream: int, heads: int, q_len: int, k_len: int, p: float) -> Tensor:
    """The mask of attention over `heads` = batch · head matrices: bool (heads, q_len, k_len), True where kept."""
    row, column = _positions(q_len, k_len, seed.device)
    head = torch.arange(heads, device=seed.device).view(-1, 1, 1)
    words = _words(seed, stream, head, row & ~8, column & ~8)
    byte = 2 * (row >> 3 & 1) + (column >> 3 & 1)
    return (words >> 8 * byte & ATTENTION_LEVELS - 1) >= attention_threshold(p)


def _positions(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)


def _words(seed: Tensor, stream: int, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The 32-bit words of broadcast positions, as int64: 32-bit arithmetic carried out in 64 bits and masked."""
    seed = seed.view(())
    key = _mix(torch.full((), (stream + GOLDEN) & _LOW, dtype=torch.int64, device=seed.device))
    key = _mix(_mix(key ^ (seed >> 32 & _LOW)) ^ (seed & _LOW))
    r = _mix(_mix(head ^ key) ^ row) | 1
    c = _mix(column ^ _mix((key + GOLDEN) & _LOW))
    product = r * (c ^ r)  # int64 wraps around, which keeps the low 64 bits of the product exact
    return (product >> 32 ^ product) & _LOW


def _mix(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * 0x21F0AAAD & _LOW
    x = (x ^ x >> 15) * 0xD35A2D97 & _LOW
    return x ^ x >> 15
