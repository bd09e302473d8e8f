"""The peers that are packages of their own, each optional and named with its version.

A loader returns what a `Side` takes, or None, with a word once, where the package is not installed. One that is installed
and fails later, at its first call for example, is reported with its error and keeps no other side from being timed.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5
Peer = dict[str, Any]  # the fields of a Side


@cache
def installed(package: str, module: str) -> str | None:
    """The package's name with its version; None, with a word, where it cannot be imported."""
    try:
        __import__(module)
        return f"{package} {version(package)}"
    except (ImportError, PackageNotFoundError, OSError) as error:
        print(f"{package} is left out: {error}")
        return None


def heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (B, H, T, D) views of the packed (B, T, 3C)."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, n_head, width // (3 * n_head)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


# ---- LayerNorm


def liger_norm() -> Peer | None:
    if (name := installed("liger-kernel", "liger_kernel.transformers.functional")) is None:
        return None
    from liger_kernel.transformers.functional import liger_layer_norm

    return {"name": name, "call": lambda x, w, b: liger_layer_norm(x, w, b, EPS)}


def liger_add_norm() -> Peer | None:
    if (peer := liger_norm()) is None:
        return None

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return peer["call"](h, weight, bias), h

    return {"name": f"{peer['name']} after an add", "call": call}


def quack_norm() -> Peer | None:
    """Forward only: its layer norm has no backward."""
    if (name := installed("quack-kernels", "quack.rmsnorm")) is None:
        return None
    from quack.rmsnorm import layernorm_fwd

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layernorm_fwd(x.detach(), weight.detach(), bias.detach(), eps=EPS)

    return {"name": name, "call": call, "masters": True, "backward": False}


# ---- the head and its loss


def liger_loss() -> Peer | None:
    if (name := installed("liger-kernel", "liger_kernel.transformers.functional")) is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return {"name": name, "call": liger_fused_linear_cross_entropy}


def cut_cross_entropy() -> Peer | None:
    if (name := installed("cut-cross-entropy", "cut_cross_entropy")) is None:
        return None
    from cut_cross_entropy import linear_cross_entropy

    return {"name": name, "call": linear_cross_entropy}


def quack_loss() -> Peer | None:
    """Without its autotuning, which takes longer than all the rest."""
    if (name := installed("quack-kernels", "quack.linear_cross_entropy")) is None:
        return None
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(x, weight, targets, tuned=False)

    return {"name": f"{name}, untuned", "call": call}


# ---- attention


def flex(n_head: int, p: float) -> Peer | None:
    """FlexAttention, compiled, its mask of blocks made once. It has no dropout."""
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

    return {"name": "FlexAttention, compiled", "call": call}


def flash_2(n_head: int, p: float) -> Peer | None:
    if (name := installed("flash-attn", "flash_attn.flash_attn_interface")) is None:
        return None
    from flash_attn import flash_attn_qkvpacked_func

    def call(qkv: Tensor) -> Tensor:
        packed = qkv.unflatten(2, (3, n_head, -1))
        return flash_attn_qkvpacked_func(packed, dropout_p=p, causal=True).flatten(2)

    return {"name": name, "call": call, "draws": p > 0}


def flash_4(n_head: int, p: float) -> Peer | None:
    """FlashAttention 4 (CuTe), which has no dropout."""
    if p or (name := installed("flash-attn-4", "flash_attn.cute")) is None:
        return None
    from flash_attn.cute import flash_attn_func

    def call(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(2, (3, n_head, -1)).unbind(2)
        y = flash_attn_func(q, k, v, causal=True)
        return (y[0] if isinstance(y, tuple) else y).flatten(2)

    return {"name": name, "call": call}
