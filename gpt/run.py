"""A run on disk: its folder, and loading the model in it.

Training, generation, evaluation and export share it.

    config.toml  tokenizer.json  metrics.jsonl  loss_curve.png  samples.txt  checkpoints/
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.files import new_folder
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..data.untrusted import InputError
from .checkpoint import (
    MANIFEST,
    MODEL,
    STATE,
    State,
    checkpoints,
    differences,
    fill,
    load_model,
    load_state,
    model_tensors,
    valid_checkpoint,
    verify,
    versions,
    warn_of_skipped,
)
from .config import ModelConfig, RunConfig
from .device import require_memory
from .model import GPT
from .settings import require_unused, run_config, write_config


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
    out: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    origins: Mapping[str, str],
    model: GPT | None = None,
) -> None:
    """Create a run folder, whole or not at all: configuration, tokenizer and, of a given model, a checkpoint of step 0.

    Raises:
        FileExistsError: the folder is not empty.
    """
    require_unused(out)
    with new_folder(out) as folder:
        tokenizer.save(folder / "tokenizer.json")
        write_config(folder / "config.toml", config, origins)
        if model is not None:
            first = folder / "checkpoints" / "step-000000"
            first.mkdir(parents=True)
            state = State(0, {}, None, [], 0, 0, {}, config.flat(), versions(), tokenizer.fingerprint())
            fill(first, model_tensors(model), {}, state)


def load_run(path: Path, device: str | torch.device = "cpu") -> Run:
    """Load a run with its tokenizer and configuration, from its newest checkpoint whose files verify.

    Args:
        path: the run's folder, or that of one of its checkpoints.
        device: to load the model on.

    Raises:
        FileNotFoundError: no such run, or no checkpoint in it.
        ValueError: a file in it is damaged, or settings, tokenizer and model do not fit together.
    """
    path, checkpoint = located(path)
    config = run_config(path)
    tokenizer = load_tokenizer(path / "tokenizer.json")
    require_fit(tokenizer, config.model, path)
    if checkpoint is None:
        checkpoint, skipped = valid_checkpoint(path, (MODEL, STATE))
        warn_of_skipped(skipped)
    else:
        verify(checkpoint, (MODEL, STATE))
    if checkpoint is None:
        raise FileNotFoundError(f"{path} has no checkpoint; train it with: gpt train --resume {path}")
    state = load_state(checkpoint)
    if found := differences(state, config, tokenizer.fingerprint()):
        remedy = f"put back the config.toml and tokenizer.json of {checkpoint.name}"
        raise InputError(path, f"it does not fit its checkpoint: {', '.join(found)}", remedy)
    what = f"{path}: a model of {config.model.parameters:,} parameters"
    require_memory(torch.device(device), 4 * config.model.parameters, what, "load it on a larger machine")
    with torch.device(device):
        model = GPT(config.model)
    load_model(model, checkpoint)
    return Run(path, config, tokenizer, model.eval(), state.step, state.loader.get("data"))


def located(path: Path) -> tuple[Path, Path | None]:
    """The run that a path names, and the checkpoint where it names one of them."""
    full = path.resolve()
    isfile = os.path.isfile(full / MANIFEST)  # False for a name that is too long, too
    if isfile or full in checkpoints(full.parent.parent):
        return full.parent.parent, full
    return path, None


def require_fit(tokenizer: Tokenizer, model: ModelConfig, path: Path) -> None:
    """Raise ValueError if a run's tokenizer is not the one that its model was trained with."""
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens but the model {model.vocab_size}; "
            "put back the tokenizer.json that the model was trained with"
        )
