"""The feed-forward sub-layer: the operator, elementwise GELU kernels, and matmuls with GELU in their epilogue."""
