"""Every operator beside the same mathematics in torch's own operators, on inputs of uneven sizes.

A case is a public function of `fusedgpt.kernels` with its options fixed, its rival, and what both are called with. The
tests of the contract run over this table, so an operator that joins it is held to all of them.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt import kernels
from fusedgpt.kernels.dropout_mask import attention_keep_mask, keep_mask

Tensors = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]

T, HEADS, HEAD_DIM, VOCAB, PADDED = 13, 3, 10, 37, 48
C = HEADS * HEAD_DIM
P, STREAM = 0.3, 5
LEVELS = 38  # attention quantises P to 38 / 128
ACTIVATIONS = {"x", "residual", "qkv", "q", "k", "v", "wte", "wpe"}  # the rest are float32 masters


class Case(NamedTuple):
    name: str
    ours: Callable[..., Outputs]
    torchs: Callable[..., Outputs]  # takes what `ours` takes, by the same names
    shapes: dict[str, tuple[int, ...]]  # -n is n times the batch

    def inputs(self, dtype: torch.dtype, masters: torch.dtype | None = None, batch: int = 3) -> Tensors:
        """What both sides are called with: activations in `dtype`, parameters in `masters` (`dtype` by default).

        Every number is one of bfloat16, so all dtypes see the same numbers (float16 up to its subnormal ones).
        """
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        tensors = {}
        for name, shape in self.shapes.items():
            shape = tuple(-size * batch if size < 0 else size for size in shape)
            if name in INTEGERS:
                tensors[name] = INTEGERS[name](shape, generator)
                continue
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name.startswith("w_") or name == "weight":
                drawn = drawn / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.3 * drawn
            tensors[name] = drawn.bfloat16().to(dtype if name in ACTIVATIONS else masters or dtype)
        return tensors


def _first_key(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Before, inside and behind the keys that the causal rule leaves, so some rows see no key at all."""
    return torch.randint(-2, T + 2, shape, generator=generator)


def _targets(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, VOCAB, shape, generator=generator)
    return drawn.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)


INTEGERS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "ids": lambda shape, generator: torch.randint(0, VOCAB, shape, generator=generator),
    "first_key": _first_key,
    "targets": _targets,
    "seed": lambda shape, generator: torch.randint(-(2**63), 2**63 - 1, shape, generator=generator),
}


def results(
    function: Callable[..., Outputs], tensors: Tensors, incoming: Sequence[Tensor | None] | None = None
) -> Tensors:
    """Every output of function(**tensors) and the gradient of every floating input, by name.

    The incoming gradients are drawn, each number one of bfloat16, unless they are given; an input without a gradient
    has no entry.
    """
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()
    }
    outputs = as_tuple(function(**leaves))
    if incoming is None:
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(out.shape, generator=generator).bfloat16() for out in outputs]
        incoming = [gradient.to(out.dtype) for gradient, out in zip(drawn, outputs, strict=True)]
    used = [(out, gradient) for out, gradient in zip(outputs, incoming, strict=True) if gradient is not None]
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(
        [out for out, _ in used],
        [leaves[name] for name in names],
        [gradient for _, gradient in used],
        allow_unused=True,
    )
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return found | {f"d{name}": g for name, g in zip(names, gradients, strict=True) if g is not None}


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def embed(ids: Tensor, wte: Tensor, wpe: Tensor, seed: Tensor | None = None) -> Tensor:
    x = F.embedding(ids, wte) + F.embedding(torch.arange(ids.shape[1]), wpe)
    return x if seed is None else dropout(x, seed)


def dropout(x: Tensor, seed: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    keep = keep_mask(seed, STREAM, *rows.shape, P)
    return torch.where(keep, rows / (1 - P), 0).view(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    x_bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x = x if x_bias is None else x + x_bias
    total = residual + (x if seed is None else dropout(x, seed))
    return layer_norm(total, weight, bias), total


def causal_attention(qkv: Tensor, scale: float | None = None, causal: bool = True, **masks: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in qkv.chunk(3, -1))  # (B, T, H, D)
    return attention(q, k, v, scale, causal, **masks).flatten(2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = True,
    first_key: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    lengths = q.shape[2], k.shape[2]
    visible = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0] if causal else lengths[1])
    if first_key is not None:
        visible = visible & (torch.arange(lengths[1]) >= first_key[:, None, :, None])
    if seed is None:
        return F.scaled_dot_product_attention(q, k, v, visible, scale=scale).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * (scale or HEAD_DIM**-0.5)
    weights = scores.masked_fill(~visible, torch.finfo(q.dtype).min).softmax(-1).masked_fill(~visible, 0)
    keep = attention_keep_mask(seed, STREAM, q.shape[0] * HEADS, *lengths, P).view(weights.shape)
    return (torch.where(keep, weights * (128 / (128 - LEVELS)), 0) @ v).transpose(1, 2)


def gelu_mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    approximate: str = "tanh",
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate=approximate), w_proj, b_proj)


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    logits = F.linear(x, weight[:VOCAB])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    rows = rows + z_loss * logits.logsumexp(1) ** 2 * (targets != -100)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (targets != -100).sum()}[reduction]


def _with_dropout(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    return partial(function, dropout_p=P, stream=STREAM)


_mlp = {"x": (-1, T, C), "w_fc": (4 * C, C), "b_fc": (4 * C,), "w_proj": (C, 4 * C), "b_proj": (C,)}
_add = {"x": (-1, T, C), "residual": (-1, T, C), "weight": (C,), "bias": (C,)}
_embed = {"ids": (-1, T), "wte": (VOCAB, C), "wpe": (T + 4, C)}
_qkv = {"qkv": (-1, T, 3 * C)}
_head = {"x": (-T, C), "weight": (PADDED, C), "targets": (-T,)}
_seed = {"seed": (1,)}


def _lengths(q_len: int, k_len: int) -> dict[str, tuple[int, ...]]:
    key = (-1, k_len, HEADS, HEAD_DIM)
    return {"q": (-1, q_len, HEADS, HEAD_DIM), "k": key, "v": key}


def _without(shapes: dict[str, tuple[int, ...]], *names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name not in names}


def _packed(**options: object) -> Callable[..., Outputs]:
    return partial(kernels.causal_attention, n_head=HEADS, **options)


def _head_loss(**options: object) -> Callable[..., Outputs]:
    return partial(kernels.linear_cross_entropy, vocab_size=VOCAB, **options)


CASES = [
    Case("embed", kernels.embed, embed, _embed),
    Case("embed-dropout", _with_dropout(kernels.embed), embed, _embed | _seed),
    Case("dropout", partial(kernels.dropout, p=P, stream=STREAM), dropout, {"x": (-1, T, C)} | _seed),
    Case("layer_norm", kernels.layer_norm, layer_norm, {"x": (-1, T, C), "weight": (C,), "bias": (C,)}),
    Case("layer_norm-no-bias", kernels.layer_norm, layer_norm, {"x": (-1, T, C), "weight": (C,)}),
    Case("add_layer_norm", kernels.add_layer_norm, add_layer_norm, _add),
    Case("add_layer_norm-no-bias", kernels.add_layer_norm, add_layer_norm, _without(_add, "bias")),
    Case("add_layer_norm-x_bias", kernels.add_layer_norm, add_layer_norm, _add | {"x_bias": (C,)}),
    Case(
        "add_layer_norm-dropout",
        _with_dropout(kernels.add_layer_norm),
        add_layer_norm,
        _add | {"x_bias": (C,)} | _seed,
    ),
    Case("linear", kernels.linear, F.linear, {"x": (-1, T, C), "weight": (17, C), "bias": (17,)}),
    Case("linear-no-bias", kernels.linear, F.linear, {"x": (-T, C), "weight": (17, C)}),
    Case("causal_attention", _packed(), causal_attention, _qkv),
    Case("causal_attention-scale", _packed(scale=0.7), partial(causal_attention, scale=0.7), _qkv),
    Case("causal_attention-encoder", _packed(causal=False), partial(causal_attention, causal=False), _qkv),
    Case("causal_attention-one-position", _packed(), causal_attention, {"qkv": (-1, 1, 3 * C)}),
    Case("causal_attention-first_key", _packed(), causal_attention, _qkv | {"first_key": (-1, T)}),
    Case("causal_attention-dropout", _with_dropout(_packed()), causal_attention, _qkv | _seed),
    Case(
        "causal_attention-everything",
        _with_dropout(_packed(scale=0.7)),
        partial(causal_attention, scale=0.7),
        _qkv | {"first_key": (-1, T)} | _seed,
    ),
    Case("attention-more-keys", kernels.attention, attention, _lengths(5, T)),
    Case("attention-more-queries", kernels.attention, attention, _lengths(T, 5)),
    Case("attention-one-query", kernels.attention, attention, _lengths(1, T)),
    Case(
        "attention-encoder",
        partial(kernels.attention, causal=False),
        partial(attention, causal=False),
        _lengths(T, 5) | {"first_key": (-1, T)},
    ),
    Case("attention-dropout", _with_dropout(kernels.attention), attention, _lengths(5, T) | _seed),
    Case("gelu_mlp", kernels.gelu_mlp, gelu_mlp, _mlp),
    Case("gelu_mlp-recompute", partial(kernels.gelu_mlp, recompute=True), gelu_mlp, _mlp),
    Case(
        "gelu_mlp-exact",
        partial(kernels.gelu_mlp, approximate="none"),
        partial(gelu_mlp, approximate="none"),
        _mlp,
    ),
    Case(
        "gelu_mlp-no-biases",
        partial(kernels.gelu_mlp, b_fc=None, b_proj=None),
        partial(gelu_mlp, b_fc=None, b_proj=None),
        _without(_mlp, "b_fc", "b_proj"),
    ),
    Case("linear_cross_entropy", _head_loss(), cross_entropy, _head),
    Case(
        "linear_cross_entropy-sum",
        _head_loss(reduction="sum"),
        partial(cross_entropy, reduction="sum"),
        _head,
    ),
    Case(
        "linear_cross_entropy-none",
        _head_loss(reduction="none"),
        partial(cross_entropy, reduction="none"),
        _head,
    ),
    *(
        Case(
            f"linear_cross_entropy-{reduction}-smoothing-z_loss",
            _head_loss(reduction=reduction, label_smoothing=0.2, z_loss=0.01),
            partial(cross_entropy, reduction=reduction, label_smoothing=0.2, z_loss=0.01),
            _head,
        )
        for reduction in ("mean", "none")
    ),
    Case(
        "linear_cross_entropy-not-padded",
        kernels.linear_cross_entropy,
        cross_entropy,
        _head | {"weight": (VOCAB, C)},
    ),
]
