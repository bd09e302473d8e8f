"""What the tile sweep tries: for every table the timed work, the candidates, and an example that must be right.

An example is small and uneven; the work has full size, 65,536 tokens of GPT-2 on a large GPU.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ...kernels.examples import (
    Example,
    Tensors,
    add_layer_norm,
    as_tuple,
    causal_attention,
    draw,
    gelu_mlp,
    linear_cross_entropy,
)
from ...kernels.tiles import (
    ANY,
    ATTENTION_FORWARD,
    ATTENTION_KEY,
    ATTENTION_ONE_PASS,
    ATTENTION_QUERY,
    CROSS_ENTROPY,
    DESCRIPTORS,
    LAYER_NORM_BACKWARD,
    LAYER_NORM_FORWARD,
    LIBRARY,
    MLP_DOWN_GRADIENT,
    MLP_UP,
    TWO_PASSES,
    MatmulTile,
    OnePassTile,
    Tile,
    attention_tile,
    hardware,
    matmul_row,
    next_power_of_two,
    select,
)

WHOLE = 8192  # columns: wider rows are taken in blocks
MAX_ELEMENTS = 16384  # of a tile
PER_THREAD = (8, 32)  # elements of a tile, least and most: fewer load in small pieces, more spill
STAGES = (1, 3, 4)  # 2 leave nothing in flight, see tiles.py
UNEVEN_ROWS = 1037  # of the parity check
UNEVEN_LENGTH = 331  # of its sequences: some tiles whole, some on the diagonal, one ragged
LENGTH = 1024  # of the sequences that are timed
HEADS = 12

Row = Tile | MatmulTile | OnePassTile
Table = dict[str, Any]  # architecture to rows
Work = Callable[[int], object]  # runs once, on the inputs of that round


class Heads(NamedTuple):
    """A case of attention; a case of the other tables is a width."""

    width: int
    dropout: float

    def __str__(self) -> str:
        return f"{self.width}" + (f" dropout {self.dropout}" if self.dropout else "")


class Sweep(NamedTuple):
    """A table and how its rows are tried."""

    table: Table
    make_work: Callable[..., Work]  # from tokens, case, dtype and device: what is timed
    candidates: Callable[[int, str], Iterable[Row]]  # for rows of a block, on an architecture
    example: Callable[[Any], Example]  # of a case
    present: Callable[[Table, str, Any], Row]  # the table's row for an architecture and a case
    blocks: Callable[[Sequence[int]], dict[int, Sequence[Any]]]  # from widths: the cases of every block
    float32: bool = False  # whether float32 uses these rows


@contextmanager
def in_table(table: Table, architecture: str, tile: Row) -> Iterator[None]:
    """Put the tile into the table, for every width of one architecture and any number of heads."""
    before = table.get(architecture)
    tile = tile._replace(limit=ANY)
    table[architecture] = (tile._replace(busy=0, cached=ANY) if isinstance(tile, OnePassTile) else tile,)
    try:
        yield
    finally:
        if before is None:
            del table[architecture]
        else:
            table[architecture] = before


@contextmanager
def by_pointer(architecture: str, width: int) -> Iterator[None]:
    """Run attention without descriptors, with the rows for that."""
    name = DESCRIPTORS.pop(architecture)
    try:
        with ExitStack() as rows:
            for table in (ATTENTION_FORWARD, ATTENTION_QUERY, ATTENTION_KEY):
                rows.enter_context(in_table(table, architecture, attention_tile(table, name, width)))
            rows.enter_context(in_table(ATTENTION_ONE_PASS, architecture, TWO_PASSES))
            yield
    finally:
        DESCRIPTORS[architecture] = name


# ---- cases and work


def _grouped(limit: Callable[[int], int], widths: Sequence[int]) -> dict[int, Sequence[int]]:
    """Widths that share a row, by its limit; those above WHOLE are taken in blocks."""
    groups = defaultdict(list)
    for width in sorted(widths):
        groups[min(limit(width), 2 * WHOLE)].append(width)
    return dict(groups)


_by_width = partial(_grouped, next_power_of_two)
_by_row = partial(_grouped, lambda width: select(LAYER_NORM_FORWARD, "sm_90", width).limit)


HEADS_OF_64, HEADS_OF_128 = ([Heads(width, p) for p in (0.0, 0.1)] for width in (64, 128))


def _by_head(_: Sequence[int]) -> dict[int, Sequence[Heads]]:
    return {64: HEADS_OF_64, 128: HEADS_OF_128}


def _vocabulary(_: Sequence[int]) -> dict[int, Sequence[int]]:
    return {2 * WHOLE: [50304]}


# Full size: what is timed


def _mlp(rows: int, columns: int) -> Example:
    """As GPT-2's blocks call it."""
    return gelu_mlp(rows, columns, b_proj=None)


def _heads(rows: int, heads: Heads) -> Example:
    length = min(rows, LENGTH)
    return causal_attention(rows // length, length, HEADS, heads.width, heads.dropout)


def _loss(rows: int, vocabulary: int) -> Example:
    """An eighth of the rows, two chunks, and few columns: the kernel takes most of the time, not the matmuls.

    The weight takes no gradient for the same reason. dx is made in the forward.
    """
    example = linear_cross_entropy(-(-rows // 8), 64, vocabulary)
    return replace(example, call=lambda weight, **rest: example.call(weight=weight.detach(), **rest))


def _two_inputs(example: Example, dtype: torch.dtype, device: torch.device) -> list[Tensors]:
    """With float32 masters, as in training."""
    return [draw(example, device, dtype, torch.float32, seed=seed) for seed in range(2)]


def _forward(make: Callable[..., Example], rows: int, case: Any, *where: Any) -> Work:
    example = make(rows, case)
    inputs = _two_inputs(example, *where)
    return lambda i: example.call(**inputs[i % 2])


def _backward(make: Callable[..., Example], rows: int, case: Any, *where: Any) -> Work:
    example = make(rows, case)
    graphs = []
    for tensors in _two_inputs(example, *where):
        outputs = as_tuple(example.call(**tensors))
        leaves = [t for t in tensors.values() if t.requires_grad]
        graphs.append((outputs, leaves, [torch.randn_like(y) for y in outputs]))
    return lambda i: torch.autograd.grad(*graphs[i % 2], retain_graph=True)


def _two_passes(*sizes: Any) -> Work:
    """The backward of attention in two passes."""
    work, architecture = _backward(_heads, *sizes), hardware(sizes[-1]).architecture

    def backward(i: int) -> object:
        with in_table(ATTENTION_ONE_PASS, architecture, TWO_PASSES):
            return work(i)

    return backward


# Small and uneven: what must be right


def _norm_example(columns: int) -> Example:
    return add_layer_norm(UNEVEN_ROWS, columns, 0.1)


def _mlp_example(columns: int) -> Example:
    """Enough rows for every multiprocessor to have a tile."""
    return gelu_mlp(4 * UNEVEN_ROWS, columns)


def _heads_example(heads: Heads) -> Example:
    """Four heads: too few for one pass in the table, but a candidate takes any number."""
    return causal_attention(2, UNEVEN_LENGTH, 2, heads.width, heads.dropout)


def _loss_example(vocabulary: int) -> Example:
    """The vocabulary ends within a block."""
    return linear_cross_entropy(37, 64, vocabulary - 3, 3)


# ---- candidates


def candidates(limit: int, _: str = "") -> Iterator[Tile]:
    """Tiles for rows of up to `limit` columns, on any architecture; above WHOLE rows are taken in blocks."""
    block = next_power_of_two(limit)
    if block > WHOLE:
        for size, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
            if _fits(size, warps):
                yield Tile(ANY, size, 1, warps, 1, 0, "")
        return
    for rows, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        if _fits(rows * block, warps):
            for stages, programs in itertools.product(STAGES, (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)):
                if programs * warps <= 64:  # resident on a multiprocessor
                    yield Tile(limit, block, rows, warps, stages, programs, "")


def _fits(elements: int, warps: int) -> bool:
    return elements <= MAX_ELEMENTS and PER_THREAD[0] <= elements / (32 * warps) <= PER_THREAD[1]


def _forms(own: dict[str, tuple[MatmulTile, ...]], _: int, architecture: str) -> tuple[MatmulTile, ...]:
    return (*own.get(architecture, ()), LIBRARY)


def _beside(other: dict[str, tuple[Tile, ...]], own: dict[str, tuple[Tile, ...]], queries: bool) -> Callable:
    """Candidates for one pass, the other's tile fixed.

    The pass over keys reads statistics in whole tiles of queries, which the pass over queries has written.
    """

    def beside(width: int, architecture: str) -> list[Tile]:
        rows = attention_tile(other, architecture, width).rows
        tiles = _of_head(own, width, architecture)
        return [tile for tile in tiles if (tile.rows % rows if queries else rows % tile.rows) == 0]

    return beside


def _of_head(own: dict[str, tuple[Any, ...]], width: int, architecture: str) -> list[Any]:
    return [tile for tile in own.get(architecture, ()) if tile.limit == width]


def _passes(width: int, architecture: str) -> list[OnePassTile]:
    return [*_of_head(ONE_PASS_TILES, width, architecture), TWO_PASSES]


def _head_row(table: dict[str, Any], architecture: str, heads: Heads) -> Any:
    return attention_tile(table, architecture, heads.width)


# Attention has few candidates, as each takes seconds to compile: those that spill nothing, with or without dropout, under
# Triton 3.6, and did not under 3.9 with 2 stages. With 3 or 4 stages not all were compiled again: under 3.9 the rows of
# tiles.py and 128 × 128 forward, of one pass its row alone. Heads of 128 have one candidate for it: 64 × 64 spills 4 bytes,
# 128 keys 256.
FORWARD_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(64, 64, 128, 4, 1, 0, ""),
        Tile(64, 64, 128, 4, 3, 0, ""),
        Tile(64, 64, 128, 4, 4, 0, ""),
        Tile(64, 64, 128, 8, 3, 0, ""),
        Tile(64, 128, 128, 8, 3, 0, ""),
        Tile(64, 128, 128, 8, 4, 0, ""),
        Tile(128, 64, 128, 8, 3, 0, ""),
        Tile(128, 64, 128, 8, 4, 0, ""),
        Tile(128, 128, 128, 8, 1, 0, ""),
        Tile(128, 128, 128, 8, 3, 0, ""),
    )
}
QUERY_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(64, 64, 128, 8, 3, 0, ""),
        Tile(64, 64, 128, 8, 4, 0, ""),
        Tile(64, 64, 64, 4, 1, 0, ""),
        Tile(64, 64, 64, 4, 3, 0, ""),
        Tile(64, 128, 128, 8, 3, 0, ""),
        Tile(128, 64, 128, 8, 3, 0, ""),
        Tile(128, 64, 64, 4, 1, 0, ""),
        Tile(128, 64, 64, 4, 3, 0, ""),
    )
}
KEY_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(64, 64, 64, 4, 1, 0, ""),
        Tile(64, 64, 64, 4, 3, 0, ""),
        Tile(64, 64, 64, 4, 4, 0, ""),
        Tile(64, 128, 64, 8, 3, 0, ""),
        Tile(64, 128, 64, 8, 4, 0, ""),
        Tile(128, 128, 32, 8, 3, 0, ""),
        Tile(128, 128, 32, 8, 4, 0, ""),
    )
}
ONE_PASS_TILES: dict[str, tuple[OnePassTile, ...]] = {
    "sm_90": (
        OnePassTile(64, 128, 64, 8, 3, 1, 75, 48, ""),
        OnePassTile(64, 64, 64, 4, 3, 2, 75, 48, ""),
        OnePassTile(64, 128, 32, 8, 3, 1, 75, 48, ""),
        OnePassTile(64, 64, 64, 8, 3, 1, 75, 48, ""),
        OnePassTile(128, 64, 32, 8, 3, 1, 75, 72, ""),
    )
}

# The fused matmuls: one program per multiprocessor, whose tile reads least (168 registers up, 236 down), or two of half
# the size, so that one multiplies during the other's epilogue (167 and 178 registers, 112 and 104 KiB each; with an
# epilogue in two pieces the gradient takes 255 and the exact GELU spills).
MLP_UP_TILES: dict[str, tuple[MatmulTile, ...]] = dict.fromkeys(
    ("sm_90", "sm_100"),
    (
        MatmulTile(ANY, 128, 256, 64, 8, 4, 2, 1, ""),
        MatmulTile(ANY, 128, 128, 64, 4, 3, 2, 2, ""),
    ),
)
MLP_DOWN_GRADIENT_TILES: dict[str, tuple[MatmulTile, ...]] = dict.fromkeys(
    ("sm_90", "sm_100"),
    (
        MatmulTile(ANY, 128, 256, 64, 8, 3, 4, 1, ""),
        MatmulTile(ANY, 128, 128, 64, 4, 3, 4, 2, ""),
    ),
)

ATTENTION_WORKS = {"forward": partial(_forward, _heads), "backward": partial(_backward, _heads)}
_attention = partial(Sweep, example=_heads_example, present=_head_row, blocks=_by_head)
_mlp_sweep = partial(Sweep, example=_mlp_example, present=matmul_row, blocks=_by_width)
_norm_sweep = partial(
    Sweep, candidates=candidates, example=_norm_example, present=select, blocks=_by_row, float32=True
)
TABLES: dict[str, Sweep] = {
    "ATTENTION_ONE_PASS": _attention(ATTENTION_ONE_PASS, ATTENTION_WORKS["backward"], candidates=_passes),
    "ATTENTION_KEY": _attention(
        ATTENTION_KEY, _two_passes, candidates=_beside(ATTENTION_QUERY, KEY_TILES, False)
    ),
    "ATTENTION_QUERY": _attention(
        ATTENTION_QUERY, _two_passes, candidates=_beside(ATTENTION_KEY, QUERY_TILES, True)
    ),
    "ATTENTION_FORWARD": _attention(
        ATTENTION_FORWARD, ATTENTION_WORKS["forward"], candidates=partial(_of_head, FORWARD_TILES)
    ),
    "MLP_UP": _mlp_sweep(MLP_UP, partial(_forward, _mlp), partial(_forms, MLP_UP_TILES)),
    "MLP_DOWN_GRADIENT": _mlp_sweep(
        MLP_DOWN_GRADIENT, partial(_backward, _mlp), partial(_forms, MLP_DOWN_GRADIENT_TILES)
    ),
    "CROSS_ENTROPY": Sweep(
        CROSS_ENTROPY, partial(_forward, _loss), candidates, _loss_example, select, _vocabulary, True
    ),
    "LAYER_NORM_FORWARD": _norm_sweep(LAYER_NORM_FORWARD, partial(_forward, add_layer_norm)),
    "LAYER_NORM_BACKWARD": _norm_sweep(LAYER_NORM_BACKWARD, partial(_backward, add_layer_norm)),
}
