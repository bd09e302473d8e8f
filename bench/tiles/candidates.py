"""What the tile sweep tries: for every table the work that is timed, the candidates, and what must stay right.

An example is small and uneven; the work has full size, 65,536 tokens of GPT-2 on a large GPU.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import add_layer_norm, causal_attention, gelu_mlp, linear_cross_entropy
from ...kernels.selfcheck import Example
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
    MLP_DOWN_GRADIENT_TILES,
    MLP_UP,
    MLP_UP_TILES,
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
UNEVEN_ROWS = 1037  # of the parity check
UNEVEN_LENGTH = 331  # of its sequences: some tiles whole, some on the diagonal, one ragged
LENGTH = 1024  # of the sequences that are timed
HEADS = 12

Row = Tile | MatmulTile | OnePassTile
Table = dict[str, Any]  # architecture to rows
Work = Callable[[int], object]  # does it once, on the inputs of that round


class Heads(NamedTuple):
    """A case of attention, where a case of the other tables is a width."""

    width: int
    dropout: float

    def __str__(self) -> str:
        return f"{self.width}" + (f" dropout {self.dropout}" if self.dropout else "")


class Sweep(NamedTuple):
    """A table, and how a row of it is tried."""

    table: Table
    make_work: Callable[..., Work]  # of tokens, case, dtype and device: what is timed
    candidates: Callable[[int, str], Iterable[Row]]  # for rows of a block, on an architecture
    example: Callable[[Any], Example]  # of a case: what must be right
    present: Callable[[Table, str, Any], Row]  # the table's row for an architecture and a case
    blocks: Callable[[Sequence[int]], dict[int, Sequence[Any]]]  # of widths: the cases of every block
    float32: bool = False  # whether float32 looks at these rows


@contextmanager
def in_table(table: Table, architecture: str, tile: Row) -> Iterator[None]:
    """The table with this tile for every width of one architecture, and any number of heads."""
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
    """Attention over heads of a width as it runs without descriptors, by the rows that are for that."""
    name = DESCRIPTORS.pop(architecture)
    try:
        with ExitStack() as rows:
            for table in (ATTENTION_FORWARD, ATTENTION_QUERY, ATTENTION_KEY):
                rows.enter_context(in_table(table, architecture, attention_tile(table, name, width)))
            rows.enter_context(in_table(ATTENTION_ONE_PASS, architecture, TWO_PASSES))
            yield
    finally:
        DESCRIPTORS[architecture] = name


# ---- what a table is timed at


def _by_width(widths: Sequence[int]) -> dict[int, Sequence[int]]:
    """Widths of one power of two have a row together; those above WHOLE are taken in blocks."""
    blocks = defaultdict(list)
    for width in sorted(widths):
        blocks[min(next_power_of_two(width), 2 * WHOLE)].append(width)
    return dict(blocks)


HEADS_OF_64, HEADS_OF_128 = ([Heads(width, p) for p in (0.0, 0.1)] for width in (64, 128))


def _by_head(_: Sequence[int]) -> dict[int, Sequence[Heads]]:
    return {64: HEADS_OF_64, 128: HEADS_OF_128}


def _vocabulary(_: Sequence[int]) -> dict[int, Sequence[int]]:
    return {2 * WHOLE: [50304]}


Bound = tuple[Callable[[], Any], list[Tensor]]  # a call on full-size tensors, and those that take a gradient


def _norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Bound:
    """x and residual, then weight, bias and x_bias as float32 masters."""
    x, residual = (torch.randn(rows, columns, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias, x_bias = (torch.randn(columns, device=device).requires_grad_() for _ in range(3))
    call = partial(add_layer_norm, x, residual, weight, bias, x_bias=x_bias)
    return call, [x, residual, weight, bias, x_bias]


def _mlp(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Bound:
    """As GPT-2's blocks call it: x, then w_fc, b_fc and w_proj as float32 masters."""
    x = torch.randn(rows, columns, device=device).to(dtype).requires_grad_()
    shapes = ((4 * columns, columns), (4 * columns,), (columns, 4 * columns))
    w_fc, b_fc, w_proj = ((torch.randn(shape, device=device) / 32).requires_grad_() for shape in shapes)
    return partial(gelu_mlp, x, w_fc, b_fc, w_proj, None), [x, w_fc, b_fc, w_proj]


def _heads(rows: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> Bound:
    length = min(rows, LENGTH)
    qkv = (
        torch.randn(rows // length, length, 3 * HEADS * heads.width, device=device).to(dtype).requires_grad_()
    )
    seed = torch.tensor([1234567890123], device=device)
    return partial(causal_attention, qkv, HEADS, heads.dropout, seed), [qkv]


def _loss(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Bound:
    """An eighth of the rows, two chunks, and few columns: the kernel is to take most of the time, not the matmuls.

    The weight takes no gradient for the same reason. x's is made in the forward.
    """
    rows = -(-rows // 8)
    x = torch.randn(rows, 64, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64, device=device).to(dtype) / 8
    return partial(linear_cross_entropy, x, weight, torch.randint(vocabulary, (rows,), device=device)), [x]


def _forward(bind: Callable[..., Bound], *sizes: Any) -> Work:
    calls = [bind(*sizes)[0] for _ in range(2)]
    return lambda i: calls[i % 2]()


def _backward(bind: Callable[..., Bound], *sizes: Any) -> Work:
    graphs = []
    for _ in range(2):
        call, leaves = bind(*sizes)
        outputs = call()
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        graphs.append((outputs, leaves, [torch.randn_like(y) for y in several]))
    return lambda i: torch.autograd.grad(*graphs[i % 2], retain_graph=True)


def _two_passes(*sizes: Any) -> Work:
    """The backward of attention, which is to look at the rows of two passes."""
    work, architecture = _backward(_heads, *sizes), hardware(sizes[-1]).architecture

    def backward(i: int) -> object:
        with in_table(ATTENTION_ONE_PASS, architecture, TWO_PASSES):
            return work(i)

    return backward


# ---- what must be right


def _norm_example(columns: int) -> Example:
    """An input with rows left over, and all that the kernels can do."""
    shape = (UNEVEN_ROWS, columns)
    shapes = {"x": shape, "residual": shape, "weight": (columns,), "bias": (columns,), "x_bias": (columns,)}

    def call(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            t["x"], t["residual"], t["weight"], t["bias"], 1e-5, 0.1, t["seed"], 2, t["x_bias"]
        )

    return shapes, call


def _mlp_example(columns: int) -> Example:
    """Enough rows for every multiprocessor to have a tile: with fewer the library's matmul runs in any case."""
    hidden = 4 * columns
    shapes = {"x": (4 * UNEVEN_ROWS, columns), "w_fc": (hidden, columns), "b_fc": (hidden,)}
    shapes |= {"w_proj": (columns, hidden), "b_proj": (columns,)}
    # a power of two, so that it rounds nothing: pre-activations where GELU bends
    return shapes, lambda t: gelu_mlp(t["x"], t["w_fc"] / 32, t["b_fc"], t["w_proj"] / 32, t["b_proj"])


def _heads_example(heads: Heads) -> Example:
    """Four heads: too few for one pass, but for a candidate, which is taken for any number."""
    shapes = {"qkv": (2, UNEVEN_LENGTH, 3 * 2 * heads.width)}
    return shapes, lambda t: causal_attention(t["qkv"], 2, heads.dropout, t["seed"], 3)


def _loss_example(vocabulary: int) -> Example:
    """The vocabulary ends within a block."""
    shapes = {"x": (37, 64), "weight": (vocabulary, 64)}
    return shapes, lambda t: linear_cross_entropy(t["x"], t["weight"] / 8, t["targets"][:37], vocabulary - 3)


# ---- candidates


def candidates(block: int, _: str = "") -> Iterator[Tile]:
    """Tiles, on any architecture, for rows of `block` columns, a power of two; above WHOLE, for rows that are taken in blocks."""
    if block > WHOLE:
        for size, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
            if _fits(size, warps):
                yield Tile(ANY, size, 1, warps, 1, 0, "")
        return
    for rows, warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        if _fits(rows * block, warps):
            for stages, programs in itertools.product((1, 2), (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)):
                if programs * warps <= 64:  # what a multiprocessor has room for
                    yield Tile(block, block, rows, warps, stages, programs, "")


def _fits(elements: int, warps: int) -> bool:
    return elements <= MAX_ELEMENTS and PER_THREAD[0] <= elements / (32 * warps) <= PER_THREAD[1]


def _forms(own: dict[str, tuple[MatmulTile, ...]], _: int, architecture: str) -> tuple[MatmulTile, ...]:
    return (*own.get(architecture, ()), LIBRARY)


def _beside(other: dict[str, tuple[Tile, ...]], own: dict[str, tuple[Tile, ...]], queries: bool) -> Callable:
    """Candidates for one of the two passes beside the present row of the other.

    The pass over keys reads numbers of whole tiles of queries, which the pass over queries has written.
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


# Attention's are few, as each takes seconds to compile: those that spill nothing with or without dropout under Triton
# 3.6, and under 3.9 but for one pass over 64 × 64 with 4 warps (32 bytes with dropout). For heads of 128 that leaves
# one pass little: 64 × 64 spills 4 bytes, 128 keys 256.
FORWARD_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(64, 64, 128, 4, 3, 0, ""),
        Tile(64, 64, 128, 8, 3, 0, ""),
        Tile(64, 128, 128, 8, 2, 0, ""),
        Tile(64, 128, 128, 8, 3, 0, ""),
        Tile(128, 64, 128, 8, 2, 0, ""),
        Tile(128, 64, 128, 8, 3, 0, ""),
        Tile(128, 128, 128, 8, 2, 0, ""),
    )
}
QUERY_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(64, 64, 128, 8, 2, 0, ""),
        Tile(64, 64, 128, 8, 3, 0, ""),
        Tile(64, 128, 128, 8, 2, 0, ""),
        Tile(64, 64, 64, 4, 3, 0, ""),
        Tile(128, 64, 128, 8, 2, 0, ""),
        Tile(128, 64, 128, 8, 3, 0, ""),
        Tile(128, 64, 64, 4, 2, 0, ""),
    )
}
KEY_TILES: dict[str, tuple[Tile, ...]] = {
    "sm_90": (
        Tile(64, 64, 64, 4, 2, 0, ""),
        Tile(64, 64, 64, 4, 3, 0, ""),
        Tile(64, 128, 64, 8, 2, 0, ""),
        Tile(64, 128, 64, 8, 3, 0, ""),
        Tile(128, 128, 32, 8, 2, 0, ""),
        Tile(128, 64, 64, 8, 2, 0, ""),
    )
}
ONE_PASS_TILES: dict[str, tuple[OnePassTile, ...]] = {
    "sm_90": (
        OnePassTile(64, 128, 64, 8, 2, 1, 75, 48, ""),
        OnePassTile(64, 64, 64, 4, 2, 2, 75, 48, ""),
        OnePassTile(64, 128, 32, 8, 2, 1, 75, 48, ""),
        OnePassTile(64, 64, 64, 8, 2, 1, 75, 48, ""),
        OnePassTile(128, 64, 32, 8, 2, 1, 75, 72, ""),
    )
}

ATTENTION_WORKS = {"forward": partial(_forward, _heads), "backward": partial(_backward, _heads)}
_attention = partial(Sweep, example=_heads_example, present=_head_row, blocks=_by_head)
_mlp_sweep = partial(Sweep, example=_mlp_example, present=matmul_row, blocks=_by_width)
_norm_sweep = partial(
    Sweep, candidates=candidates, example=_norm_example, present=select, blocks=_by_width, float32=True
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
    "LAYER_NORM_FORWARD": _norm_sweep(LAYER_NORM_FORWARD, partial(_forward, _norm)),
    "LAYER_NORM_BACKWARD": _norm_sweep(LAYER_NORM_BACKWARD, partial(_backward, _norm)),
}
