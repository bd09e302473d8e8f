"""Causal self-attention: the operator, its forward kernel, its two backwards, and what the kernels share."""
