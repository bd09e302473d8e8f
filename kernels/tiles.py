"""Tile sizes by kernel, GPU architecture and width: tables, with the origin of each row.

A launcher looks up its row; nothing is tuned at start-up. Measured rows are pasted from `python -m fusedgpt.bench tiles`.
An "offline" row was chosen without a GPU, by registers and spills (`make kernels-report`); a "counted" one also by what
GPT-2's shapes (B 64, T 1024, C 768, bfloat16) execute on sm_90 (`python -m fusedgpt.bench counts`), and its origin says how
much, without · with dropout. An architecture without rows of its own uses "any", which must not spill on any architecture.

Stages, for NVIDIA: with n stages, n - 1 tiles are requested ahead, and an iteration begins by waiting for the oldest and
ends by requesting the next. So 2 stages have nothing in flight while they compute (`async_wait {num = 0}` in the TTGIR,
`cp.async.wait_group 0` in the PTX), and no row has 2: 3 keep one iteration's tiles in flight. For AMD 2 stages do: the next
tile is loaded into registers at the top of the loop and stored to shared memory at its end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, TypeVar

import torch

from ._triton import INTERPRETED


class Hardware(NamedTuple):
    architecture: str  # "sm_90", "gfx942", or "interpreter"
    multiprocessors: int


FEW = 2  # multiprocessors: several partial sums, and several tiles a program
_few = False


def hardware(device: torch.device) -> Hardware:
    """The key of the tables. Triton's interpreter counts as few multiprocessors."""
    found = _hardware(device)
    return found._replace(multiprocessors=FEW) if _few else found


@contextmanager
def few_multiprocessors() -> Iterator[None]:
    """Launch as on a small GPU, so that a persistent program takes several tiles where there are few rows."""
    global _few
    outer, _few = _few, True
    try:
        yield
    finally:
        _few = outer


@cache
def _hardware(device: torch.device) -> Hardware:
    if INTERPRETED:
        return Hardware("interpreter", FEW)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Hardware(properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Hardware(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


class Tile(NamedTuple):
    """The tile of a kernel over rows."""

    limit: int  # the widest row it serves
    block: int  # columns a program holds at once; a narrower row takes the next power of two
    rows: int  # rows a program holds at once
    warps: int
    stages: int  # of the loop over tiles; 1: nothing is prefetched
    programs: int  # persistent programs per multiprocessor; 0: one program per tile
    origin: str


class MatmulTile(NamedTuple):
    """The tile of a fused matmul, (M, K) times (K, N) with an epilogue."""

    limit: int  # the widest model it serves
    rows: int  # of the result; 0: the library's matmul and a separate pass
    block: int  # columns of the result
    depth: int  # of K at once
    warps: int
    stages: int  # of the loop over K
    split: int  # pieces that the epilogue processes one after another
    programs: int  # persistent programs per multiprocessor
    origin: str


class OnePassTile(NamedTuple):
    """The tile of attention's one-pass backward, and where one pass is expected to win."""

    limit: int  # the widest head it serves
    block: int  # keys
    rows: int  # queries; 0: two passes
    warps: int
    stages: int  # of the loop over queries
    programs: int  # per multiprocessor; each owns a head at a time
    busy: int  # percent of these programs that must have a head, averaged over the kernel's run time
    cached: int  # MiB that the dq accumulators may take, one for each program
    origin: str


_Row = TypeVar("_Row", Tile, OnePassTile)
ANY = 1 << 31
_OFFLINE = "offline"

# Persistent programs keep the parameters and the dropout keys of their columns in registers. Up to 768 columns a warp takes
# whole rows, 24 elements a thread: it sums them without another's help, and no lane is idle beyond 768, as a quarter of 4
# warps on a row of 1024 would be. Wider, the backward's sums would spill, and several warps share a row, 8 to 16 elements a
# thread. All programs are resident at once: one that waits for another to end would double the time. `make kernels-report`
# checks that against occupancy.
# "any" prefetches nothing: the other resident programs' loads are in flight meanwhile, 24 to 36 KB of a multiprocessor,
# and its few registers and no buffers let more programs be resident (float32 has to fit into 99 KiB of consumer GPUs).
_FORWARD = (
    Tile(64, 64, 16, 1, 1, 12, _OFFLINE),
    Tile(256, 256, 4, 1, 1, 16, _OFFLINE),
    Tile(512, 512, 2, 2, 1, 6, _OFFLINE),
    Tile(768, 1024, 4, 4, 1, 2, _OFFLINE),
    Tile(1024, 1024, 2, 4, 1, 5, _OFFLINE),
    Tile(2048, 2048, 1, 4, 1, 4, _OFFLINE),
    Tile(4096, 4096, 1, 8, 1, 2, _OFFLINE),
    Tile(8192, 8192, 1, 16, 1, 1, _OFFLINE),
    Tile(ANY, 4096, 1, 8, 1, 0, _OFFLINE),
)
_BACKWARD = (
    Tile(64, 64, 8, 1, 1, 12, _OFFLINE),
    Tile(256, 256, 4, 1, 1, 8, _OFFLINE),
    Tile(512, 512, 2, 2, 1, 5, _OFFLINE),
    Tile(768, 1024, 4, 4, 1, 2, _OFFLINE),
    Tile(1024, 1024, 2, 4, 1, 4, _OFFLINE),
    Tile(2048, 2048, 1, 4, 1, 3, _OFFLINE),
    Tile(4096, 4096, 1, 8, 1, 1, _OFFLINE),
    Tile(ANY, 2048, 1, 8, 1, 0, _OFFLINE),
)
# Data-centre GPUs have two to four times the bandwidth of a multiprocessor and 163 KiB or more of shared memory. Bytes in
# flight are a program's whole tile: at 768 columns in bfloat16 forward 2 x 24 KB, backward 2 x 36 KB. A fourth stage takes
# shared memory and 10 to 30 registers, which cost a resident program at most widths. 1024 columns: float32 takes 32 KiB,
# so four programs; backward up to 166 registers, so three. 2048: up to 158 registers. Forward at 4096: 151 registers
# leave one program of 8 warps, where without a prefetch two are resident.
_FORWARD_PREFETCHED = (
    *_FORWARD[:2],
    Tile(512, 512, 2, 2, 3, 6, _OFFLINE),
    Tile(768, 1024, 4, 4, 3, 2, "counted: 298 · 627 instructions a row"),
    Tile(1024, 1024, 2, 4, 3, 4, _OFFLINE),
    Tile(2048, 2048, 1, 4, 3, 3, _OFFLINE),
    _FORWARD[6],
    Tile(8192, 8192, 1, 16, 3, 1, _OFFLINE),
    _FORWARD[8],
)
_BACKWARD_PREFETCHED = (
    *_BACKWARD[:2],
    Tile(512, 512, 2, 2, 3, 4, _OFFLINE),
    Tile(768, 1024, 4, 4, 3, 2, "counted: 487 · 774 instructions a row"),
    Tile(1024, 1024, 2, 4, 3, 3, _OFFLINE),
    Tile(2048, 2048, 1, 4, 3, 2, _OFFLINE),
    Tile(4096, 4096, 1, 8, 3, 1, _OFFLINE),
    _BACKWARD[7],
)
_DATA_CENTRE = ("sm_80", "sm_90", "sm_100")
_INTERPRETER = (Tile(128, 128, 16, 1, 1, 1, ""), Tile(ANY, 64, 4, 1, 1, 0, ""))

LAYER_NORM_FORWARD: dict[str, tuple[Tile, ...]] = {
    "any": _FORWARD,
    **dict.fromkeys(_DATA_CENTRE, _FORWARD_PREFETCHED),
    "interpreter": _INTERPRETER,
}
LAYER_NORM_BACKWARD: dict[str, tuple[Tile, ...]] = {
    "any": _BACKWARD,
    **dict.fromkeys(_DATA_CENTRE, _BACKWARD_PREFETCHED),
    # float32 in three stages takes 96 KiB at 768 columns, which leaves one program
    "sm_80": (*_BACKWARD_PREFETCHED[:3], _BACKWARD[3], *_BACKWARD_PREFETCHED[4:]),
    "interpreter": _INTERPRETER,
}


# Attention: limit is the head dimension, rows are queries, block is keys. "any" suits the tensor cores of Ampere and Ada
# and stays below the 99 KiB of shared memory of consumer GPUs; its dk, dv at 64 have 4 stages, as the smallest tiles.
# sm_90 forward: with 64 queries a tile, 12 × 64 heads of 1024 would fetch 1.8 GB of keys and values, with 128 half of that.
# At 64 two programs of 4 warps are resident, so that one multiplies while the other computes exponentials, which one
# program of 8 warps over 128 keys waits for; a program takes 24,400 warp instructions, one of 8 warps 25,000. 4 stages take
# 550 more and serve nothing: the loops are 2 to 14 tiles long.
# float32 multiplies without tensor cores, from registers: heads wider than 64 spill at any tile, and 1 stage leaves
# registers for four programs.
# Registers on sm_90 by descriptor at width 64, without · with dropout (Triton 3.6 | 3.9):
#     forward 193 · 208 | 194 · 222    dq 122 · 141 | 122 · 142    dk, dv 191 · 224 | 190 · 223
# By pointer sm_90's dk, dv spilled there under 3.6, 12 bytes at 64 and 32 at 128, when delta was loaded earlier: what no
# descriptor can hold uses the sizes of "any".
# "any" on sm_80 with first_key: 8 bytes in dk, dv at 64, under 3.6 alone; 8 warps do not spill, but leave one program.
# sm_100 forward at 128: 64 keys a tile spill 28 bytes under 3.6; 128 keys take 225 of 227 KiB.
# Architectures that load by tensor descriptor, and the rows for what no descriptor can hold:
# Triton 3.6 puts no fence.proxy.async between cp.async and the wgmma that reads its data; one stage loads through registers,
# with the fence.
DESCRIPTORS = {"sm_90": "sm_90 by pointer", "sm_100": "sm_100 by pointer"}
ATTENTION_FORWARD: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(64, 64, 128, 8, 3, 0, _OFFLINE), Tile(128, 32, 128, 8, 3, 0, _OFFLINE)),
    "sm_90": (
        Tile(64, 64, 128, 4, 3, 0, "counted: 151 · 201 M instructions"),
        Tile(128, 64, 128, 8, 3, 0, _OFFLINE),
    ),
    "sm_90 by pointer": (Tile(64, 64, 128, 8, 1, 0, _OFFLINE), Tile(128, 32, 128, 8, 1, 0, _OFFLINE)),
    "sm_100": (Tile(64, 64, 128, 8, 3, 0, _OFFLINE), Tile(128, 128, 128, 8, 3, 0, _OFFLINE)),
    "sm_100 by pointer": (Tile(128, 64, 128, 8, 3, 0, _OFFLINE),),
    "gfx942": (
        Tile(16, 32, 128, 4, 1, 0, _OFFLINE),  # 2 stages spill 56 bytes with dropout under 3.9
        Tile(64, 32, 128, 4, 2, 0, _OFFLINE),
        Tile(128, 32, 128, 8, 2, 0, _OFFLINE),
    ),
    "float32": (Tile(64, 32, 32, 4, 1, 0, _OFFLINE),),
    "interpreter": (Tile(128, 16, 32, 1, 1, 0, ""),),
}
ATTENTION_QUERY: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(64, 64, 128, 8, 3, 0, _OFFLINE), Tile(128, 32, 64, 4, 3, 0, _OFFLINE)),
    "sm_90": (Tile(64, 64, 128, 8, 3, 0, _OFFLINE), Tile(128, 64, 128, 8, 3, 0, _OFFLINE)),
    "sm_90 by pointer": (Tile(64, 64, 128, 8, 1, 0, _OFFLINE), Tile(128, 32, 64, 4, 1, 0, _OFFLINE)),
    "sm_100": (Tile(128, 64, 128, 8, 3, 0, _OFFLINE),),
    "gfx942": (Tile(128, 32, 64, 4, 2, 0, _OFFLINE),),
    "float32": (Tile(64, 32, 32, 8, 1, 0, _OFFLINE),),
    "interpreter": (Tile(128, 32, 16, 1, 1, 0, ""),),
}
ATTENTION_KEY: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(64, 64, 32, 4, 4, 0, _OFFLINE), Tile(128, 64, 32, 8, 3, 0, _OFFLINE)),
    "sm_90": (Tile(64, 128, 64, 8, 3, 0, _OFFLINE), Tile(128, 128, 32, 8, 3, 0, _OFFLINE)),
    "sm_90 by pointer": (Tile(64, 64, 32, 4, 1, 0, _OFFLINE), Tile(128, 64, 32, 8, 1, 0, _OFFLINE)),
    "sm_100": (Tile(128, 128, 64, 8, 3, 0, _OFFLINE),),
    "sm_100 by pointer": (Tile(64, 64, 64, 8, 3, 0, _OFFLINE), Tile(128, 64, 32, 8, 3, 0, _OFFLINE)),
    "gfx942": (Tile(64, 64, 16, 4, 2, 0, _OFFLINE), Tile(128, 64, 16, 8, 2, 0, _OFFLINE)),
    "float32": (Tile(64, 32, 16, 4, 1, 0, _OFFLINE),),
    "interpreter": (Tile(128, 32, 16, 1, 1, 0, ""),),
}
# Decoding: few queries over a long cache, forward only. Memory-bound, so the query tile is the smallest that tensor cores
# take and the keys fill the pipeline.
ATTENTION_DECODE: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(64, 128, 16, 4, 3, 0, _OFFLINE), Tile(128, 64, 16, 4, 3, 0, _OFFLINE)),
    "gfx942": (Tile(64, 64, 16, 4, 2, 0, _OFFLINE), Tile(128, 32, 16, 4, 2, 0, _OFFLINE)),
    "float32": (Tile(64, 32, 16, 4, 1, 0, _OFFLINE),),
    "interpreter": (Tile(128, 16, 16, 1, 1, 0, ""),),
}
# The one-pass backward. Registers without · with dropout (Triton 3.6 | 3.9), at 64:
# 236 · 251 | 220 · 254, 114 KiB, no spill, 5 matmuls and 65 instructions for exponentials where two passes have 7 and 136.
# One program is resident, so nothing but its own prefetch hides a load.
# 128 queries a tile spill, 64 to 488 bytes, with 64 keys or 128. 64 × 64 with 4 warps, two programs per multiprocessor,
# adds twice the bytes to dq, and with 2 stages spilled 32 bytes with dropout under 3.9, by pointer 12 to 100.
# At 128 two passes remain: only 64 keys × 32 queries do not spill (236 · 250 registers), with matmuls too small for wgmma.
# Two passes have 1.4 times the matmuls, so one pass may leave a quarter of the GPU idle; 48 MiB of an H200's cache hold
# the dq accumulators.
TWO_PASSES = OnePassTile(ANY, 0, 0, 0, 0, 0, 0, 0, _OFFLINE)
ATTENTION_ONE_PASS: dict[str, tuple[OnePassTile, ...]] = {
    "any": (TWO_PASSES,),
    "sm_90": (OnePassTile(64, 128, 64, 8, 3, 1, 75, 48, "counted: 293 · 371 M instructions"), TWO_PASSES),
}

# Reductions over rows that are read once: enough loads in flight at any width; offline there is nothing to tune.
COLUMN_SUM: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(ANY, 128, 32, 4, 1, 8, _OFFLINE),),
    "interpreter": (Tile(ANY, 32, 8, 1, 1, 2, ""),),
}
# The embedding's gradient: a row of up to 1024 bfloat16 is one 16-byte load per thread, so rows are added within threads.
EMBED: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(128, 128, 16, 4, 1, 0, _OFFLINE), Tile(ANY, 1024, 4, 4, 1, 0, _OFFLINE)),
    "interpreter": (Tile(ANY, 128, 16, 1, 1, 0, ""),),
}
ROW_SUMS: dict[str, tuple[Tile, ...]] = {
    "any": (
        Tile(128, 128, 8, 1, 1, 0, _OFFLINE),
        Tile(512, 512, 8, 2, 1, 0, _OFFLINE),
        Tile(ANY, 1024, 8, 4, 1, 0, _OFFLINE),
    ),
    "interpreter": (Tile(ANY, 128, 4, 1, 1, 0, ""),),
}


# The feed-forward sub-layer: element-wise passes beside the library's matmuls, 16 bytes per thread and row. The backward
# keeps partial sums for the bias's gradient: 89 registers in bfloat16 and 120 in float32, the forward has 48 and 64.
GELU_FORWARD: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(ANY, 256, 16, 4, 1, 5, _OFFLINE),),
    "interpreter": (Tile(ANY, 64, 16, 1, 1, 1, ""),),
}
GELU_BACKWARD: dict[str, tuple[Tile, ...]] = {
    "any": (Tile(ANY, 128, 16, 4, 1, 4, _OFFLINE),),
    "interpreter": (Tile(ANY, 64, 16, 1, 1, 1, ""),),
}

# Its matmuls with GELU as their epilogue, where a sweep showed one faster than the library's and a pass; no GPU has run
# the sweep yet. limit is C. float32 multiplies without tensor cores, which the library does faster.
LIBRARY = MatmulTile(ANY, 0, 0, 0, 0, 0, 0, 0, _OFFLINE)
MLP_UP: dict[str, tuple[MatmulTile, ...]] = {
    "any": (LIBRARY,),
    "interpreter": (MatmulTile(128, 64, 64, 32, 1, 1, 2, 1, ""), LIBRARY),
}
MLP_DOWN_GRADIENT: dict[str, tuple[MatmulTile, ...]] = {
    "any": (LIBRARY,),
    "interpreter": (MatmulTile(128, 64, 64, 32, 1, 1, 4, 1, ""), LIBRARY),
}


def matmul_tile(
    table: dict[str, tuple[MatmulTile, ...]], architecture: str, columns: int, float32: bool
) -> MatmulTile | None:
    """The row for a model's width; None where the library's matmul is faster."""
    if float32 and architecture != "interpreter":
        return None
    tile = matmul_row(table, architecture, columns)
    return tile if tile.rows else None


def matmul_row(table: dict[str, tuple[MatmulTile, ...]], architecture: str, columns: int) -> MatmulTile:
    return next(row for row in table.get(architecture, table["any"]) if columns <= row.limit)


# Cross-entropy: limit is the length of a row of logits, which two passes read. Few, wide programs, so that the rows in
# work (100 KB each at 50304 columns in bfloat16) are still cached for the second pass: 48 registers leave two programs, 27 MB
# on an H100 beside its 50 MB (Triton 3.6: 40 registers, three, 40 MB). One of 32 warps over 16384 columns would halve that
# but idle in each row's sums; 8 warps over 8192 spill under 3.6.
CROSS_ENTROPY: dict[str, tuple[Tile, ...]] = {
    "any": (
        Tile(1024, 1024, 1, 4, 1, 0, _OFFLINE),
        Tile(ANY, 8192, 1, 16, 1, 0, "counted: 33,300 instructions a row of 50304"),
    ),
    # 8192 columns spill 8 bytes in float32 with label smoothing
    "sm_100": (Tile(1024, 1024, 1, 4, 1, 0, _OFFLINE), Tile(ANY, 4096, 1, 16, 1, 0, _OFFLINE)),
    "interpreter": (Tile(ANY, 128, 1, 1, 1, 0, ""),),
}


def attention_row(architecture: str, float32: bool, descriptors: bool) -> str:
    """The key of attention's tables. descriptors: whether descriptors can hold every tensor that is read."""
    if architecture == "interpreter":
        return architecture
    if float32:
        return "float32"
    return architecture if descriptors else DESCRIPTORS.get(architecture, architecture)


def attention_tile(table: dict[str, tuple[_Row, ...]], name: str, head_dim: int) -> _Row:
    """The row for a head dimension."""
    return next(row for row in table.get(name) or table["any"] if head_dim <= row.limit)


def select(table: dict[str, tuple[Tile, ...]], architecture: str, columns: int) -> Tile:
    """The row for a width, its block reduced to the power of two that holds the width, but at least 16.

    With fewer elements than threads, several threads hold the same element; in-place, one could read what another wrote.
    """
    tile = next(row for row in table.get(architecture, table["any"]) if columns <= row.limit)
    return tile._replace(block=min(tile.block, max(next_power_of_two(columns), 16)))


def dropout_tile(columns: int) -> Tile:
    """4096 elements: 32 per thread, four 16-byte loads of bfloat16. No spills anywhere; nothing to tune."""
    block = min(next_power_of_two(columns), 1024)
    return Tile(ANY, block, 4096 // block, 4, 1, 0, _OFFLINE)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
