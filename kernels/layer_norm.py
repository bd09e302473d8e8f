"""LayerNorm, alone and with the residual addition and dropout before it (Ba, Kiros and Hinton, 2016).

    forward   h = residual + dropout(x + x_bias)          (layer_norm alone: h = x)
              μ = mean(h),  r = 1 / √(mean((h − μ)²) + eps)
              y = (h − μ) r · weight + bias
    backward  ĥ = (h − μ) r,  g = dy · weight
              dh = r (g − mean(g) − ĥ mean(g ĥ)) + dresidual_out
              dresidual = dh,  dx = dropout'(dh),  dx_bias = Σ rows of dx
              dweight = Σ rows of dy ĥ,  dbias = Σ rows of dy

Statistics are in float32 over the last dimension, with the biased variance. Saved: h (which is residual_out), the
weight, and μ and r, one float32 each a row.
"""

import torch
from torch import Tensor

from . import checks, reference
from .backend import autocast, choose


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., C).
        weight: (C,).
        bias: (C,), optional.
        eps: added to the variance.
        out_dtype: dtype of the result, by default x's, or autocast's where autocast is on.

    Returns:
        (..., C) in out_dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device.
    """
    checks.floating("layer_norm", x=x, weight=weight, bias=bias)
    checks.out_dtype("layer_norm", out_dtype)
    _check_width("layer_norm", x, weight=weight, bias=bias)
    out_dtype = out_dtype or autocast(x.new_empty(0)).dtype
    choose("layer_norm", x)
    return reference.layer_norm(x, weight, bias, eps, out_dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of one sub-layer and the start of the next: add to the residual stream, then normalise it.

    Args:
        x: (..., C), the sub-layer's output.
        residual: (..., C), the residual stream; may be float32 beside a lower-precision x.
        weight, bias: (C,), of the LayerNorm; bias optional.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x + x_bias, in [0, 1].
        seed: int64, one element, on x's device; needed where dropout_p > 0.
        stream: which of a step's dropouts this is.
        x_bias: (C,), optional: the bias of the projection that made x.

    Returns:
        y: (..., C), the normalised stream in x's dtype (under autocast in autocast's).
        residual_out: (..., C), the new residual stream in the residual's dtype.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or the probability.
    """
    checks.floating("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    checks.shape("add_layer_norm", "residual", residual, *x.shape)
    _check_width("add_layer_norm", x, weight=weight, bias=bias, x_bias=x_bias)
    checks.dropout("add_layer_norm", dropout_p, seed, x)
    x = autocast(x)
    choose("add_layer_norm", x)
    return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, stream, x_bias)


def _check_width(operator: str, x: Tensor, **parameters: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{operator}: x has shape {tuple(x.shape)}; it takes (..., C) with C of at least 1")
    for name, parameter in parameters.items():
        checks.shape(operator, name, parameter, x.shape[-1])
