"""GPT-2's fused operators as plain functions on tensors: the public interface, nothing else.

Every function runs as a Triton kernel where tensors and machine allow, and in plain PyTorch everywhere else. `explain`
says which and why, `use_backend` forces one.
"""

from .backend import explain, use_backend
from .ops.attention.operator import attention, causal_attention
from .ops.cross_entropy import linear_cross_entropy
from .ops.dropout import dropout
from .ops.embedding import embed
from .ops.layer_norm.operator import add_layer_norm, layer_norm
from .ops.linear import linear
from .ops.mlp.operator import gelu_mlp

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
