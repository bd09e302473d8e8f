"""Implementations of other packages, each optional and named with its version.

A loader returns the fields of an `Implementation`, or None where the package has no such operator, is not installed or cannot
be imported; the latter two are reported once. One that fails later, at its first call for example, is reported by its caller.
"""

from collections.abc import Callable
from functools import cache, wraps
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5
Peer = dict[str, Any]  # the fields of an Implementation
Load = Callable[..., Peer | None]


def optional(package: str, name: str = "{}") -> Callable[[Load], Load]:
    """A loader whose imports may fail; the function that it wraps raises.

    Args:
        name: of the implementation, with {} for the package and its version.
    """

    def decorate(load: Load) -> Load:
        @wraps(load)
        def named(*args: Any) -> Peer | None:
            peer = load(*args)
            return peer and {"name": name.format(f"{package} {version(package)}"), **peer}

        @wraps(named)
        def loaded(*args: Any) -> Peer | None:
            try:
                return named(*args)
            except Exception as error:  # a package for GPUs may fail in any way where it finds none
                left_out(package, str(error))
                return None

        return loaded

    return decorate


@cache
def left_out(package: str, why: str) -> None:
    print(f"{package} is left out: {why}")


def heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (B, H, T, D) views of the packed (B, T, 3C)."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, n_head, width // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


# ---- LayerNorm


@optional("liger-kernel")
def liger_norm() -> Peer:
    from liger_kernel.transformers.functional import liger_layer_norm

    return {"call": lambda x, w, b: liger_layer_norm(x, w, b, EPS)}


@optional("liger-kernel", "{} after an add")
def liger_add_norm() -> Peer:
    from liger_kernel.transformers.functional import liger_layer_norm

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return liger_layer_norm(h, weight, bias, EPS), h

    return {"call": call}


@optional("quack-kernels")
def quack_norm() -> Peer:
    """Forward only: its layer norm has no backward."""
    from quack.rmsnorm import layernorm_fwd

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layernorm_fwd(x.detach(), weight.detach(), bias.detach(), eps=EPS)

    return {"call": call, "masters": True, "backward": False}


# ---- the head and its loss


@optional("liger-kernel")
def liger_loss() -> Peer:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return {"call": liger_fused_linear_cross_entropy}


@optional("cut-cross-entropy")
def cut_cross_entropy() -> Peer:
    from cut_cross_entropy import linear_cross_entropy

    return {"call": linear_cross_entropy}


@optional("quack-kernels", "{}, untuned")
def quack_loss() -> Peer:
    """Without its autotuning, which takes longer than all the rest."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(x, weight, targets, tuned=False)

    return {"call": call}


# ---- attention


@optional("torch", "FlexAttention, compiled")
def flex(n_head: int, p: float) -> Peer | None:
    """Its block mask is made once. It has no dropout."""
    if p:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Callable = torch.compile(flex_attention, dynamic=False)

    @cache
    def causal(length: int, device: torch.device) -> Any:
        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key

        return create_block_mask(visible, None, None, length, length, device=device)

    def call(qkv: Tensor) -> Tensor:
        q, k, v = heads(qkv, n_head)
        y = compiled(q, k, v, block_mask=causal(qkv.shape[1], qkv.device))
        return y.transpose(1, 2).flatten(2)

    return {"call": call}


@optional("flash-attn")
def flash_2(n_head: int, p: float) -> Peer:
    from flash_attn import flash_attn_qkvpacked_func

    def call(qkv: Tensor) -> Tensor:
        packed = qkv.unflatten(2, (3, n_head, -1))
        return flash_attn_qkvpacked_func(packed, dropout_p=p, causal=True).flatten(2)

    return {"call": call, "draws": p > 0}


@optional("flash-attn-4")
def flash_4(n_head: int, p: float) -> Peer | None:
    """The one in CuTe, which has no dropout."""
    if p:
        return None
    from flash_attn.cute import flash_attn_func

    def call(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, n_head, -1)).unbind(2)
        y = flash_attn_func(q, k, v, causal=True)
        return (y[0] if isinstance(y, tuple) else y).flatten(2)

    return {"call": call}
