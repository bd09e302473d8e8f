"""The operators that have kernels, each beside what a user would pick instead, in one run.

A side is timed only after its outputs and gradients were compared with float64. The bytes are those that the work
must move at least, the same for all sides; their share of the copy bandwidth, measured in the same run, says how
near to the limit a side is. Sides take turns, on several sets of inputs, so that no cache serves them.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gpt.train.device import pick_device
from ..kernels import add_layer_norm, dropout, layer_norm, use_backend
from ..kernels.backend import choose
from .timing import copy_bandwidth, full_rows, medians, versions

OURS = "fusedgpt"
P = 0.1  # of dropout
EPS = 1e-5
# The relative error (norm of the difference over norm) up to which a side is taken to compute the same, in units in
# the last place of its dtype: room for a peer that sums in bfloat16, none for one that computes something else.
TOLERANCE = 8


class Side(NamedTuple):
    """One implementation. It takes the operator's tensors in order and returns one or several."""

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    masters: bool = False  # takes float32 parameters; others want them in the activations' dtype
    backward: bool = True
    draws: bool = False  # draws a dropout mask of its own


class Operator(NamedTuple):
    name: str
    activations: int  # how many (M, C) tensors it takes, first
    parameters: int  # how many (C,) tensors it takes, last
    moved: tuple[int, int]  # (M, C) tensors that forward and backward must read and write
    widths: tuple[int, ...]
    sides: list[Side]  # the first is ours


@dataclass
class Row:
    """One side's time in one direction."""

    operator: str
    shape: tuple[int, int]
    dtype: str
    direction: str
    side: str
    error: float | None  # relative, the largest of outputs and gradients; None where the side failed
    milliseconds: float | None = None  # None where the side was not timed: `note` says why
    gigabytes: float = 0.0
    share: float | None = None  # of the copy bandwidth
    ratio: float | None = None  # its time over ours
    note: str = ""


def operators(device: torch.device) -> list[Operator]:
    seed = torch.tensor([20240520], device=device)
    kernels = choose("layer_norm", torch.empty(0, device=device)).backend == "triton"
    ours = OURS if kernels else f"{OURS}, plain PyTorch"
    liger, quack = _peer("liger-kernel", _liger), _peer("quack-kernels", _quack)

    def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    def torch_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return F.layer_norm(h, h.shape[-1:], weight, bias, EPS), h

    def torch_dropout(x: Tensor) -> Tensor:
        return F.dropout(x, P)

    def after_an_add(norm: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
        def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            h = x + residual
            return norm(h, weight, bias), h

        return call

    def torchs(call: Callable, draws: bool = False) -> list[Side]:
        sides = [Side(f"torch {torch.__version__} eager", call, draws=draws)]
        if device.type == "cuda":  # on a CPU compiling alone would take longer than all the rest
            sides.append(Side("torch.compile", torch.compile(call, dynamic=False), draws=draws))
        return sides

    norms, adds = torchs(torch_norm), torchs(torch_add)
    if device.type == "cuda" and liger:
        norms.append(Side(liger.name, liger.call))
        adds.append(Side(f"{liger.name} after an add", after_an_add(liger.call)))
    if device.type == "cuda" and quack:
        norms.append(quack)
    gpt2 = (768, 1024, 1280, 1600) if device.type == "cuda" else (768,)
    return [
        Operator(
            "layer_norm",
            1,
            2,
            (2, 3),
            gpt2,
            [Side(ours, lambda x, w, b: layer_norm(x, w, b, EPS), masters=True), *norms],
        ),
        Operator(
            "add_layer_norm",
            2,
            2,
            (4, 4),
            gpt2,
            [Side(ours, lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), masters=True), *adds],
        ),
        Operator(
            f"add_layer_norm with dropout {P}",
            2,
            3,
            (4, 5),
            gpt2,
            [
                Side(
                    ours,
                    lambda x, r, w, b, xb: add_layer_norm(x, r, w, b, EPS, P, seed, 1, xb),
                    masters=True,
                )
            ],
        ),
        Operator(
            f"dropout {P}",
            1,
            0,
            (2, 2),
            (768,),
            [Side(ours, lambda x: dropout(x, P, seed, 1)), *torchs(torch_dropout, draws=True)],
        ),
    ]


def _peer(package: str, load: Callable[[str], Side]) -> Side | None:
    """A side from another package, named with its version; None, with a word, where it is not installed."""
    try:
        return load(f"{package} {version(package)}")
    except (ImportError, PackageNotFoundError) as error:
        print(f"{package} is left out: {error}")
        return None


def _liger(name: str) -> Side:
    from liger_kernel.transformers.functional import liger_layer_norm

    return Side(name, lambda x, w, b: liger_layer_norm(x, w, b, EPS))


def _quack(name: str) -> Side:
    from quack.rmsnorm import layernorm_fwd

    return Side(
        name,
        lambda x, w, b: layernorm_fwd(x.detach(), w.detach(), b.detach(), eps=EPS),
        masters=True,
        backward=False,
    )


def run_ops(
    device_name: str = "auto",
    rows: int | None = None,
    widths: Sequence[int] = (),
    rounds: int = 30,
    out: Path | None = None,
) -> list[Row]:
    """Time the operators and print a table.

    Args:
        device_name: auto, cpu, cuda, cuda:N.
        rows: M; by default 65,536 on a GPU (8,192 on one with little memory) and 2,048 on a CPU.
        widths: C; by default those of GPT-2's four sizes, on a CPU the smallest.
        rounds: timings of each side.
        out: write the figures there as JSON.

    Raises:
        ValueError: there is no such device here.
    """
    device = pick_device(device_name)
    copy = copy_bandwidth(device)
    print(" · ".join(f"{name} {value}" for name, value in versions(device).items()))
    print(f"copy bandwidth {copy / 1e9:,.0f} GB/s, read and written")
    found: list[Row] = []
    for row in measure(device, copy, rows, widths, rounds):
        if not found:
            print(LINE.format(*HEADS))
        print(line(row), flush=True)
        found.append(row)
    if out:
        record = {
            "versions": versions(device),
            "copy_bandwidth": copy,
            "rows": [asdict(row) for row in found],
        }
        out.write_text(json.dumps(record, indent=1) + "\n")
    return found


HEADS = ("operator", "M x C", "", "side", "error", "ms", "GB", "of copy", "to ours")
LINE = "{:<34}{:<14}{:<10}{:<34}{:>9}{:>9}{:>7}{:>9}{:>11}"


def line(row: Row) -> str:
    """A row of the table."""
    numbers = ["" if row.error is None else f"{row.error:.1e}", row.note or "not timed", "", "", ""]
    if row.milliseconds is not None:
        share, ratio = (
            format(row.share, ".0%") if row.share else "",
            f"{row.ratio:.2f}" if row.ratio else "",
        )
        numbers[1:] = [f"{row.milliseconds:.3f}", f"{row.gigabytes:.3f}", share, ratio]
    shape = f"{row.shape[0]} x {row.shape[1]}"
    return LINE.format(row.operator, shape, row.direction, row.side, *numbers).rstrip()


def measure(
    device: torch.device,
    copy: float,
    rows: int | None = None,
    widths: Sequence[int] = (),
    rounds: int = 30,
) -> Iterator[Row]:
    """The rows of the table, as they come. copy: bytes a second that count as all of the bandwidth."""
    # a graph that is run backward again and again must keep what a single run could give away
    torch._functorch.config.donated_buffer = False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = rows or (full_rows(device) if device.type == "cuda" else 2048)
    for operator in operators(device):
        for columns in widths or operator.widths:
            yield from _compare(operator, rows, columns, dtype, device, copy, rounds)


def _compare(
    operator: Operator,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    copy: float,
    rounds: int,
) -> Iterator[Row]:
    size = rows * columns * dtype.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**25
    count = min(8, max(2, math.ceil(4 * cache / (size * operator.activations))))
    sets = [_inputs(operator, rows, columns, dtype, device, seed) for seed in range(count)]

    table: list[Row] = []
    fit: list[Side] = []
    for side in operator.sides:
        note, error = "", None
        try:
            error = _error(operator, side, sets[0])
        except Exception as failure:  # a peer may fail in any way; the others are timed all the same
            note = f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        if error is not None and error <= TOLERANCE * torch.finfo(dtype).eps:
            fit.append(side)
        else:
            note = note or "wrong: not timed"
            error = None if error is None or math.isnan(error) else error  # JSON has no NaN
        directions = ("forward", "backward") if side.backward else ("forward",)
        shape = (rows, columns)
        table += [
            Row(operator.name, shape, str(dtype)[6:], direction, side.name, error, note=note)
            for direction in directions
        ]
    for direction, moved in zip(("forward", "backward"), operator.moved, strict=True):
        sides = [side for side in fit if direction == "forward" or side.backward]
        work = _forward if direction == "forward" else _backward
        times = medians([work(side, sets) for side in sides], device, rounds) if sides else []
        for side, milliseconds in zip(sides, times, strict=True):
            row = next(r for r in table if (r.side, r.direction) == (side.name, direction))
            row.milliseconds, row.gigabytes = milliseconds, moved * size / 1e9
            if device.type == "cuda":  # a CPU's caches serve whatever is at hand
                row.share = moved * size / copy / milliseconds * 1e3
            row.ratio = milliseconds / times[0] if sides[0] is operator.sides[0] else None
    yield from sorted(table, key=lambda row: row.direction, reverse=True)


class Inputs(NamedTuple):
    activations: list[Tensor]
    masters: list[Tensor]  # float32
    parameters: list[Tensor]  # the same in the activations' dtype
    incoming: list[Tensor]  # gradients, one an output

    def of(self, side: Side) -> list[Tensor]:
        return [*self.activations, *(self.masters if side.masters else self.parameters)]


def _inputs(
    operator: Operator, rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    low = [drawn(columns).requires_grad_() for _ in range(operator.parameters)]
    return Inputs(
        [drawn(rows, columns).requires_grad_() for _ in range(operator.activations)],
        [t.detach().float().requires_grad_() for t in low],
        low,
        [drawn(rows, columns) for _ in range(operator.activations)],  # as many outputs as activations
    )


def _forward(side: Side, sets: list[Inputs]) -> Callable[[int], object]:
    return lambda i: side.call(*sets[i % len(sets)].of(side))


def _backward(side: Side, sets: list[Inputs]) -> Callable[[int], object]:
    graphs = [(_outputs(side, inputs), inputs.of(side), inputs.incoming) for inputs in sets]

    def call(i: int) -> object:
        outputs, leaves, incoming = graphs[i % len(graphs)]
        return torch.autograd.grad(outputs, leaves, incoming, retain_graph=True)

    return call


def _outputs(side: Side, inputs: Inputs) -> tuple[Tensor, ...]:
    result = side.call(*inputs.of(side))
    return result if isinstance(result, tuple) else (result,)


def _error(operator: Operator, side: Side, inputs: Inputs) -> float:
    """The largest relative error of the side's outputs and gradients against our reference in float64."""
    leaves = inputs.of(side)
    outputs = _outputs(side, inputs)
    found = list(outputs)
    if side.backward:
        found += torch.autograd.grad(outputs, leaves, inputs.incoming)
    if side.draws:
        exact = _masked_as(outputs[0], leaves[0], inputs.incoming[0])
    else:
        with use_backend("torch"):
            doubles = [t.detach().double().requires_grad_() for t in leaves]
            result = operator.sides[0].call(*doubles)
            truth = result if isinstance(result, tuple) else (result,)
            incoming = [t.double() for t in inputs.incoming]
            exact = [*truth, *torch.autograd.grad(truth, doubles, incoming)]
    pairs = zip(found, exact[: len(found)], strict=True)
    errors = torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs])
    return errors.max().item()  # unlike Python's max, NaN wins


def _masked_as(y: Tensor, x: Tensor, incoming: Tensor) -> list[Tensor]:
    """What dropout should have given for the mask that y shows, and its gradient; infinite where its share is off."""
    kept = y.detach() != 0
    five_sigma = 5 * math.sqrt(P * (1 - P) / kept.numel())
    scale = 1 / (1 - P) if abs(kept.double().mean().item() - (1 - P)) < five_sigma else math.inf
    return [torch.where(kept, t.detach().double() * scale, 0.0) for t in (x, incoming)]
