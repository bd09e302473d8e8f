"""Run transformers' GPT-2 on this project's attention, and check that logits and gradients stay the same.

transformers looks up attention functions by name, so a kernel is one function and one `register` away from every model.
Run it with: python examples/kernel_in_transformers.py   (transformers: pip install -e '.[hf]' in the clone)
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from fusedgpt.kernels import attention, explain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused_attention(module, query, key, value, attention_mask, scaling=None, **kwargs) -> tuple[Tensor, None]:
    """Causal attention without padding or dropout: (B, H, T, D) in, (B, T, H, D) out, as transformers asks for it."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # views: the kernel takes any strides
    return attention(q, k, v, scale=scaling), None


def loss_and_gradients(implementation: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, loss and all gradients of a small random GPT-2 with the attention of that name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, attn_implementation=implementation, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).to(DEVICE).eval()
    ids = torch.randint(512, (2, 100), device=DEVICE)
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits, out.loss, [p.grad for p in model.parameters()]


if __name__ == "__main__":
    AttentionInterface.register("fusedgpt", fused_attention)
    logits, loss, gradients = loss_and_gradients("fusedgpt")
    expected_logits, expected_loss, expected_gradients = loss_and_gradients("sdpa")

    print(explain("attention", logits))
    print(f"loss with fusedgpt's attention {loss:.6f}, with torch's SDPA {expected_loss:.6f}")
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    print(f"logits and {len(gradients)} gradients agree")
