"""The feed-forward sub-layer: two projections with GELU between (Hendrycks and Gimpel, 2016).

    forward   pre = x W_fcᵀ + b_fc,  a = GELU(pre),  y = a W_projᵀ + b_proj
    backward  da = dy W_proj,  dpre = da · GELU'(pre),  dx = dpre W_fc
              dW_proj = dyᵀ a,  db_proj = Σ rows of dy,  dW_fc = dpreᵀ x,  db_fc = Σ rows of dpre

GELU is 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), GPT-2's, or x Φ(x). With recompute only x is saved.
"""

from torch import Tensor

from . import checks, reference
from .backend import autocast, choose


def gelu_mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    approximate: str = "tanh",
    recompute: bool = False,
) -> Tensor:
    """GELU(x @ w_fc.T + b_fc) @ w_proj.T + b_proj.

    Args:
        x: (..., C).
        w_fc: (F, C), GPT-2 has F = 4C; b_fc: (F,), optional.
        w_proj: (C, F); b_proj: (C,), optional.
        approximate: "tanh" (GPT-2's) or "none" (the exact GELU).
        recompute: save x alone and compute the pre-activation again in the backward.

    Returns:
        (..., C) in x's dtype; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument's dtype, shape or device, or an unknown `approximate`.
    """
    checks.floating("gelu_mlp", x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj, b_proj=b_proj)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"gelu_mlp: approximate is {approximate!r}; it takes 'tanh' or 'none'")
    if w_fc.dim() != 2 or x.shape[-1:] != w_fc.shape[1:]:
        raise ValueError(
            f"gelu_mlp: w_fc {tuple(w_fc.shape)} does not fit x {tuple(x.shape)}; it takes (F, C)"
        )
    checks.shape("gelu_mlp", "b_fc", b_fc, w_fc.shape[0])
    if w_proj.dim() != 2 or w_proj.shape[1] != w_fc.shape[0]:
        raise ValueError(
            f"gelu_mlp: w_proj {tuple(w_proj.shape)} does not fit w_fc {tuple(w_fc.shape)}; it takes (C, F)"
        )
    checks.shape("gelu_mlp", "b_proj", b_proj, w_proj.shape[0])
    x = autocast(x)
    choose("gelu_mlp", x)
    return reference.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, approximate, recompute)
