"""From settings to a session: data, tokenizer, model and optimizers, new or from the newest checkpoint that is whole."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ...data.corpus import open_corpus, split_name
from ...data.files import AppendedFile
from ...data.loader import TokenLoader
from ...data.shards import holds_tokens, stored_tokenizer, token_shards
from ...data.tokenizers import TRAINED, Tokenizer, load_tokenizer, make_tokenizer
from ..checkpoint import (
    CheckpointWriter,
    load_model,
    load_optimizers,
)
from ..config import RunConfig, TrainConfig
from ..device import keep_freed_memory, pick_device, pick_dtype
from ..evaluate import best_possible, validation_batches
from ..lock import lock_run
from ..metrics import MetricsLog
from ..model import GPT
from ..optim import build_optimizers
from ..run import create_run, fitting_checkpoint
from ..settings import write_config
from .display import Display
from .interruption import Signals, until
from .memory import explained, largest_micro_batch, require_room
from .precompile import precompile
from .session import Session
from .step import TrainStep
from .throughput import Speedometer
from .trace import Trace
from .trackers import open_trackers, require_trackers
from .verify import verify


def prepare(
    config: RunConfig,
    out: Path,
    resume: bool,
    origins: Mapping[str, str],
    signals: Signals,
    held: ExitStack,
) -> Session:
    """Text to tokens, tokens to batches; model, optimizers and log, new or from the newest checkpoint. `held` gets the
    lock of the run's folder."""
    require_trackers(config.train)
    if resume:
        held.enter_context(lock_run(out))
    display = Display()
    device = pick_device(config.train.device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer = load_tokenizer(out / "tokenizer.json") if resume else build_tokenizer(config.train)
    checkpoint, state = fitting_checkpoint(out, config, tokenizer) if resume else (None, None)
    start = state.step if state else 0
    require_prompt(tokenizer, config)
    given, config = config.flat(), settle(config, tokenizer, device)
    require_room(config, device, f"{out}: " if resume else "")
    compiling = precompile(config, device)
    shards = token_shards(config.train.data, tokenizer, config.train.val_fraction, progress=True)
    loader = TokenLoader(
        shards.train,
        config.model.context_length,
        config.train.sequences,
        config.train.seed,
        device=device,
        document_start=tokenizer.end_of_text if config.train.align_documents else None,
        validation=shards.val,
    )
    if state and state.loader:
        loader.load_state_dict(state.loader, origin=out)
    if config.train.epochs:
        steps = math.ceil(config.train.epochs * loader.n_windows / config.train.batch_size)
        config = replace(config, train=replace(config.train, steps=steps))
    validation = validation_batches(shards, config.train, config.model.context_length, device)
    if start > config.train.steps:
        raise ValueError(f"{out} has done {start:,} steps; go on with --steps and a larger number")
    torch.manual_seed(config.train.seed)
    with explained(config.model, config.train, device):
        with torch.device(device):
            model = GPT(config.model)
        optimizers = build_optimizers(model, config.train)
        if checkpoint:
            load_model(model, checkpoint)
            load_optimizers(model, optimizers, checkpoint)
        step = TrainStep(model, optimizers, until(signals, loader), config.train, step=start)
    if state and state.scaler:
        step.load_state(state.scaler)

    sources = {
        "vocab_size": "the tokenizer",
        "dtype": "the device",
        "micro_batch": "the device",
        "steps": "epochs",
    }
    settled = {key: where for key, where in sources.items() if given[key] != config.flat()[key]}
    if not resume:
        create_run(out, config, tokenizer, {**origins, **settled})
        held.enter_context(lock_run(out))
    sizes: Mapping[str, int] = state.files if state else {}
    samples = AppendedFile(out / "samples.txt")
    log = MetricsLog(out / "metrics.jsonl", sizes.get("metrics.jsonl", 0))
    samples.cut(sizes.get("samples.txt", 0))
    keep, every = config.train.keep_checkpoints, config.train.keep_every
    writer = CheckpointWriter(out, keep, every, config.train.async_save, saved=start if state else None)
    step.before_update = writer.wait_for_copy
    if resume:  # once nothing that is there has been refused
        write_config(out / "config.toml", config, {**origins, **settled})
    losses: list[torch.Tensor] = []
    norm = math.nan if state is None or state.grad_norm is None else state.grad_norm
    if state:
        losses = [torch.tensor(loss, device=device) for loss in state.losses]
        step.skips.copy_(torch.tensor([state.skipped, state.in_row]))
    session = Session(
        out=out,
        config=config,
        shards=shards,
        model=model,
        optimizers=optimizers,
        loader=loader,
        validation=validation,
        step=step,
        log=log,
        samples=samples,
        trackers=open_trackers(config, out),
        writer=writer,
        speed=Speedometer(config.model, model.num_params(position_embeddings=False), device, start),
        trace=Trace(out, device, config.train.steps - start) if config.train.profile else None,
        display=display,
        signals=signals,
        floor=best_possible(shards.corpus, tokenizer, config.train.eval_windows),
        losses=losses,
        norm=torch.tensor(norm, device=device),
        ends={config.train.steps, *([state.config.get("steps")] if state and start else [])},
    )
    compiling.join()
    verify(config, device)
    display.start(config, model, loader, shards, device, start)
    return session


def settle(config: RunConfig, tokenizer: Tokenizer, device: torch.device) -> RunConfig:
    """The configuration with what only tokenizer and device can tell: the vocabulary's size, dtype and micro-batch."""
    dtype: Any = str(pick_dtype(config.train.dtype, device)).removeprefix("torch.")
    model = replace(config.model, vocab_size=tokenizer.vocab_size)
    config = RunConfig(model, replace(config.train, dtype=dtype))
    verify(config, device, known=True)  # what failed in an earlier run is not even compiled
    if config.train.micro_batch == "auto":
        one = replace(config.train, micro_batch=1)  # the steps that the search tries find their kernels
        precompile(RunConfig(model, one), device).join()
        verify(config, device)
        largest = largest_micro_batch(config, device)
        config = replace(config, train=replace(config.train, micro_batch=largest))
    return config


def require_prompt(tokenizer: Tokenizer, config: RunConfig) -> None:
    """Raise ValueError where the samples' prompt cannot be encoded or does not fit the context."""
    tokens, context = (
        len(tokenizer.encode(config.train.prompt, allowed_special="all")),
        config.model.context_length,
    )
    if tokens > context:
        raise ValueError(
            f"the samples' prompt has {tokens} tokens and the context only {context}; shorten --prompt"
        )


def build_tokenizer(settings: TrainConfig) -> Tokenizer:
    """The tokenizer that the settings name, or the one that the data's tokens were made with, or one made from its text."""
    name = settings.tokenizer
    # opened before a vocabulary is looked for: a mistake in the data is the first thing to mend
    corpus = None if holds_tokens(settings.data) else open_corpus(settings.data, settings.val_fraction)
    named = split_name(settings.data)[0] is not None
    if (name in TRAINED or (name == "gpt2" and named)) and (stored := stored_tokenizer(settings.data)):
        return stored
    if corpus is None or name not in TRAINED:
        return make_tokenizer(name)
    if name == "char":  # it has no unknown character: those of the validation part count too
        return make_tokenizer(name, chain(corpus.train_texts(), corpus.val_texts()))
    return make_tokenizer(name, corpus.train_texts(), settings.bpe_vocab_size if name == "bpe" else None)
