"""A projection: the library's matmul under the operators' dtype rules.

    forward   y = x Wᵀ + b
    backward  dx = dy W,   dW = dyᵀ x,   db = Σ rows of dy

Saves x and the weight.
"""

from torch import Tensor

from . import checks, reference
from .backend import autocast, choose


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: (..., in) activations.
        weight: (out, in), of any strides; cast to x's dtype.
        bias: (out,), optional.

    Returns:
        (..., out) in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device.
    """
    checks.floating("linear", x=x, weight=weight, bias=bias)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; it takes (out, in)"
        )
    checks.shape("linear", "bias", bias, weight.shape[0])
    x = autocast(x)
    choose("linear", x)
    return reference.linear(x, weight, bias)
