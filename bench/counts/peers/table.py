"""Which implementations of other packages are counted, operator by operator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ....kernels.examples import Outputs
from ...emulator.counting import Program, Sampler
from ...ops import peers
from ...ops.cases import EPS
from ..measure import Case, P, evenly
from . import clones, inductor
from .gpu import pretended

TORCH = f"torch {torch.__version__.partition('+')[0]}"
ATTENTION, MLP, HEAD, NORM, ADD_NORM = (
    *("attention", "gelu_mlp", "linear_cross_entropy"),
    *("layer_norm", "add_layer_norm"),
)


@dataclass
class Peer:
    """One implementation of an operator."""

    name: str  # with its version
    call: Callable[
        ..., Outputs
    ]  # takes activations, parameters and integers in the example's order, without the seed
    programs: Sampler  # which stand for a grid
    random: bool = False  # what it does depends on the numbers: not zeros
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Setting:
    """What a peer is made for."""

    case: Case
    tensors: Sequence[Tensor]  # as its call takes them
    architecture: str
    clones: Path | None  # a folder with clones of repositories, by their names


Load = Callable[[Setting], Peer]


def every(kernel: str, grid: Program) -> list[Program] | None:
    """A few programs of any kernel."""
    return evenly(grid)


# ---- packages that `bench ops` times on a GPU


def package(load: Callable[..., Any], programs: Sampler = every, random: bool = False) -> Load:
    def loaded(_: Setting) -> Peer:
        found = load.__wrapped__()  # type: ignore[attr-defined]
        return Peer(found["name"], found["call"], programs, random)

    return loaded


def first(kernel: str, grid: Program) -> list[Program]:
    """One row of a chunk of logits stands for all."""
    return [(0, 0, 0)]


def leading(kernel: str, grid: Program) -> list[Program] | None:
    """Of persistent programs the first few: the last one has fewer rows."""
    return [(i, 0, 0) for i in range(4)]


def unlocked(kernel: str, grid: Program) -> list[Program] | None:
    """Tiles of cut-cross-entropy that share no row or column, so that none waits for another's lock.

    Its programs go down eight tiles of rows before they go to the next tile of columns.
    """
    return {
        "_cce_lse_forward_kernel": [(i, 0, 0) for i in range(4)],
        "_cce_backward_kernel": [(9 * i, 0, 0) for i in range(2)],
    }.get(kernel, evenly(grid))


# ---- torch.compile


def compiled(eager: Callable[..., Outputs]) -> Load:
    def load(setting: Setting) -> Peer:
        call = inductor.compiled(eager, tuple(setting.tensors), setting.architecture)
        return Peer(f"Inductor, {TORCH}", call, every)

    return load


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = residual + x
    return F.layer_norm(h, x.shape[-1:], weight, bias, EPS), h


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor
) -> tuple[Tensor, Tensor]:
    h = residual + F.dropout(x + x_bias, P)
    return F.layer_norm(h, x.shape[-1:], weight, bias, EPS), h


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def flex(setting: Setting) -> Peer:
    """From the packed projection; its block mask is made once."""
    n_head, length = int(setting.case.sizes["H"]), int(setting.case.sizes["T"])

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def attention(qkv: Tensor, mask: Any) -> Tensor:
        return flex_attention(*peers.heads(qkv, n_head), block_mask=mask).transpose(1, 2).flatten(2)

    mask = create_block_mask(visible, None, None, length, length, device="cpu")
    call = inductor.compiled(attention, (*setting.tensors, mask), setting.architecture)
    return Peer(f"FlexAttention, {TORCH}", lambda qkv: call(qkv, mask), one_head)


def one_head(kernel: str, grid: Program) -> list[Program] | None:
    """Of FlexAttention's kernels the tiles of one head, which see more or less of the triangle."""
    return [(i, 0, 0) for i in range(grid[0])] if "triton_tem" in kernel else evenly(grid)


# ---- clones of repositories


def tutorial(setting: Setting) -> Peer:
    with pretended(setting.architecture):
        name, call = clones.tutorial(int(setting.case.sizes["H"]), setting.clones)
    return Peer(name, call, one_head_in_y, dtype=torch.float16)


def flash_layer_norm(setting: Setting) -> Peer:
    p, add = setting.case.sizes.get("p", 0.0), setting.case.example.operator == ADD_NORM
    with pretended(setting.architecture):
        return Peer(*clones.flash_layer_norm(p, add, setting.clones), leading)


def one_head_in_y(kernel: str, grid: Program) -> list[Program]:
    """Tiles along x; heads along y or z."""
    return [(i, 0, 0) for i in range(grid[0])]


TABLE: dict[str, dict[str, Load]] = {
    "liger-kernel": {
        NORM: package(peers.liger_norm, leading),
        ADD_NORM: package(peers.liger_add_norm, leading),
        HEAD: package(peers.liger_loss, first),
    },
    "cut-cross-entropy": {HEAD: package(peers.cut_cross_entropy, unlocked, random=True)},
    "Inductor": {
        NORM: compiled(layer_norm),
        ADD_NORM: compiled(add_layer_norm),
        f"{ADD_NORM}, dropout {P}": compiled(dropout_add_layer_norm),
        MLP: compiled(gelu_mlp),
        HEAD: compiled(linear_cross_entropy),
    },
    "FlexAttention": {ATTENTION: flex},
    "Triton's tutorial": {ATTENTION: tutorial},
    "flash-attention": {
        NORM: flash_layer_norm,
        ADD_NORM: flash_layer_norm,
        f"{ADD_NORM}, dropout {P}": flash_layer_norm,
    },
}
