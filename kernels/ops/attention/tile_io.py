"""What the attention kernels share: their arguments, which tile a program owns, and how tiles are loaded and stored.

Tiles are loaded through a pointer, on any hardware, or through a tensor descriptor, which the copy engine (TMA) of
Hopper and newer reads: there the hardware computes addresses and fills in zeros beyond the end of a sequence.
Descriptors have four dimensions, (B, H, T, D): with fewer, a ragged tile would run into the next sequence or head.

Kernels take strides and compile-time constants as tuples. A tensor stays outside of them, since Triton 3.6 launches no
descriptor from within a tuple, and so does every number in NOT_SPECIALISED, since `do_not_specialize` does not reach
the members of a tuple: a kernel would be compiled again for a length of 1 or a multiple of 16.
"""

from typing import Any, NamedTuple

from ..._triton import tl, triton

NOT_SPECIALISED = ["heads", "n_head", "q_len", "k_len", "padded", "group", "stream", "threshold"]


class Strides(NamedTuple):
    """Of a (B, T, H, D) tensor, in elements. Those of D are 1."""

    b: int
    t: int
    h: int


class Meta(NamedTuple):
    """The compile-time constants of a kernel: every member is a `tl.constexpr`."""

    HEAD_DIM: Any
    BLOCK_D: Any  # HEAD_DIM as a power of two, at least 16
    BLOCK_M: Any  # queries of a tile
    BLOCK_N: Any  # keys of a tile
    STAGES: Any  # of the loop over tiles
    CAUSAL: Any
    WGMMA: Any  # whether matmuls are wgmma, which reads registers while the program goes on
    PTX: Any  # whether inline assembly may be PTX


class Head(NamedTuple):
    """One head of a (B, T, H, D) tensor, as `load` and `store` take it."""

    source: Any  # pointer to the head's first element, or a descriptor of the whole tensor
    batch: Any
    head: Any
    stride_t: Any
    length: Any  # T


@triton.jit
def place(tiles, group):
    """(batch · head, tile) of this program.

    `group` heads, as many as the cache holds, take turns: all their first tiles come before all their second ones.
    """
    program = tl.program_id(0)
    first = program // (group * tiles) * group
    turns = tl.minimum(tl.num_programs(0) // tiles - first, group)
    within = program - first * tiles
    return first + within % turns, within // turns


@triton.jit
def head_of(x, strides, batch, head, length):
    """One head of x, a pointer or a descriptor of (B, length, H, D)."""
    if isinstance(x, tl.tensor_descriptor):
        return Head(x, batch, head, strides.t, length)
    else:
        start = x + tl.cast(batch, tl.int64) * strides.b + tl.cast(head, tl.int64) * strides.h
        return Head(start, batch, head, strides.t, length)


@triton.jit
def head_of_contiguous(x, n_head, batch, head, length, meta):
    """One head of x, a pointer or a descriptor of a contiguous (B, length, n_head, D)."""
    stride_t = n_head * meta.HEAD_DIM
    return head_of(x, Strides(length.to(tl.int64) * stride_t, stride_t, meta.HEAD_DIM), batch, head, length)


@triton.jit
def _rows_of(acc, row, padded, meta):
    """acc[row], for acc a pointer to a contiguous (rows, padded, D)."""
    return Head(acc + row.to(tl.int64) * padded * meta.HEAD_DIM, 0, row, meta.HEAD_DIM, padded)


@triton.jit
def _pointers(head, start, ROWS: tl.constexpr, meta):
    """Pointers to ROWS rows from `start` on. Offsets within a tile fit in 32 bits: the launcher sees to it."""
    within = tl.arange(0, ROWS)[:, None] * head.stride_t + tl.arange(0, meta.BLOCK_D)[None, :]
    return head.source + tl.cast(start, tl.int64) * head.stride_t + within


@triton.jit
def _bounds(head, start, ROWS: tl.constexpr, MASKED: tl.constexpr, meta):
    """Which elements of a tile exist, or None where all do. MASKED: rows may lie beyond the head's length."""
    rows = (start + tl.arange(0, ROWS) < head.length)[:, None]
    columns = (tl.arange(0, meta.BLOCK_D) < meta.HEAD_DIM)[None, :]
    if MASKED:
        mask = rows & columns if meta.BLOCK_D != meta.HEAD_DIM else rows
    elif meta.BLOCK_D != meta.HEAD_DIM:
        mask = columns
    else:
        mask = None
    return mask


@triton.jit
def load(head, start, ROWS: tl.constexpr, MASKED: tl.constexpr, meta):
    """A tile (ROWS, BLOCK_D) of a head, zeros beyond its rows and columns."""
    if isinstance(head.source, tl.tensor_descriptor):  # of (B, H, T, D); the hardware fills in the zeros
        return head.source.load([head.batch, head.head, start, 0]).reshape(ROWS, meta.BLOCK_D)
    else:
        pointers = _pointers(head, start, ROWS, meta)
        mask = _bounds(head, start, ROWS, MASKED, meta)
        return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store(head, value, start, ROWS: tl.constexpr, meta):
    """Write a tile (ROWS, BLOCK_D) through a pointer, as far as its rows and columns exist."""
    pointers = _pointers(head, start, ROWS, meta)
    mask = _bounds(head, start, ROWS, True, meta)
    tl.store(pointers, value.to(head.source.dtype.element_ty), mask=mask)


@triton.jit
def as_operand(x, dtype: tl.constexpr, meta):
    """x, float32, in `dtype`, as the first operand of a matmul.

    wgmma reads it from registers, which must be written before the `wgmma.fence` in front of it. Triton 3.6 does not tie
    them to the fence, and LLVM moved selects of dropped elements and their packing behind it. It moves no assembly.
    """
    if meta.WGMMA and dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    elif meta.WGMMA and dtype == tl.float16:
        y = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16, is_pure=False, pack=2
        )
    else:
        y = x.to(dtype)
    return y


@triton.jit
def drop(x, keep, meta):
    """x with zeros where `keep`, the result of `keep_signs`, drops an element. A byte's sign becomes a mask in one `prmt`."""
    signs, byte = keep
    selector = 0x8888 + 0x1111 * byte  # of four bytes, each the sign of this one
    if meta.PTX and x.dtype == tl.float32:
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 m; prmt.b32 m, $2, 0, $3; and.b32 $0, $1, m; }",
            "=r,r,r,r", [x, signs, selector], dtype=x.dtype, is_pure=True, pack=1,
        )  # fmt: skip
    elif meta.PTX:  # two elements at once: bytes of the second one's word count from four
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 m, s; and.b32 s, $4, 0x00FF; and.b32 m, $5, 0xFF00; or.b32 s, s, m; add.u32 s, s, 0x4400;"
            "prmt.b32 m, $2, $3, s; and.b32 $0, $1, m; }",
            "=r,r,r,r,r,r", [x, signs, selector], dtype=x.dtype, is_pure=False, pack=2,
        )  # fmt: skip
    else:
        y = tl.where(signs, x, 0.0)
    return y


@triton.jit
def load_stats(stats, row, start, padded, ROWS: tl.constexpr):
    """ROWS numbers of a row of stats, float32 (rows, padded), from `start` on.

    A descriptor fetches them in one request: by pointers Triton 3.6 copies four bytes a time in every thread, which
    spills.
    """
    if isinstance(stats, tl.tensor_descriptor):
        return stats.load([row, start]).reshape(ROWS)
    else:
        return tl.load(stats + row.to(tl.int64) * padded + start + tl.arange(0, ROWS))


@triton.jit
def store_stats(stats, lse, delta, bh, row, start, q_len, padded, ROWS: tl.constexpr):
    """Write what `load_stats` reads: lse[bh] in row 2 · row, delta in row 2 · row + 1. Returns lse.

    Rows beyond q_len get +inf, and so a P of exp2(-inf) = 0.
    """
    offs_m = start + tl.arange(0, ROWS)
    lse_i = tl.load(lse + tl.cast(bh, tl.int64) * q_len + offs_m, mask=offs_m < q_len, other=float("inf"))
    if isinstance(stats, tl.tensor_descriptor):
        stats.store([2 * row, start], lse_i.reshape(1, ROWS))
        stats.store([2 * row + 1, start], delta.reshape(1, ROWS))
    else:
        pointers = stats + 2 * row.to(tl.int64) * padded + offs_m
        tl.store(pointers, lse_i, mask=offs_m < padded)
        tl.store(pointers + padded, delta, mask=offs_m < padded)
    return lse_i


@triton.jit
def load_scratch(acc, row, start, padded, ROWS: tl.constexpr, meta):
    """acc[row, start : start + ROWS], for acc (rows, padded, D)."""
    if isinstance(acc, tl.tensor_descriptor):
        return acc.load([row, start, 0]).reshape(ROWS, meta.BLOCK_D)
    else:
        return load(_rows_of(acc, row, padded, meta), start, ROWS, False, meta)


@triton.jit
def store_scratch(acc, row, start, padded, value, ROWS: tl.constexpr, meta):
    """acc[row, start : start + ROWS] = value, by the engine that adds to it where there is one."""
    if isinstance(acc, tl.tensor_descriptor):
        acc.store([row, start, 0], value.reshape(1, ROWS, meta.BLOCK_D))
    else:
        store(_rows_of(acc, row, padded, meta), value, start, ROWS, meta)


@triton.jit
def add(acc, row, start, padded, value, ROWS: tl.constexpr, meta):
    """acc[row, start : start + ROWS] += value. No other program adds to this row."""
    if isinstance(acc, tl.tensor_descriptor):
        acc.atomic_add([row, start, 0], value.reshape(1, ROWS, meta.BLOCK_D))
    else:
        pointers = _pointers(_rows_of(acc, row, padded, meta), start, ROWS, meta)
        mask = tl.arange(0, meta.BLOCK_D)[None, :] < meta.HEAD_DIM
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def wait_for_scratch(acc):
    """Wait until what this program wrote and added is in memory, before it reads that or adds to it again: sums have one order.

    The copy engine writes and reads in the asynchronous proxy, whose accesses the fence puts in order. (PTX ISA, 9.7.13.4 membar/fence)
    """
    if isinstance(acc, tl.tensor_descriptor):
        # Triton before 3.9 waits until the engine has read the shared memory, not until it has written
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.b32 $0, $1;",
            "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
