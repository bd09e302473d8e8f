"""Implementations of the training step: ours and GPT-2 as others write it, all with the same weights.

All others are optional; one that is not installed is reported by name.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...gpt.config import RunConfig, TrainConfig
from ...gpt.model import GPT
from ...gpt.optim import build_optimizers
from ...gpt.train.compilation import compile_step
from ...gpt.train.precompile import precompile
from ...gpt.train.step import TrainStep
from ...kernels import use_backend
from .sizes import Workload

OURS = "fusedgpt"
PLAIN = "fusedgpt, plain PyTorch"
COMPILED = "fusedgpt, torch.compile"
LR, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Implementation:
    """A model that trains: `step(inputs, targets)` does all of one step and returns its loss and gradient norm."""

    name: str
    model: nn.Module
    step: Step


def builders(
    work: Workload, nanogpt_folder: Path | None = None
) -> Iterator[tuple[str, Callable[[], Implementation]]]:
    """Every implementation by its name, ours first, each to be built when its turn comes.

    Raises:
        FileNotFoundError: the folder is no clone of nanoGPT.
    """
    if nanogpt_folder is not None and not (nanogpt_folder / "model.py").is_file():
        source = nanogpt_folder / "model.py"
        raise FileNotFoundError(f"{source} does not exist; --nanogpt takes a clone of nanoGPT")
    yield OURS, lambda: fusedgpt(work)
    if work.device.type == "cuda":
        yield PLAIN, lambda: fusedgpt(work, "torch", captured=False)
        yield f"{PLAIN}, torch.compile", lambda: compiled(work)
    yield COMPILED, lambda: fusedgpt(work, compile=True)
    try:
        name = f"transformers {version('transformers')}"
        yield name, lambda: transformers_gpt2(work)
        yield f"{name}, torch.compile", lambda: transformers_gpt2(work, compile=True)
    except PackageNotFoundError:
        print("transformers is not installed and left out: pip install transformers")
    if nanogpt_folder is not None:
        yield "nanoGPT", lambda: nanogpt(work, nanogpt_folder)
        yield "nanoGPT, torch.compile", lambda: nanogpt(work, nanogpt_folder, compile=True)


def build_model(work: Workload) -> GPT:
    """Ours, with the weights that every implementation starts from; drawn on the device, where that takes no time."""
    torch.manual_seed(0)
    with torch.device(work.device):
        return GPT(work.config).train()


def train_config(work: Workload, captured: bool = True, compile: bool = False) -> TrainConfig:
    """The settings with which `gpt train` does the same step. captured: in CUDA graphs, on a GPU. compile: --compile on."""
    return TrainConfig(
        batch_size=work.batch,
        dtype=str(work.dtype)[6:],  # type: ignore[arg-type]
        activation_checkpointing=work.recompute,
        compile="on" if compile else "off",
        cuda_graph="auto" if captured else "off",
        lr=LR,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=DECAY,
        grad_clip=CLIP,
        schedule="constant",
        warmup_steps=0,
    )


def fusedgpt(
    work: Workload, backend: str = "auto", captured: bool = True, compile: bool = False
) -> Implementation:
    """Ours: the training loop's own step, its kernels compiled as the loop does it.

    Args:
        backend: of the operators.
        captured: in CUDA graphs, on a GPU.
        compile: as `gpt train --compile on`.
    """
    config = train_config(work, captured, compile)
    batch: list[tuple[Tensor, Tensor]] = []
    with use_backend(backend):
        compiling = precompile(RunConfig(work.config, config), work.device)
        model = build_model(work)
        train = TrainStep(model, build_optimizers(model, config), iter(batch.pop, None), config)
        compiling.join()
        compile_step(train, work.config, print)

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        batch.append((inputs, targets))
        with use_backend(backend):
            return train()

    name = COMPILED if compile else OURS if backend == "auto" else PLAIN
    return Implementation(name, model, step)


def compiled(work: Workload) -> Implementation:
    """Our model in plain PyTorch through torch.compile, as nanoGPT trains."""
    model = build_model(work)
    seed = torch.tensor([1], device=work.device)

    def forward(inputs: Tensor, targets: Tensor) -> Tensor:
        return model(inputs, targets, seed, dtype=work.dtype, recompute=work.recompute)

    forward = torch.compile(forward, dynamic=False)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        seed.add_(1)
        with use_backend("torch"):
            return forward(inputs, targets)

    return Implementation(f"{PLAIN}, torch.compile", model, _training(model, loss))


def transformers_gpt2(work: Workload, compile: bool = False) -> Implementation:
    """Hugging Face's GPT2LMHeadModel, under autocast where the activations are not float32.

    Raises:
        ImportError: transformers is not installed.
    """
    theirs = load_transformers(build_model(work))
    if work.recompute:
        theirs.gradient_checkpointing_enable()
    theirs.to(work.device).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with _autocast(work):
            logits = theirs(inputs, use_cache=False).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return _other(f"transformers {version('transformers')}", theirs, loss, compile)


def load_transformers(model: GPT) -> Any:
    """A GPT2LMHeadModel on the CPU with the weights of `model`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from ...gpt.huggingface import GELU, to_transformers  # here: it needs safetensors and the tokenizers

    shape = model.config
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        embd_pdrop=shape.embd_dropout,
        attn_pdrop=shape.attn_dropout,
        resid_pdrop=shape.resid_dropout,
        activation_function=GELU[shape.gelu],
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config)
    theirs.load_state_dict(to_transformers(model), strict=False)
    return theirs


def nanogpt(work: Workload, folder: Path, compile: bool = False) -> Implementation:
    """nanoGPT's model from a clone of its repository, with biases like GPT-2.

    GPT-2's vocabulary is padded as nanoGPT does by default. It has the exact GELU where GPT-2 has the tanh form, so its
    loss differs in the fourth digit.
    """
    from ...gpt.huggingface import to_transformers

    module, model = _load(folder / "model.py"), build_model(work)
    shape = work.config
    config = module.GPTConfig(
        block_size=shape.context_length,
        vocab_size=50304 if shape.vocab_size == 50257 else shape.vocab_size,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        dropout=shape.attn_dropout,
        bias=True,
    )
    theirs = module.GPT(config)
    weights = to_transformers(model)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            weight = weights[name]
            matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            weight = weight.T if matrix else weight
            parameter.zero_()[: len(weight)].copy_(weight)
    theirs.to(work.device).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with _autocast(work):
            return theirs(inputs, targets)[1]

    return _other("nanoGPT", theirs, loss, compile)


def _other(name: str, model: nn.Module, loss: Callable, compile: bool) -> Implementation:
    if compile:
        name, loss = f"{name}, torch.compile", torch.compile(loss, dynamic=False)
    return Implementation(name, model, _training(model, loss))


def _training(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The step around a loss, as a user of PyTorch writes it, with the fused AdamW."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(inputs, targets)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach(), norm

    return step


def _autocast(work: Workload) -> torch.autocast:
    return torch.autocast(work.device.type, work.dtype, enabled=work.dtype != torch.float32)


def _load(source: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nanogpt_model", source)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)  # Dynamo imports it by name
    spec.loader.exec_module(module)
    return module
