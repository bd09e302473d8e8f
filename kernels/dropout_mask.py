"""The definition of every dropout mask: a counter-based generator from (seed, stream, position) to a keep bit.

A mask is never stored. Forward and backward kernels, at any tile size, and the PyTorch code below derive the same bits
from

    key   = mix(mix(mix(stream + G) ^ seed_high) ^ seed_low)
    r     = mix(mix(head ^ key) ^ row) | 1                     one a row
    c     = mix(column ^ mix(key + G))                         one a column
    w     = high32(r · (c ^ r)) ^ low32(r · (c ^ r))           one 32-bit word a position

modulo 2^32, where mix is a 32-bit finaliser of two xorshift-multiply rounds (C. Wellons, "Prospecting for Hash
Functions", 2018) and G = 0x9E3779B9. Each row and each column is mixed once, so an element costs one wide
multiplication and two exclusive ors.

- **Rows and columns** (everything but attention): head = 0, one word an element, dropped where w < p · 2^32.
- **Attention** (batch · head, q, k): elements that differ only in bit 3 of q and bit 3 of k lie in one thread's
  registers in tensor-core layouts, so the four share the word of the position with both bits cleared. Element (q, k)
  takes byte 2 · bit3(q) + bit3(k) of it and is dropped where that byte's low seven bits are < p · 128. So attention's
  probability is quantised to 1/128 (0.1 becomes 13/128; nothing but 0 becomes 0, nothing but 1 becomes 1), and kept
  elements are scaled by the exact keep probability.
"""

import torch
from torch import Tensor

from ._triton import tl, triton
from .backend import register

GOLDEN = 0x9E3779B9
_LOW = 0xFFFFFFFF
ATTENTION_LEVELS = 128  # a byte of the word; its eighth bit is left free for a packed comparison


def keep_scale(p: float) -> float:
    """The factor of kept elements, 1 / (1 - p); 0 where nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def attention_threshold(p: float) -> int:
    """How many of ATTENTION_LEVELS equally likely values drop an element. Only p = 0 gives 0, only p = 1 gives all."""
    return min(max(round(p * ATTENTION_LEVELS), p > 0.0), ATTENTION_LEVELS - (p < 1.0))


def int32_bits(value: int) -> int:
    """The low 32 bits of value as a signed integer, so that the kernel argument is int32 for any value."""
    return (value + 2**31) % 2**32 - 2**31


def threshold_bits(p: float) -> int:
    """Words below this are dropped, as `int32_bits`. p = 1 keeps one word in 2^32, which `keep_scale` zeroes."""
    return int32_bits(min(round(p * 2**32), 2**32 - 1))


def keep_mask(seed: Tensor, stream: int, rows: int, columns: int, p: float) -> Tensor:
    """The mask of a (rows, columns) matrix: bool, True where an element is kept."""
    row, column = _positions(rows, columns, seed.device)
    return _words(seed, stream, torch.zeros_like(row), row, column) >= round(p * 2**32)


def attention_keep_mask(seed: Tensor, stream: int, heads: int, q_len: int, k_len: int, p: float) -> Tensor:
    """The mask of attention over `heads` = batch · head matrices: bool (heads, q_len, k_len), True where kept."""
    rows, columns = -(-q_len // 16), -(-k_len // 16)  # blocks of 16, whose two halves share their words
    row, column = _positions(8 * rows, 8 * columns, seed.device)
    head = torch.arange(heads, device=seed.device).view(-1, 1, 1)
    words = _words(seed, stream, head, row + (row & ~7), column + (column & ~7))  # inserts a zero as bit 3
    words = words.view(heads, rows, 8, columns, 8)
    keep = torch.empty((heads, rows, 2, 8, columns, 2, 8), dtype=torch.bool, device=seed.device)
    for byte in range(4):
        bits = words >> 8 * byte & ATTENTION_LEVELS - 1
        keep[:, :, byte // 2, :, :, byte % 2] = bits >= attention_threshold(p)
    return keep.view(heads, 16 * rows, 16 * columns)[:, :q_len, :k_len]


def _positions(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)


def _hashed(seed: Tensor, stream: int, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The 32-bit words of broadcast positions, in int64: 32-bit arithmetic done in 64 bits and masked."""
    seed = seed.view(())
    key = _mix(torch.full((), (stream + GOLDEN) & _LOW, dtype=torch.int64, device=seed.device))
    key = _mix(_mix(key ^ (seed >> 32 & _LOW)) ^ (seed & _LOW))
    r = _mix(_mix(head ^ key) ^ row) | 1
    c = _mix(column ^ _mix((key + GOLDEN) & _LOW))
    product = (c ^ r).mul_(r)  # int64 wraps around: the low 64 bits of the product stay exact
    # In place: allocating another tensor of this size takes longer than its arithmetic.
    return (product >> 32).bitwise_xor_(product).bitwise_and_(_LOW)


def _fake(seed: Tensor, stream: int, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return row.new_empty(torch.broadcast_shapes(head.shape, row.shape, column.shape))


# An operator, since torch.compile writes an operand out at each of its uses: the nested mixes took it minutes
_words = register(
    "dropout_words(Tensor seed, int stream, Tensor head, Tensor row, Tensor column) -> Tensor", _hashed, _fake
)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * 0x21F0AAAD & _LOW
    x = (x ^ x >> 15) * 0xD35A2D97 & _LOW
    return x ^ x >> 15


@triton.jit
def dropout_key(seed, stream):
    """The key of one stream, None without a seed. seed: pointer to int64, or None; stream: `int32_bits`."""
    key = None
    if seed is not None:
        value = tl.load(seed)
        key = _mix32(stream.to(tl.uint32, bitcast=True) + 0x9E3779B9)
        key = _mix32(_mix32(key ^ (value >> 32).to(tl.uint32)) ^ value.to(tl.uint32))
    return key


@triton.jit
def row_keys(key, head, row):
    """r of rows, uint32 in row's shape. head: 0 where there are no heads."""
    return _mix32(_mix32(key ^ head) ^ row.to(tl.uint32)) | 1


@triton.jit
def column_keys(key, column):
    """c of columns, uint32 in column's shape."""
    return _mix32(column.to(tl.uint32) ^ _mix32(key + 0x9E3779B9))


@triton.jit
def dropout_words(r, c, PTX: tl.constexpr = False):
    """The 32-bit words of positions, for r and c that broadcast. PTX: whether inline assembly may be PTX."""
    x = c ^ r
    if PTX:  # LLVM multiplies an r from outside a loop in 64 bits, three instructions for this one
        product = tl.inline_asm_elementwise(
            "mul.wide.u32 $0, $1, $2;", "=l,r,r", [r, x], dtype=tl.uint64, is_pure=True, pack=1
        )
    else:
        product = r.to(tl.uint64) * x
    return (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)


@triton.jit
def keep_tile(key, row, column, threshold):
    """The mask of row and column indices that broadcast, True where kept. threshold: `threshold_bits(p)`."""
    words = dropout_words(row_keys(key, 0, row), column_keys(key, column))
    return words >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def keep_signs(key, head, start_q, q, start_k, k, threshold, PTX: tl.constexpr = False):
    """The mask of a tile of attention scores, packed: words, and which byte of its word is an element's. Without PTX, True where kept.

    A byte's sign bit is set where its element is kept: its seven bits plus 128 - threshold never carry over.

    start_q, start_k: the tile's position, multiples of 16. q and k: int32 positions within it that broadcast, (Q, 1) and
    (1, K), or (1, Q) and (K, 1) for a transposed tile: their bit 3 is cleared before hashing, so that the compiler
    computes a word that elements share only once. threshold: `attention_threshold(p)`.
    """
    # q & ~8 would leave LLVM two forms of one position, and both would be hashed
    r = row_keys(key, head, start_q + (q - (q & 8)))
    c = column_keys(key, start_k + (k - (k & 8)))
    words = dropout_words(r, c, PTX)
    byte = 2 * ((q >> 3) & 1) + ((k >> 3) & 1)
    if PTX:
        signs = (words & 0x7F7F7F7F) + (128 - threshold).to(tl.uint32) * 0x01010101
    else:  # comparing a byte in place saves the shift
        unit = (1 << (8 * byte)).to(tl.uint32)
        signs = (words & (unit * 127)) >= unit * threshold.to(tl.uint32)
    return signs, byte


@triton.jit
def keep_scores(key, head, q, k, threshold):
    """The mask of `keep_signs` for positions q and k, True where kept."""
    kept, _ = keep_signs(key, head, 0, q, 0, k, threshold)
    return kept


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)
