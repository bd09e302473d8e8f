"""float32 linear layers of a CPU through oneDNN.

PyTorch gives float32 matmuls to MKL, which leaves AVX-512 unused on AMD processors: (768, 128) x (128, 512) takes one core
0.96 ms, oneDNN 0.43 ms (0.81 ms without AVX-512). The operator is the one that torch.compile generates on a CPU.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import register

_LEAST = 2**20  # multiplications below which the operator's own 15 µs outweigh what it saves
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `Linear` computes x @ weight.T, and faster than F.linear."""
    return (
        _AVAILABLE
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _LEAST
        and x.is_cpu
        and weight.is_cpu
    )


class Linear(torch.autograd.Function):
    """x @ weight.T + bias: x (..., in), weight (out, in), bias (out,) or None; any strides."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows, dy_rows = x.flatten(0, -2), dy.flatten(0, -2)
        dx = _linear(dy, weight.T) if wanted[0] else None
        dw = _linear(dy_rows.T, rows.T) if wanted[1] else None
        db = dy_rows.sum(0) if wanted[2] else None
        return dx, dw, db


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# An operator of our own, since Inductor takes mkldnn's with constant weights only
_linear = register("onednn_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", _launch, _fake)
