"""fusedgpt: GPT-2 training on fused Triton kernels, and the same in plain PyTorch on any CPU."""

__version__ = "0.1.0"
