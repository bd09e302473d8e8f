"""`python -m fusedgpt.bench tiles`: which tile is fastest on the GPU at hand, as rows to paste into `kernels/tiles.py`.

Every candidate is put into the table in turn, compared with float64 on a small uneven input, and then timed beside
the row that the table has now, in turns with it. Widths that share a block share a row, so a candidate is judged by
the mean of its ratios over them. Whether a winner spills or waits for room shows `make kernels-report`.

For the feed-forward sub-layer a row also chooses the form: the library's matmul, or one of our own.
"""

import datetime
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import add_layer_norm, gelu_mlp
from ..kernels.layer_norm_kernels import GPT2_WIDTHS
from ..kernels.selfcheck import Example, parity
from ..kernels.tiles import (
    ANY,
    LAYER_NORM_BACKWARD,
    LAYER_NORM_FORWARD,
    LIBRARY,
    MLP_DOWN_GRADIENT,
    MLP_DOWN_GRADIENT_TILES,
    MLP_UP,
    MLP_UP_TILES,
    MatmulTile,
    Tile,
    hardware,
    matmul_row,
    next_power_of_two,
    select,
)
from .timing import full_rows, medians, require_gpu

WHOLE = 8192  # columns: wider rows are taken in blocks
MAX_ELEMENTS = 16384  # of a tile
PER_THREAD = (8, 32)  # elements of a tile, least and most: fewer load in small pieces, more spill
SHOWN = 5
UNEVEN_ROWS = 1037  # of the parity check

Table = dict[str, Any]  # architecture to rows of Tile or of MatmulTile


class Sweep(NamedTuple):
    """A table, and how a row of it is tried."""

    table: Table
    make_work: Callable[..., Callable[[int], object]]  # of rows, columns, dtype and device: what is timed
    candidates: Callable[[int, str], Iterable[Tile | MatmulTile]]  # for rows of a block, on an architecture
    example: Callable[[int], Example]  # of so many columns: what must be right
    present: Callable[[Table, str, int], Tile | MatmulTile]  # the table's row for an architecture and a width


class Result(NamedTuple):
    tile: Tile | MatmulTile
    ratio: float  # its time over the present row's, the geometric mean over the widths
    milliseconds: dict[int, float]  # of each width


def run_tiles(
    widths: Sequence[int] = GPT2_WIDTHS,
    dtype_name: str = "bfloat16",
    rows: int | None = None,
    rounds: int = 10,
    seconds: float = 500,
) -> list[str]:
    """Sweep every table, print the fastest tiles, then the rows to paste; returns these.

    Args:
        widths: C to sweep at.
        dtype_name: of the activations: bfloat16, float16 or float32.
        rows: M, by default 65,536 (8,192 on a GPU with little memory).
        rounds: timings of each candidate.
        seconds: to spend; candidates for which there is no time are counted, not tried. Most of it is compiling.

    Raises:
        ValueError: there is no GPU that Triton kernels run on.
    """
    device = require_gpu()
    name, dtype = torch.cuda.get_device_name(device), getattr(torch, dtype_name)
    origin = f"measured on {name}, {datetime.date.today()}"
    blocks = defaultdict(list)
    for width in widths:
        blocks[min(next_power_of_two(width), 2 * WHOLE)].append(width)
    found: list[str] = []
    for title, sweep in TABLES.items():
        found.append(f"{title}, {hardware(device).architecture}:")
        for block, columns in sorted(blocks.items()):
            until = time.monotonic() + seconds / len(TABLES) / len(blocks)
            results = list(_sweep(sweep, block, columns, dtype, device, rows, rounds, until))
            results.sort(key=lambda result: result.ratio)
            print(f"{title}, C = {', '.join(map(str, columns))}, {dtype_name}")
            for result in results[:SHOWN]:
                times = "  ".join(f"{c}: {ms:.4f} ms" for c, ms in result.milliseconds.items())
                print(
                    f"    {_row(result.tile, 'now' if result.ratio == 1 else '')}  {result.ratio:.3f}  {times}"
                )
            winner = results[0].tile._replace(limit=block if block <= WHOLE else ANY)
            found.append(f"    {_row(winner, origin)}")
    print("\nThe rows to paste, by the time they take; hold them against `make kernels-report` first.")
    print("\n".join(found))
    return found


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


@contextmanager
def in_table(table: Table, architecture: str, tile: Tile | MatmulTile) -> Iterator[None]:
    """The table with this tile for every width of one architecture."""
    before = table.get(architecture)
    table[architecture] = (tile._replace(limit=ANY),)
    try:
        yield
    finally:
        if before is None:
            del table[architecture]
        else:
            table[architecture] = before


def _sweep(
    sweep: Sweep,
    block: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    rows: int | None,
    rounds: int,
    until: float,
) -> Iterator[Result]:
    """The present row (ratio 1) and every candidate that is right."""
    architecture = hardware(device).architecture
    table = sweep.table
    present = sweep.present(table, architecture, widths[0])
    works = {c: sweep.make_work(rows or full_rows(device), c, dtype, device) for c in widths}
    yield Result(present, 1.0, dict(zip(widths, _times(list(works.values()), device, rounds), strict=True)))
    tiles = [tile for tile in sweep.candidates(block, architecture) if tile[1:-1] != present[1:-1]]
    for number, tile in enumerate(tiles):
        if time.monotonic() > until:
            print(f"    no time for {len(tiles) - number} of {len(tiles)} candidates")
            return
        try:
            with in_table(table, architecture, tile):
                checks = [parity(sweep.example(c), device, dtype) for c in widths]
        except Exception as failure:  # out of shared memory or registers: no tile for this GPU
            print(f"    {_row(tile, '')} cannot run: {type(failure).__name__}")
            continue
        if any(not error <= allowed for error, allowed in checks):
            print(f"    {_row(tile, '')} is WRONG: {checks}")
            continue
        times, ratios = {}, []
        for c, work in works.items():

            def tried(i: int, work: Callable[[int], object] = work) -> None:
                with in_table(table, architecture, tile):  # noqa: B023 (called within this round)
                    work(i)

            before, times[c] = _times([work, tried], device, rounds)
            ratios.append(times[c] / before)
        yield Result(tile, math.prod(ratios) ** (1 / len(ratios)), times)


def _times(calls: list[Callable[[int], object]], device: torch.device, rounds: int) -> list[float]:
    return medians(calls, device, rounds, warm_up=2)


def _row(tile: Tile | MatmulTile, origin: str) -> str:
    limit = "ANY" if tile.limit == ANY else str(tile.limit)
    return f'{type(tile).__name__}({limit}, {", ".join(map(str, tile[1:-1]))}, "{origin}"),'


def _example(columns: int) -> Example:
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


Bound = tuple[Callable[[], Any], list[Tensor]]  # a call on full-size tensors, and these: x first


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


def _forward(bind: Callable[..., Bound], *sizes: Any) -> Callable[[int], object]:
    calls = [bind(*sizes)[0] for _ in range(2)]
    return lambda i: calls[i % 2]()


def _backward(bind: Callable[..., Bound], *sizes: Any) -> Callable[[int], object]:
    graphs = []
    for _ in range(2):
        call, leaves = bind(*sizes)
        outputs = call()
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        graphs.append((outputs, leaves, [torch.randn_like(y) for y in several]))
    return lambda i: torch.autograd.grad(*graphs[i % 2], retain_graph=True)


def _forms(own: dict[str, tuple[MatmulTile, ...]], _: int, architecture: str) -> tuple[MatmulTile, ...]:
    return (*own.get(architecture, ()), LIBRARY)


TABLES = {
    "MLP_UP": Sweep(
        MLP_UP,
        partial(_forward, _mlp),
        partial(_forms, MLP_UP_TILES),
        _mlp_example,
        matmul_row,
    ),
    "MLP_DOWN_GRADIENT": Sweep(
        MLP_DOWN_GRADIENT,
        partial(_backward, _mlp),
        partial(_forms, MLP_DOWN_GRADIENT_TILES),
        _mlp_example,
        matmul_row,
    ),
    "LAYER_NORM_FORWARD": Sweep(LAYER_NORM_FORWARD, partial(_forward, _norm), candidates, _example, select),
    "LAYER_NORM_BACKWARD": Sweep(
        LAYER_NORM_BACKWARD, partial(_backward, _norm), candidates, _example, select
    ),
}
