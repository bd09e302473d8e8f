"""The operators that are timed: at which sizes, what each must move and compute, and who does the work.

A `Work` is one operator at one size with its sides, ours first. What it must do at least is the same for all sides:

    bytes    every input read once, every output written once, what the backward needs beside them saved once; weights and
             gradients count in the activations' dtype
    FLOPs    2 M N K a matmul; attention 4 B H D T² / 2 forward (causal: half of the square) and 2.5 times that backward

Sides are what a user would write. Attention goes from the packed projection to (B, T, C), so a peer that wants heads
apart pays for its transposes. Our operators take the float32 masters and cast them, peers get weights that are cast already.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import (
    add_layer_norm,
    causal_attention,
    dropout,
    embed,
    gelu_mlp,
    layer_norm,
    linear,
    linear_cross_entropy,
)
from ...kernels.backend import choose
from ..timing import full_rows
from . import peers as packages
from .inputs import Drawn, of_add_norm, of_attention, of_rows

OURS = "fusedgpt"
P = 0.1  # of dropout
EPS = 1e-5
Shape = tuple[int, ...]


class Side(NamedTuple):
    """One implementation. It takes the work's activations, parameters and indices in order, and returns one or several."""

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    masters: bool = False  # takes float32 parameters; others want them in the activations' dtype
    backward: bool = True
    draws: bool = False  # draws a dropout mask of its own


class Work(NamedTuple):
    """One operator at one size."""

    name: str
    sizes: Mapping[str, float]
    sides: list[Side]  # the first is ours
    outputs: tuple[Shape, ...]
    elements: tuple[int, int]  # that forward and backward must read and write
    activations: tuple[Shape, ...] = ()
    parameters: tuple[Shape, ...] = ()
    indices: tuple[tuple[Shape, int], ...] = ()  # shape and how many there are to choose from
    layers: tuple[tuple[int, int, int], ...] = ()  # rows, in, out of its matmuls with a weight
    flops: tuple[int, int] | None = None  # by default those of `layers`
    at_once: bool = False  # some sides make the gradients in the forward: forward is timed without gradients
    checked: slice = slice(None)  # the rows compared with float64, where all would take too much memory
    drawn: Drawn | None = None  # for sides that draw their mask

    @property
    def size(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.sizes.items())

    @property
    def arithmetic(self) -> tuple[int, int]:
        """FLOPs of forward and backward."""
        matmuls = sum(2 * m * i * o for m, i, o in self.layers)
        return self.flops or (matmuls, 2 * matmuls)


def _some(rows: int, enough: int) -> slice:
    """About so many rows, from all parts."""
    return slice(None, None, max(1, rows // enough))


class Sizes(NamedTuple):
    tokens: int
    rows: int  # of the operators that are no more than a pass over memory
    length: int  # T of everything but attention's own series
    lengths: tuple[int, ...]  # T of that series, at the same number of tokens
    widths: tuple[int, ...]  # C: the first for every operator
    vocab: int


def preset(device: torch.device) -> Sizes:
    """GPT-2's training on a GPU (fewer tokens where memory is little), and on a CPU what two cores do in a minute."""
    if device.type != "cuda":
        return Sizes(1024, 8192, 256, (64, 128, 512), (384,), 4096)
    tokens = full_rows(device)
    return Sizes(tokens, tokens, 1024, (256, 512, 2048, 4096), (768, 1024, 1280, 1600), 50304)


def works(device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> Iterator[Work]:
    """Every operator, the most important first: one that has no time for all of them takes those."""
    sizes = sizes or preset(device)
    make = _Maker(device, dtype, sizes)
    width, *wider = sizes.widths
    for p in (0.0, P):
        yield make.attention(sizes.length, width, 64, p)
    yield make.mlp(width)
    yield make.cross_entropy(width)
    yield make.norm(width)
    yield make.add_norm(width)
    yield make.add_norm(width, P)
    yield make.linear(width)
    yield make.embed(width)
    yield make.dropout(width)
    for p in (0.0, P):
        yield make.attention(sizes.length, width, 128, p)
    for p in (0.0, P):
        for length in sizes.lengths:
            yield make.attention(length, width, 64, p)
    for width in wider:
        yield make.norm(width)
        yield make.add_norm(width)
        yield make.add_norm(width, P)
        yield make.mlp(width)
        yield make.cross_entropy(width)


NAMES = (
    "attention",
    "gelu_mlp",
    "linear_cross_entropy",
    "layer_norm",
    "add_layer_norm",
    "linear",
    "embed",
    "dropout",
)


class _Maker:
    """Makes works for one device, dtype and set of sizes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self.tokens, self.rows = sizes.tokens, sizes.rows
        self.gpu = device.type == "cuda"
        self.seed = torch.tensor([20240520], device=device)

    def norm(self, c: int) -> Work:
        def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

        sides = [self.ours("layer_norm", lambda x, w, b: layer_norm(x, w, b, EPS)), *self.torchs(torchs)]
        sides += self.peers(packages.liger_norm, packages.quack_norm)
        big = (self.rows, c)
        moved = (2 * self.rows * c, 3 * self.rows * c)
        return Work("layer_norm", self.named(c), sides, (big,), moved, (big,), ((c,), (c,)))

    def add_norm(self, c: int, p: float = 0.0) -> Work:
        """With dropout the projection's bias is in it too, as in the model."""
        big, small, size = (self.rows, c), (c,), self.rows * c

        def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *x_bias: Tensor) -> Any:
            branch = F.dropout(x + x_bias[0], p) if p else x
            h = residual + branch
            return F.layer_norm(h, (c,), weight, bias, EPS), h

        def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *x_bias: Tensor) -> Any:
            return add_layer_norm(x, residual, weight, bias, EPS, p, self.seed, 1, *x_bias)

        sides = [self.ours("add_layer_norm", ours)]
        if not p:
            sides += [*self.torchs(torchs), *self.peers(packages.liger_add_norm)]
        else:
            sides += self.torchs(torchs, draws=True)
        vectors = (small,) * (3 if p else 2)
        moved = (4 * size, (5 if p else 4) * size)
        drawn = of_add_norm(p, EPS) if p else None
        sizes = self.named(c, p)
        return Work("add_layer_norm", sizes, sides, (big, big), moved, (big, big), vectors, drawn=drawn)

    def dropout(self, c: int) -> Work:
        big, moved = (self.rows, c), (2 * self.rows * c,) * 2
        sides = [self.ours("dropout", lambda x: dropout(x, P, self.seed, 1))]
        sides += self.torchs(lambda x: F.dropout(x, P), draws=True)
        return Work("dropout", self.named(c, P), sides, (big,), moved, (big,), drawn=of_rows(P))

    def embed(self, c: int) -> Work:
        length, vocab = self.sizes.length, self.sizes.vocab
        batch = self.tokens // length

        def ours(wte: Tensor, wpe: Tensor, ids: Tensor) -> Tensor:
            dtype = None if wte.dtype == torch.float64 else self.dtype  # float64 is the comparison's
            return embed(ids, wte, wpe, out_dtype=dtype)

        def torchs(wte: Tensor, wpe: Tensor, ids: Tensor) -> Tensor:
            return F.embedding(ids, wte) + wpe[: ids.shape[1]]

        seen = vocab * (1 - (1 - 1 / vocab) ** self.tokens)  # rows of wte that random ids ask for
        moved = (int(seen + length + self.tokens) * c, (self.tokens + vocab + length) * c)
        sides = [self.ours("embed", ours), *self.torchs(torchs)]
        sizes = {"B": batch, "T": length, "C": c, "V": vocab}
        tables = ((vocab, c), (length, c))
        ids = (((batch, length), vocab),)
        return Work("embed", sizes, sides, ((batch, length, c),), moved, (), tables, ids)

    def linear(self, c: int) -> Work:
        m, i, o = self.tokens, c, 3 * c
        sides = [self.ours("linear", linear), *self.torchs(F.linear)]
        moved = (m * i + i * o + m * o, m * o + 2 * m * i + 2 * i * o)
        sizes = {"M": m, "in": i, "out": o}
        shapes = (((m, i),), ((o, i), (o,)))
        return Work(
            "linear", sizes, sides, ((m, o),), moved, *shapes, layers=((m, i, o),), checked=_some(m, 8192)
        )

    def mlp(self, c: int) -> Work:
        m, f = self.tokens, 4 * c

        def torchs(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)

        sides = [self.ours("gelu_mlp", gelu_mlp), *self.torchs(torchs)]
        moved = (2 * m * c + m * f + 2 * c * f, 3 * m * c + m * f + 4 * c * f)
        layers = ((m, c, f), (m, f, c))
        parameters = ((f, c), (f,), (c, f), (c,))
        return Work(
            "gelu_mlp",
            {"M": m, "C": c},
            sides,
            ((m, c),),
            moved,
            ((m, c),),
            parameters,
            layers=layers,
            checked=_some(m, 8192),
        )

    def cross_entropy(self, c: int) -> Work:
        n, v = self.tokens, self.sizes.vocab

        def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight).float(), targets)

        sides = [self.ours("linear_cross_entropy", linear_cross_entropy), *self.torchs(torchs)]
        sides += self.peers(packages.liger_loss, packages.cut_cross_entropy, packages.quack_loss)
        return Work(
            "linear_cross_entropy",
            {"N": n, "C": c, "V": v},
            sides,
            ((),),
            (n * c + v * c, 2 * n * c + 2 * v * c),
            ((n, c),),
            ((v, c),),
            (((n,), v),),
            layers=((n, c, v),),
            at_once=True,
            checked=_some(n, 4096),
        )

    def attention(self, length: int, c: int, head_dim: int, p: float) -> Work:
        n_head = c // head_dim
        batch = self.tokens // length
        size, pairs = self.tokens * c, batch * n_head * length * length // 2
        sides = [self.ours("attention", lambda qkv: causal_attention(qkv, n_head, p, self.seed, 1))]
        sides += self.sdpa(length, n_head, p)
        loaders = (packages.flex, packages.flash_2, packages.flash_4)
        sides += self.peers(*(partial(load, n_head, p) for load in loaders))
        sizes = {"B": batch, "T": length, "H": n_head, "D": head_dim, "p": p}
        return Work(
            "attention",
            sizes,
            sides,
            ((batch, length, c),),
            (4 * size, 8 * size),
            ((batch, length, 3 * c),),
            flops=(4 * pairs * head_dim, 10 * pairs * head_dim),
            checked=slice(0, max(1, 2048 // length)),
            drawn=of_attention(p, n_head, head_dim) if p else None,
        )

    # ---- sides

    def ours(self, operator: str, call: Callable) -> Side:
        backend = choose(operator, torch.empty(0, dtype=self.dtype, device=self.device)).backend
        return Side(OURS if backend == "triton" else f"{OURS}, plain PyTorch", call, masters=True)

    def torchs(self, call: Callable, draws: bool = False) -> list[Side]:
        sides = [Side(f"torch {torch.__version__} eager", call, draws=draws)]
        if self.gpu:  # on a CPU compiling alone would take longer than all the rest
            sides.append(Side("torch.compile", torch.compile(call, dynamic=False), draws=draws))
        return sides

    def peers(self, *loaders: Callable[[], "packages.Peer | None"]) -> list[Side]:
        """Sides from packages whose kernels run on a GPU only."""
        return [Side(**found) for load in loaders if self.gpu and (found := load())]

    def sdpa(self, length: int, n_head: int, p: float) -> list[Side]:
        """torch's attention by each of its backends; the one with the T x T matrix while that is small."""
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
        if self.gpu:
            backends |= {
                "cuDNN": SDPBackend.CUDNN_ATTENTION,
                "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
            }
            if length > 1024:
                del backends["math"]
        elif p:
            del backends["flash"]  # on a CPU it has no dropout

        def call(qkv: Tensor, backend: SDPBackend | None = None) -> Tensor:
            q, k, v = packages.heads(qkv, n_head)
            if backend is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
            else:
                with sdpa_kernel(backend):
                    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
            return y.transpose(1, 2).flatten(2)

        sides = [
            Side(f"SDPA {name}", partial(call, backend=backend), draws=p > 0)
            for name, backend in backends.items()
        ]
        if self.gpu and not p and length == self.sizes.length:
            sides.append(Side("torch.compile of SDPA", torch.compile(call, dynamic=False)))
        return sides

    def named(self, c: int, p: float = 0.0) -> dict[str, float]:
        return {"M": self.rows, "C": c, **({"p": p} if p else {})}
