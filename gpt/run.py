"""A run on disk: its folder, and loading the model in it.

Training, generation, evaluation and export share it.

    config.toml  tokenizer.json  metrics.jsonl  loss_curve.png  samples.txt  checkpoints/
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.files import new_folder
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..data.untrusted import InputError
from .checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
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
    run, named = located(path)
    config = run_config(run)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    checkpoint, state = fitting_checkpoint(run, config, tokenizer, (MODEL, STATE), named)
    if checkpoint is None or state is None:
        raise FileNotFoundError(f"{run} has no checkpoint; train it with: gpt train --resume {run}")
    what = f"{run}: a model of {config.model.parameters:,} parameters"
    require_memory(torch.device(device), 4 * config.model.parameters, what, "load it on a larger machine")
    with torch.device(device):
        model = GPT(config.model)
    load_model(model, checkpoint)
    return Run(run, config, tokenizer, model.eval(), state.step, state.loader.get("data"))


def fitting_checkpoint(
    run: Path,
    config: RunConfig,
    tokenizer: Tokenizer,
    names: Collection[str] = (MODEL, OPTIMIZER, STATE),
    named: Path | None = None,
) -> tuple[Path, State] | tuple[None, None]:
    """The checkpoint of a run to use, verified, and its state; what is skipped is said on stderr.

    Args:
        run: its folder.
        config, tokenizer: the run's, or those that it is to go on with.
        names: the files that will be used.
        named: the checkpoint; None: the newest whose files verify.

    Returns:
        None where the run has no checkpoint.

    Raises:
        ValueError: no checkpoint of the run is whole, or it does not fit settings and tokenizer: the differences are listed.
    """
    require_fit(tokenizer, config.model, run)
    if named is not None:
        verify(named, names)
    else:
        named, skipped = valid_checkpoint(run, names)
        warn_of_skipped(skipped)
        if named is None:
            return None, None
    state = load_state(named)
    if found := differences(state, config, tokenizer.fingerprint()):
        remedy = "put back its settings and tokenizer.json, or begin a new run"
        raise InputError(run, f"it does not fit {named.name}: {', '.join(found)}", remedy)
    return named, state


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
