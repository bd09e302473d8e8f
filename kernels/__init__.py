"""The fused operators of GPT-2 as plain functions on tensors: the public face, nothing else.

Every function runs as a Triton kernel where the tensors and the machine allow it and in plain PyTorch everywhere
else; `explain` says which and why, `use_backend` forces one.
"""

from .attention import attention, causal_attention
from .backend import explain, use_backend
from .cross_entropy import linear_cross_entropy
from .dropout import dropout
from .embedding import embed
from .layer_norm import add_layer_norm, layer_norm
from .linear import linear
from .mlp import gelu_mlp

__all__ = [
    "add_layer_norm",
    "attention",
    "causal_attention",
    "dropout",
    "embed",
    "explain",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "use_backend",
]
