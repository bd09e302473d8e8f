"""GPT-2 (Radford et al., 2019): embeddings, blocks of attention and feed-forward, head. It reads like the paper, and
each step of it is one call into `kernels`.

The residual stream `x` runs through the whole model; `y` is its normalised copy, which the sub-layers read. A
sub-layer's output is added to the stream by the operator that also computes the next LayerNorm, across block
borders too, so no addition and no dropout is a pass over memory of its own.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import (
    add_layer_norm,
    attention,
    causal_attention,
    embed,
    gelu_mlp,
    layer_norm,
    linear,
    linear_cross_entropy,
)
from .config import ModelConfig
from .pretrained import Pretrained


class Cache(Protocol):
    """The keys and values of the positions seen so far; `gpt/generate.py` has the implementation."""

    positions: Tensor  # (B, T): the positions of the tokens that come next
    first_key: Tensor | None  # (B, T): the first key that each of them may see; None: key 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, T, H, D) keys and values of a layer and return all of that layer's."""
        ...


class Attention(nn.Module):
    """Causal self-attention over n_head heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.head_dim, self.layer = config.n_head, config.head_dim, layer
        self.dropout = config.attn_dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias and config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, y: Tensor, seed: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, T, C) to (B, T, C), without the projection's bias: the addition to the stream applies that."""
        qkv = linear(y, self.c_attn.weight, self.c_attn.bias)  # (B, T, 3C)
        if cache is None:
            p = self.dropout if self.training else 0.0
            a = causal_attention(qkv, self.n_head, p, seed, stream=3 * self.layer + 1)  # (B, T, C)
        else:
            q, k, v = qkv.view(*qkv.shape[:2], 3, self.n_head, self.head_dim).unbind(2)  # (B, T, H, D)
            k, v = cache.extend(self.layer, k, v)
            a = attention(q, k, v, first_key=cache.first_key).flatten(2)  # (B, T, C)
        return linear(a, self.c_proj.weight)


class MLP(nn.Module):
    """The feed-forward sub-layer, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, y: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C), without the second projection's bias: the addition to the stream applies that."""
        up, down = self.c_fc, self.c_proj
        return gelu_mlp(y, up.weight, up.bias, down.weight, None, self.approximate)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.resid_dropout
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, y: Tensor, x: Tensor, next_norm: nn.LayerNorm, seed: Tensor | None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pre-norm. y is ln_1 of the stream x, both (B, T, C); returns next_norm of the new stream, and the stream."""
        a = self.attn(y, seed, cache)
        y, x = self._add(a, x, self.attn.c_proj.bias, self.ln_2, seed, stream=3 * self.layer + 2)
        m = self.mlp(y)
        return self._add(m, x, self.mlp.c_proj.bias, next_norm, seed, stream=3 * self.layer + 3)

    def forward_post(self, x: Tensor, seed: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Post-norm. The stream x itself is normalised after each addition, (B, T, C) to (B, T, C)."""
        x, _ = self._add(
            self.attn(x, seed, cache), x, self.attn.c_proj.bias, self.ln_1, seed, 3 * self.layer + 2
        )
        x, _ = self._add(self.mlp(x), x, self.mlp.c_proj.bias, self.ln_2, seed, 3 * self.layer + 3)
        return x

    def _add(
        self,
        out: Tensor,
        x: Tensor,
        bias: Tensor | None,
        norm: nn.LayerNorm,
        seed: Tensor | None,
        stream: int,
    ) -> tuple[Tensor, Tensor]:
        p = self.dropout if self.training else 0.0
        return add_layer_norm(out, x, norm.weight, norm.bias, norm.eps, p, seed, stream, x_bias=bias)


class GPT(nn.Module, Pretrained):
    """The language model: token ids in, logits or a loss out. `Pretrained` loads one and writes text with it.

    The vocabulary's rows are padded to a multiple of 128 inside; logits, counts and exports have the true size.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias) if config.norm == "pre" else None
        self.lm_head = (
            None if config.tie_weights else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """N(0, 0.02), residual projections 0.02/√(2L) (Radford et al., 2019, section 2.3); biases and padding 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
        for table in self.vocabulary_tables():
            table[self.config.vocab_size :] = 0.0

    def vocabulary_tables(self) -> Iterator[Tensor]:
        """The matrices with a row a token: the embedding and, where it is not the same one, the head."""
        yield self.wte.weight
        if self.lm_head is not None:
            yield self.lm_head.weight

    def num_params(self, position_embeddings: bool = True) -> int:
        """Trainable numbers at the true vocabulary size, with or without the position table."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        count = sum(parameter.numel() for parameter in self.parameters())
        count -= padding * self.config.n_embd * len(list(self.vocabulary_tables()))
        return count if position_embeddings else count - self.wpe.weight.numel()

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        seed: Tensor | None = None,
        dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        recompute: bool = False,
        reduction: str = "mean",
        cache: Cache | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Logits, or the loss where targets are given.

        Args:
            ids: (B, T) int64, T ≤ context_length.
            targets: (B, T) int64, optional; -100 does not count.
            seed: int64, one element, on the model's device: this micro-step's dropout; needed in training mode
                where a dropout rate is above 0.
            dtype: of the activations, the weights' by default.
            residual_dtype: of the residual stream, `dtype` by default; post-norm has no stream beside y.
            recompute: keep no activations inside blocks, compute them again in the backward.
            reduction: of the loss: "mean", "sum" or "none" (then (B · T,)).
            cache: keys and values seen before; the ids continue them. Inference only, under no_grad.
            label_smoothing, z_loss: of the loss, see `linear_cross_entropy`.

        Returns:
            (B, T, vocab_size) logits in `dtype`, or the loss in nats, float32.

        Raises:
            ValueError: the sequence is longer than the context.
        """
        y = self.hidden(ids, seed, dtype, residual_dtype, recompute, cache)  # (B, T, C)
        head = self.wte.weight if self.lm_head is None else self.lm_head.weight
        if targets is None:
            return linear(y, head[: self.config.vocab_size])
        return linear_cross_entropy(
            y.flatten(0, 1),
            head,
            targets.flatten(),
            vocab_size=self.config.vocab_size,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

    def hidden(
        self,
        ids: Tensor,
        seed: Tensor | None = None,
        dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        recompute: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head reads, (B, T, C); the arguments are `forward`'s."""
        dtype = dtype or self.wte.weight.dtype
        residual_dtype = dtype if self.ln_f is None else residual_dtype or dtype
        x = self._embed(ids, seed, residual_dtype, cache)  # (B, T, C)

        def run(function, *args):  # type: ignore[no-untyped-def]
            if not recompute:
                return function(*args)
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

        blocks: list[Block] = list(self.h)  # type: ignore[arg-type]
        if self.ln_f is None:
            for block in blocks:
                x = run(block.forward_post, x, seed, cache)
            return x
        first, *norms = [*(block.ln_1 for block in blocks), self.ln_f]
        y = layer_norm(x, first.weight, first.bias, first.eps, out_dtype=dtype)
        for block, next_norm in zip(blocks, norms, strict=True):
            y, x = run(block, y, x, next_norm, seed, cache)
        return y

    def _embed(self, ids: Tensor, seed: Tensor | None, dtype: torch.dtype, cache: Cache | None) -> Tensor:
        if cache is not None:  # rows of different lengths stand at different positions
            return (self.wte(ids) + self.wpe(cache.positions)).to(dtype)
        if ids.shape[1] > self.config.context_length:
            raise ValueError(f"{ids.shape[1]} tokens do not fit a context of {self.config.context_length}")
        p = self.config.embd_dropout if self.training else 0.0
        return embed(ids, self.wte.weight, self.wpe.weight, p, seed, stream=0, out_dtype=dtype)
