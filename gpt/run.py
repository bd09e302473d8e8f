"""A run on disk: its folder, its checkpoints, and loading them.

Training, generation, evaluation and export share it.

    config.toml  tokenizer.json  metrics.jsonl  loss_curve.png  samples.txt
    checkpoints/step-000500/  model.safetensors  optimizer.safetensors  state.json

A checkpoint is written under a temporary name and renamed when complete, so every folder named step-* can be loaded.
Weights are stored at the vocabulary's true size under the model's own names.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.tokenizers import Tokenizer, load_tokenizer
from .config import ModelConfig, RunConfig
from .model import GPT
from .optim import Optimizers
from .settings import read_run, require_unused, write_config

_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class Run:
    """A trained model with its configuration and tokenizer."""

    path: Path
    config: RunConfig
    tokenizer: Tokenizer
    model: GPT
    step: int
    trained_on: str | None
    """`data.token_file.checksum` of its training tokens; None where the run did not train."""


def create_run(
    out: Path, config: RunConfig, model: GPT, tokenizer: Tokenizer, origins: Mapping[str, str]
) -> None:
    """Create a run folder from a model: configuration, tokenizer and a checkpoint of step 0.

    Raises:
        FileExistsError: the folder is not empty.
    """
    start_run(out, tokenizer)
    write_config(out / "config.toml", config, origins)
    save_checkpoint(out, model, None, {"step": 0}, keep=1)


def start_run(out: Path, tokenizer: Tokenizer) -> None:
    """Create a run folder with its tokenizer.

    Raises:
        FileExistsError: the folder is not empty.
    """
    require_unused(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer.json")


def load_run(path: Path, device: str | torch.device = "cpu") -> Run:
    """Load the newest checkpoint of a run, with its tokenizer and configuration.

    Raises:
        FileNotFoundError: no such run, or no checkpoint in it.
        ValueError: a file in it is damaged, or the tokenizer does not fit the model.
    """
    config = RunConfig.from_flat(read_run(path))
    tokenizer = load_tokenizer(path / "tokenizer.json")
    require_fit(tokenizer, config.model, path)
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(f"{path} has no checkpoint; train it with: gpt train --resume {path}")
    with torch.device(device):
        model = GPT(config.model)
    load_model(model, checkpoint)
    state = read_state(checkpoint)
    return Run(path, config, tokenizer, model.eval(), state["step"], state.get("loader", {}).get("data"))


def require_fit(tokenizer: Tokenizer, model: ModelConfig, path: Path) -> None:
    """Raise ValueError if a run's tokenizer is not the one that its model was trained with."""
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens but the model {model.vocab_size}; "
            "put back the tokenizer.json that the model was trained with"
        )


def latest_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = checkpoints(path)
    return found[-1] if found else None


def checkpoints(path: Path) -> list[Path]:
    folder = path / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def save_checkpoint(
    path: Path, model: GPT, optimizers: Optimizers | None, state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint of step state["step"] and remove all but the `keep` newest; returns its folder."""
    folder = path / "checkpoints" / f"step-{state['step']:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(model_tensors(model), temporary / "model.safetensors")
    if optimizers is not None:
        save_file(_optimizer_tensors(model, optimizers), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for file in temporary.iterdir():
        _flush(file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    _flush(folder.parent)
    for old in checkpoints(path)[:-keep]:
        shutil.rmtree(old)
    return folder


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state that `save_checkpoint` wrote."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint}/state.json cannot be read ({error}); delete that checkpoint"
        ) from None


def model_tensors(model: GPT) -> dict[str, Tensor]:
    """Weights by name, at the vocabulary's true size, on the CPU."""
    padded = {id(table) for table in model.vocabulary_tables()}
    return {
        name: (p.detach()[: model.config.vocab_size] if id(p) in padded else p.detach()).cpu().contiguous()
        for name, p in model.named_parameters()
    }


@torch.no_grad()
def load_model(model: GPT, checkpoint: Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    file = checkpoint / "model.safetensors"
    tensors = _load(file)
    own = model_tensors(model)
    if wrong := sorted(tensors.keys() ^ own.keys()):
        raise ValueError(f"{file} does not fit the run's configuration: {wrong[0]} is in only one of them")
    for name, p in model.named_parameters():
        if tensors[name].shape != own[name].shape:
            raise ValueError(
                f"{file} does not fit the run's configuration: {name} has shape {tuple(tensors[name].shape)}, "
                f"not {tuple(own[name].shape)}"
            )
        p[: len(tensors[name])] = tensors[name].to(p.device)


def load_optimizers(model: GPT, optimizers: Optimizers, checkpoint: Path) -> None:
    """Restore the optimizer's state; a checkpoint without one (an imported model) leaves it unchanged."""
    file = checkpoint / "optimizer.safetensors"
    if not file.exists():
        return
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _load(file).items():
        name, _, part = key.rpartition("|")
        p = parameters[name]
        # step counters too: fused AdamW needs them on the parameter's device
        state.setdefault(id(p), {})[part] = tensor.to(p.device)
    optimizers.load_state(state)


def _optimizer_tensors(model: GPT, optimizers: Optimizers) -> dict[str, Tensor]:
    state = optimizers.state()
    return {
        f"{name}|{part}": tensor.detach().cpu().contiguous()
        for name, p in model.named_parameters()
        for part, tensor in state.get(id(p), {}).items()
    }


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); delete that checkpoint to use the one before"
        ) from None


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
