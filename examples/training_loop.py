"""Train a character model in a loop of your own: functions of `fusedgpt.kernels`, parameters and optimizer of PyTorch.

Run it with: python examples/training_loop.py
"""

import torch
from torch import Tensor, nn

from fusedgpt import kernels
from fusedgpt.data import make_tokenizer, open_corpus

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, C, HEADS = 64, 64, 4  # context, width, attention heads
STEPS, BATCH = 300, 16


def parameters(vocab_size: int) -> nn.ParameterDict:
    """One GPT-2 block between an embedding and a tied head."""
    shapes = {"wte": (vocab_size, C), "wpe": (T, C), "qkv": (3 * C, C), "out": (C, C)}
    shapes |= {"fc": (4 * C, C), "proj": (C, 4 * C), "ln_1": (C,), "ln_2": (C,), "ln_f": (C,)}
    values = {n: torch.ones(s) if n[:2] == "ln" else 0.05 * torch.randn(s) for n, s in shapes.items()}
    return nn.ParameterDict({name: nn.Parameter(value.to(DEVICE)) for name, value in values.items()})


def loss_of(p: nn.ParameterDict, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of targets (B, T) given ids (B, T)."""
    x = kernels.embed(ids, p["wte"], p["wpe"])  # (B, T, C), the residual stream
    y = kernels.layer_norm(x, p["ln_1"])
    a = kernels.linear(kernels.causal_attention(kernels.linear(y, p["qkv"]), HEADS), p["out"])
    y, x = kernels.add_layer_norm(a, x, p["ln_2"])  # adds to the stream and normalises it
    m = kernels.gelu_mlp(y, p["fc"], None, p["proj"], None)
    y, x = kernels.add_layer_norm(m, x, p["ln_f"])
    return kernels.linear_cross_entropy(y, p["wte"], targets)  # never holds all logits


if __name__ == "__main__":
    torch.manual_seed(0)
    text = "\n".join(open_corpus("tales:400").train_texts())
    tokenizer = make_tokenizer("char", [text])
    tokens = torch.tensor(tokenizer.encode_ordinary(text), device=DEVICE)
    p = parameters(tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(p.values(), lr=5e-3)
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - T, (BATCH, 1), device=DEVICE)
        windows = tokens[starts + torch.arange(T + 1, device=DEVICE)]  # (B, T + 1)
        loss = loss_of(p, windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 100 == 0:
            print(f"step {step:3}  loss {loss.item():.3f} nats a character")
