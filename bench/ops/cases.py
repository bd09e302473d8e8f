"""The operators that are timed: at which sizes, what each must move and compute, and by whom.

A `Work` is one operator at one size with its implementations, ours first. What it must do at least is the same for all:

    bytes    every input read once, every output written once, what the backward needs beside them saved once; weights and
             gradients count in the activations' dtype
    FLOPs    2 M N K a matmul; attention 4 B H D T² / 2 forward (causal: half of the square) and 2.5 times that backward

Implementations are what a user would write. Attention goes from the packed projection to (B, T, C), so one that wants heads
apart pays for its transposes. Our operators take the float32 masters and cast them; others get weights cast beforehand.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import examples
from ...kernels.backend import choose
from ...kernels.examples import Example, Shape
from ..timing import full_rows
from . import peers
from .dropout_check import DropoutCheck, add_layer_norm_check, attention_check, row_check

OURS = "fusedgpt"
P = 0.1  # of dropout
EPS = 1e-5


class Implementation(NamedTuple):
    """`call` takes activations, parameters and integers in the example's order, without the seed; returns one tensor or several."""

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    masters: bool = False  # takes float32 parameters; others want them in the activations' dtype
    backward: bool = True
    draws: bool = False  # draws a dropout mask of its own


class Work(NamedTuple):
    """One operator at one size."""

    example: Example
    sizes: Mapping[str, float]
    implementations: list[Implementation]  # the first is ours
    outputs: tuple[Shape, ...]
    elements: tuple[int, int]  # that forward and backward must read and write
    layers: tuple[tuple[int, int, int], ...] = ()  # rows, in, out of its matmuls with a weight
    flops: tuple[int, int] | None = None  # by default those of `layers`
    at_once: bool = False  # some make the gradients in the forward: forward is timed without gradients
    checked: slice = slice(None)  # the rows compared with float64, where all would take too much memory
    dropout_check: DropoutCheck | None = None  # of implementations that draw their mask

    @property
    def name(self) -> str:
        return self.example.operator

    @property
    def size(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.sizes.items())

    @property
    def arithmetic(self) -> tuple[int, int]:
        """FLOPs of forward and backward."""
        matmuls = sum(2 * m * i * o for m, i, o in self.layers)
        return self.flops or (matmuls, 2 * matmuls)


class Sizes(NamedTuple):
    tokens: int
    rows: int  # of the operators that are a single pass over memory
    length: int  # T of everything but attention's own series
    lengths: tuple[int, ...]  # T of that series, at the same number of tokens
    widths: tuple[int, ...]  # C: the first for every operator
    vocab: int


def preset(device: torch.device) -> Sizes:
    """GPT-2's training on a GPU (fewer tokens where memory is small); on a CPU what two cores do in a minute."""
    if device.type != "cuda":
        return Sizes(1024, 8192, 256, (64, 128, 512), (384,), 4096)
    tokens = full_rows(device)
    return Sizes(tokens, tokens, 1024, (256, 512, 2048, 4096), (768, 1024, 1280, 1600), 50304)


NAMES = (
    *("attention", "gelu_mlp", "linear_cross_entropy", "layer_norm"),
    *("add_layer_norm", "linear", "embed", "dropout"),
)


def works(device: torch.device, dtype: torch.dtype, sizes: Sizes | None = None) -> Iterator[Work]:
    """Every operator, the most important first: a run without time for all of them takes those."""
    sizes = sizes or preset(device)
    make = _Maker(device, dtype, sizes)
    width, *wider = sizes.widths
    for p in (0.0, P):
        yield make.attention(sizes.length, width, 64, p)
    yield make.gelu_mlp(width)
    yield make.linear_cross_entropy(width)
    yield make.layer_norm(width)
    yield make.add_layer_norm(width)
    yield make.add_layer_norm(width, P)
    yield make.linear(width)
    yield make.embed(width)
    yield make.dropout(width)
    for p in (0.0, P):
        yield make.attention(sizes.length, width, 128, p)
    for p in (0.0, P):
        for length in sizes.lengths:
            yield make.attention(length, width, 64, p)
    for width in wider:
        yield make.layer_norm(width)
        yield make.add_layer_norm(width)
        yield make.add_layer_norm(width, P)
        yield make.gelu_mlp(width)
        yield make.linear_cross_entropy(width)


class _Maker:
    """Makes works for one device, dtype and set of sizes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self.tokens, self.rows = sizes.tokens, sizes.rows
        self.gpu = device.type == "cuda"

    def layer_norm(self, c: int) -> Work:
        def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

        m = self.rows
        others = [*self.torchs(eager), *self.peers(peers.liger_norm, peers.quack_norm)]
        example, sizes = examples.layer_norm(m, c), {"M": m, "C": c}
        return Work(example, sizes, [self.ours(example), *others], ((m, c),), (2 * m * c, 3 * m * c))

    def add_layer_norm(self, c: int, p: float = 0.0) -> Work:
        """With dropout the projection's bias is in it too, as in the model."""

        def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *x_bias: Tensor) -> Any:
            h = residual + (F.dropout(x + x_bias[0], p) if p else x)
            return F.layer_norm(h, (c,), weight, bias, EPS), h

        m, sizes = self.rows, {"M": self.rows, "C": c, **({"p": p} if p else {})}
        others = self.torchs(eager, draws=p > 0)
        if not p:
            others += self.peers(peers.liger_add_norm)
        example = examples.add_layer_norm(m, c, p, x_bias=p > 0)
        elements = (4 * m * c, (5 if p else 4) * m * c)
        check = add_layer_norm_check(p, EPS) if p else None
        return Work(
            example, sizes, [self.ours(example), *others], ((m, c),) * 2, elements, dropout_check=check
        )

    def dropout(self, c: int) -> Work:
        m, example = self.rows, examples.dropout(self.rows, c, P)
        implementations = [self.ours(example), *self.torchs(lambda x: F.dropout(x, P), draws=True)]
        moved, check = (2 * m * c,) * 2, row_check(P)
        sizes = {"M": m, "C": c, "p": P}
        return Work(example, sizes, implementations, ((m, c),), moved, dropout_check=check)

    def embed(self, c: int) -> Work:
        def eager(wte: Tensor, wpe: Tensor, ids: Tensor) -> Tensor:
            return F.embedding(ids, wte) + wpe[: ids.shape[1]]

        tokens, length, vocab = self.tokens, self.sizes.length, self.sizes.vocab
        batch = tokens // length
        example = examples.embed(batch, length, c, vocab, out_dtype=self.dtype)
        sizes = {"B": batch, "T": length, "C": c, "V": vocab}
        seen = vocab * (1 - (1 - 1 / vocab) ** tokens)  # rows of wte that random ids ask for
        elements = (int(seen + length + tokens) * c, (tokens + vocab + length) * c)
        return Work(
            example, sizes, [self.ours(example), *self.torchs(eager)], ((batch, length, c),), elements
        )

    def linear(self, c: int) -> Work:
        m, i, o = self.tokens, c, 3 * c
        example, sizes = examples.linear(m, i, o), {"M": m, "in": i, "out": o}
        elements = (m * i + i * o + m * o, m * o + 2 * m * i + 2 * i * o)
        more: dict[str, Any] = {"layers": ((m, i, o),), "checked": _some(m, 8192)}
        return Work(example, sizes, [self.ours(example), *self.torchs(F.linear)], ((m, o),), elements, **more)

    def gelu_mlp(self, c: int) -> Work:
        def eager(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)

        m, f = self.tokens, 4 * c
        elements = (2 * m * c + m * f + 2 * c * f, 3 * m * c + m * f + 4 * c * f)
        more: dict[str, Any] = {"layers": ((m, c, f), (m, f, c)), "checked": _some(m, 8192)}
        example, sizes = examples.gelu_mlp(m, c), {"M": m, "C": c}
        return Work(example, sizes, [self.ours(example), *self.torchs(eager)], ((m, c),), elements, **more)

    def linear_cross_entropy(self, c: int) -> Work:
        def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight).float(), targets)

        n, v = self.tokens, self.sizes.vocab
        others = self.torchs(eager)
        others += self.peers(peers.liger_loss, peers.cut_cross_entropy, peers.quack_loss)
        example, sizes = examples.linear_cross_entropy(n, c, v), {"N": n, "C": c, "V": v}
        elements = (n * c + v * c, 2 * n * c + 2 * v * c)
        more: dict[str, Any] = {"layers": ((n, c, v),), "at_once": True, "checked": _some(n, 4096)}
        return Work(example, sizes, [self.ours(example), *others], ((),), elements, **more)

    def attention(self, length: int, c: int, head_dim: int, p: float) -> Work:
        batch, n_head = self.tokens // length, c // head_dim
        size, pairs = self.tokens * c, batch * n_head * length * length // 2
        loaders = (partial(load, n_head, p) for load in (peers.flex, peers.flash_2, peers.flash_4))
        example = examples.causal_attention(batch, length, n_head, head_dim, p)
        return Work(
            example,
            {"B": batch, "T": length, "H": n_head, "D": head_dim, "p": p},
            [self.ours(example), *self.sdpa(length, n_head, p), *self.peers(*loaders)],
            ((batch, length, c),),
            (4 * size, 8 * size),
            flops=(4 * pairs * head_dim, 10 * pairs * head_dim),
            checked=slice(0, max(1, 2048 // length)),
            dropout_check=attention_check(p, n_head, head_dim) if p else None,
        )

    # ---- implementations

    def ours(self, example: Example) -> Implementation:
        names = [*example.activations, *example.parameters, *(n for n in example.integers if n != "seed")]
        seed = {"seed": torch.tensor([20240520], device=self.device)} if "seed" in example.integers else {}

        def call(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            return example.call(**dict(zip(names, tensors, strict=True)), **seed)

        backend = choose(example.operator, torch.empty(0, dtype=self.dtype, device=self.device)).backend
        return Implementation(OURS if backend == "triton" else f"{OURS}, plain PyTorch", call, masters=True)

    def torchs(self, eager: Callable, draws: bool = False) -> list[Implementation]:
        found = [Implementation(f"torch {torch.__version__} eager", eager, draws=draws)]
        if self.gpu:  # on a CPU compiling alone would take longer than all the rest
            found.append(Implementation("torch.compile", torch.compile(eager, dynamic=False), draws=draws))
        return found

    def peers(self, *loaders: Callable[[], "peers.Peer | None"]) -> list[Implementation]:
        """Those of packages whose kernels run on a GPU only."""
        return [Implementation(**found) for load in loaders if self.gpu and (found := load())]

    def sdpa(self, length: int, n_head: int, p: float) -> list[Implementation]:
        """torch's attention by each of its backends; the one with the T x T matrix while that is small."""
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
        if self.gpu:
            backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
            backends["mem-efficient"] = SDPBackend.EFFICIENT_ATTENTION
            if length > 1024:
                del backends["math"]
        elif p:
            del backends["flash"]  # on a CPU it has no dropout

        def call(qkv: Tensor) -> Tensor:
            q, k, v = peers.heads(qkv, n_head)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
            return y.transpose(1, 2).flatten(2)

        def by(backend: SDPBackend, qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return call(qkv)

        found = [Implementation(f"SDPA {name}", partial(by, b), draws=p > 0) for name, b in backends.items()]
        if self.gpu and not p and length == self.sizes.length:
            found.append(Implementation("torch.compile of SDPA", torch.compile(call, dynamic=False)))
        return found


def _some(rows: int, enough: int) -> slice:
    """About so many rows, evenly spread."""
    return slice(None, None, max(1, rows // enough))
