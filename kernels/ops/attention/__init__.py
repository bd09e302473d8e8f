"""Causal self-attention: the operator, its forward kernel, its two backwards, and the tile accesses they share."""
