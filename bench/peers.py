"""The sides of a comparison: GPT-2 as others implement it, built with the same weights as ours.

Each peer is optional; one that is not installed is left out by name, never silently.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..gpt.config import ModelConfig
from ..gpt.huggingface import to_transformers
from ..gpt.model import GPT


@dataclass
class Peer:
    """A model that trains: `loss(inputs, targets)` is a scalar to call backward on."""

    name: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]


def fusedgpt(model: GPT, dtype: torch.dtype = torch.float32) -> Peer:
    """Ours. dtype: of the activations."""
    return Peer("fusedgpt", model, lambda inputs, targets: model(inputs, targets, dtype=dtype))


def transformers_gpt2(model: GPT, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Peer:
    """Hugging Face's GPT2LMHeadModel with the weights of `model`, on its device.

    Args:
        model: ours.
        dtype: of autocast, which is off for float32.
        compiled: through torch.compile.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = model.config
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
    )
    theirs: nn.Module = GPT2LMHeadModel(config)
    theirs.load_state_dict(to_transformers(model), strict=False)
    device = next(model.parameters()).device
    theirs.to(device).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = theirs(inputs).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    name = f"transformers {version('transformers')}"
    if compiled:
        return Peer(f"{name}, torch.compile", theirs, torch.compile(loss, dynamic=False))
    return Peer(name, theirs, loss)


def nanogpt(model: GPT, folder: Path) -> Peer:
    """nanoGPT's model out of a clone of its repository, with the weights of `model`.

    It has one size of biases for all (ours must have been built the same) and the exact GELU where GPT-2 has
    the tanh form, so its loss differs in the fourth digit.

    Raises:
        FileNotFoundError: the folder is no clone of nanoGPT.
    """
    source = folder / "model.py"
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; --nanogpt takes a clone of nanoGPT")
    module = _load(source)
    shape = model.config
    config = module.GPTConfig(
        block_size=shape.context_length,
        vocab_size=shape.vocab_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        dropout=0.0,
        bias=shape.bias,
    )
    theirs = module.GPT(config)
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = {
        name: weight.T if name.endswith(transposed) else weight
        for name, weight in to_transformers(model).items()
    }
    own = theirs.state_dict()
    theirs.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return Peer("nanoGPT", theirs.train(), lambda inputs, targets: theirs(inputs, targets)[1])


def _load(source: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_model(config: ModelConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)
