"""LayerNorm, alone and fused with the residual addition and dropout: the operator and its kernels."""
