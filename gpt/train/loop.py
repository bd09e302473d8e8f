"""Training from text to a run folder: prepare, then step, evaluate, log and save until done or interrupted."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ...data.corpus import open_corpus, split_name
from ...data.loader import TokenLoader
from ...data.shards import TokenShards, holds_tokens, stored_tokenizer, token_shards
from ...data.tokenizers import TRAINED, Tokenizer, load_tokenizer, make_tokenizer
from ...data.untrusted import InputError
from ...data.windows import Batch
from ...kernels import use_backend
from ..checkpoint import (
    CheckpointWriter,
    State,
    differences,
    load_model,
    load_optimizers,
    load_state,
    valid_checkpoint,
    versions,
    warn_of_skipped,
)
from ..config import RunConfig, TrainConfig, full_length
from ..device import keep_freed_memory, pick_device, pick_dtype, settled_heap
from ..evaluate import (
    CorpusReport,
    best_possible,
    bits_per_byte,
    evaluate_corpus,
    mean_loss,
    validation_batches,
)
from ..generate import generate_text
from ..lock import lock_run
from ..metrics import MetricsLog, overfitting
from ..model import GPT
from ..optim import Optimizers, build_optimizers, lr_factor
from ..pictures import plot_runs
from ..run import create_run, require_fit
from ..settings import write_config
from .compilation import compile_step
from .display import Display, program
from .interruption import Interrupted, TrainingError, check, collected, until
from .memory import explained, largest_micro_batch
from .precompile import precompile
from .step import TrainStep
from .throughput import Speedometer, peak_memory
from .trace import Trace
from .trackers import open_trackers, require_trackers
from .verify import verify

SLOW_STEP = 30.0  # seconds; longer ones are announced


@dataclass
class Session:
    """Everything that a run needs in memory."""

    out: Path
    config: RunConfig
    shards: TokenShards
    model: GPT
    optimizers: Optimizers
    loader: TokenLoader
    validation: list[Batch]
    step: TrainStep
    log: MetricsLog
    display: Display
    floor: float | None  # the best possible loss in nats a token, where it is known
    signals: list[int]  # Ctrl-C and SIGTERM received
    writer: CheckpointWriter


def train(
    config: RunConfig, out: Path, resume: bool = False, origins: Mapping[str, str] | None = None
) -> None:
    """Train a model and leave a run folder.

    Args:
        config: of the run; the vocabulary's size is replaced by the tokenizer's.
        out: the run folder; new, or with `resume` one to continue.
        resume: continue the run in `out` from its newest checkpoint.
        origins: where each setting came from, to be saved with the run.

    Raises:
        ValueError, OSError: the settings do not fit together, the data cannot be read, the folder is in use.
        TrainingError: the loss is no longer finite, a GPU's memory does not suffice, a kernel or a graph is wrong where
            `verify` is "strict", or the model fell short of `min_accepted`.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the micro-step in flight and a checkpoint of the last finished step.
    """
    with use_backend(config.train.backend), ExitStack() as held:
        session = prepare(config, out, resume, origins or {}, held)
        limits = explained(session.config.model, session.config.train, session.step.device)
        with (
            collected(session.signals),
            session.display,
            closing(session.log),
            closing(session.writer),
            limits,
            settled_heap(),
        ):
            run_steps(session)
        if session.signals:
            session.display.say(
                f"stopped after step {session.step.step:,}; go on with: {program()} train --resume {out}"
            )
            raise KeyboardInterrupt
        finish(session)


def prepare(
    config: RunConfig, out: Path, resume: bool, origins: Mapping[str, str], held: ExitStack
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
    if resume:
        require_fit(tokenizer, config.model, out)
    require_prompt(tokenizer, config)
    given, config = config.flat(), settle(config, tokenizer, device)
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
    if config.train.epochs:
        steps = math.ceil(config.train.epochs * loader.n_windows / config.train.batch_size)
        config = replace(config, train=replace(config.train, steps=steps))
    validation = validation_batches(shards, config.train, config.model.context_length, device)

    torch.manual_seed(config.train.seed)
    with explained(config.model, config.train, device):
        with torch.device(device):
            model = GPT(config.model)
        optimizers = build_optimizers(model, config.train)
    checkpoint, skipped = valid_checkpoint(out) if resume else (None, [])
    warn_of_skipped(skipped)
    state = load_state(checkpoint) if checkpoint else None
    start = state.step if state else 0
    if start >= config.train.steps:
        raise ValueError(f"{out} has done its {start:,} steps; go on with --steps and a larger number")
    if state and (wrong := differences(state, config, tokenizer.fingerprint(), loader.state_dict())):
        raise InputError(
            out, f"cannot go on: {', '.join(wrong)}", "resume with the same data, seed, model and tokenizer"
        )
    with explained(config.model, config.train, device):
        if checkpoint:
            load_model(model, checkpoint)
            load_optimizers(model, optimizers, checkpoint)
        signals: list[int] = []
        step = TrainStep(model, optimizers, until(signals, loader), config.train, step=start)
    if state and state.loader:
        loader.load_state_dict(state.loader, origin=out)
    if state and state.scaler:
        step.load_state(state.scaler)

    found = {
        "vocab_size": "the tokenizer",
        "dtype": "the device",
        "micro_batch": "the device",
        "steps": "epochs",
    }
    settled = {key: where for key, where in found.items() if given[key] != config.flat()[key]}
    if resume:
        write_config(out / "config.toml", config, {**origins, **settled})
    else:
        create_run(out, config, tokenizer, {**origins, **settled})
        held.enter_context(lock_run(out))
    keep, every = config.train.keep_checkpoints, config.train.keep_every
    writer = CheckpointWriter(out, keep, every, config.train.async_save, saved=start if state else None)
    step.before_update = writer.wait_for_copy
    log = MetricsLog(out / "metrics.jsonl", start, open_trackers(config, out))
    floor = best_possible(shards.corpus, tokenizer, config.train.eval_windows)
    compiling.join()
    verify(config, device)
    display.start(config, model, loader, shards, device, start)
    return Session(
        out, config, shards, model, optimizers, loader, validation, step, log, display, floor, signals, writer
    )


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


def run_steps(session: Session) -> None:
    """Step until the last one is done or a signal has come; leave a checkpoint of the last finished step."""
    settings, step = session.config.train, session.step
    warn_of_slow_steps(session)
    compile_step(step, session.config.model, session.display.say)
    speed = Speedometer(
        session.config.model, session.model.num_params(position_embeddings=False), step.device
    )
    losses: list[torch.Tensor] = []  # of the steps since the last line of the log
    trace = Trace(session.out, step.device, settings.steps - step.step) if settings.profile else None
    position = session.loader.position
    try:
        if step.step == 0:
            evaluate(session, train_loss=None)
            speed.start()
        while step.step < settings.steps:
            loss, norm = step()
            position = session.loader.position
            losses.append(loss)
            last = step.step == settings.steps
            if step.step % settings.log_interval == 0 or last:
                logged = log(session, speed, losses, norm)
                losses.clear()
            else:
                session.display.advance(step.step)
            pause = time.perf_counter()
            if trace:
                trace.step()
            if step.step % settings.eval_interval == 0 or last:
                evaluate(session, finite_mean(losses, session) if losses else logged)
            if settings.sample_interval and step.step % settings.sample_interval == 0:
                sample(session)
            if step.step % settings.save_interval == 0 or last:
                save(session)
            speed.pause(time.perf_counter() - pause)
    except Interrupted:
        session.loader.seek(position)
        if losses:
            log(session, speed, losses, norm)
        if step.step:
            save(session)
            plot_runs([session.out])
    if trace:
        session.display.say(trace.summary())


def warn_of_slow_steps(session: Session) -> None:
    """Measure one sequence on a CPU, and say what a whole step takes where that is long."""
    settings, step, context = session.config.train, session.step, session.config.model.context_length
    if step.device.type != "cpu":
        return
    ids, seconds = torch.zeros(1, context, dtype=torch.int64), math.inf
    for _ in range(2):  # the first allocates and starts threads
        start = time.perf_counter()
        step.micro_step(ids, ids)
        step.abandon(1)
        seconds = min(seconds, settings.batch_size * (time.perf_counter() - start))
    if seconds > SLOW_STEP:
        hours = seconds * (settings.steps - step.step) / 3600
        session.display.say(
            f"a step of {settings.batch_size} x {context:,} tokens will take about {seconds:,.0f} s here, the whole run "
            f"{hours:,.0f} h: lower --batch-size, --context-length or the model's size, or take --preset small"
        )


def log(session: Session, speed: Speedometer, losses: list[torch.Tensor], norm: torch.Tensor) -> float:
    """Write a line about the steps with these losses into the log; returns their mean."""
    settings, step = session.config.train, session.step
    tokens_a_step = settings.batch_size * session.config.model.context_length
    record: dict[str, Any] = {"step": step.step, "loss": finite_mean(losses, session)}
    record |= {"lr": settings.lr * lr_factor(step.step - 1, settings), "grad_norm": norm.item()}
    record |= speed.read(len(losses), tokens_a_step) | {"memory": peak_memory(step.device)}
    record |= {"tokens": step.step * tokens_a_step, "epoch": round(session.loader.epoch, 4)}
    record |= skipped_steps(session, len(losses))
    session.log.write(record)
    session.display.progress(record, settings.steps)
    return record["loss"]


def evaluate(session: Session, train_loss: float | None) -> None:
    """Loss on the validation part, with a word where the model starts to overfit, and a sample of text."""
    step = session.step
    loss = mean_loss(session.model, until(session.signals, session.validation), step.dtype)
    record: dict[str, Any] = {
        "step": step.step,
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
    }
    if train_loss is None:
        session.log.write(record)
        session.display.evaluation(record)
        return
    record["train_loss"] = train_loss
    if session.floor is not None:
        record["best_possible"] = session.floor
    session.log.write(record)
    session.display.evaluation(record)
    if (warning := overfitting(session.log.history)) and not overfitting(session.log.history[:-1]):
        session.display.say(warning)
    if not session.config.train.sample_interval:
        sample(session)
    plot_runs([session.out])


def sample(session: Session) -> str:
    """Let the model continue the prompt; into the log and samples.txt."""
    settings, step = session.config.train, session.step
    if not settings.sample_tokens:
        return ""
    (text,) = generate_text(
        session.model,
        session.shards.tokenizer,
        [settings.prompt],
        max_tokens=settings.sample_tokens,
        seed=settings.seed,
        dtype=step.dtype,
        on_text=lambda *_: check(session.signals),
    )
    text = settings.prompt + text
    with (session.out / "samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"--- step {step.step}\n{text}\n\n")
    session.display.sample(text)
    return text


def save(session: Session) -> None:
    """Write a checkpoint from which the run goes on exactly as if it had not stopped."""
    state = State(
        session.step.step,
        session.loader.state_dict(),
        session.step.state() or None,
        losses=[],
        skipped=0,
        in_row=0,
        files={},
        config=session.config.flat(),
        versions=versions(),
        tokenizer=session.shards.tokenizer.fingerprint(),
    )
    session.writer.save(session.model, session.optimizers, state, session.log.history)


def finite_mean(losses: list[torch.Tensor], session: Session) -> float:
    """The mean of those losses that are numbers; a step that had none changed nothing.

    Raises:
        TrainingError: none of them is one.
    """
    values = [loss for loss in torch.stack(losses).tolist() if math.isfinite(loss)]
    if values:
        return math.fsum(values) / len(values)
    saved = session.writer.saved
    back = f"the checkpoint of step {saved:,} is the last good one" if saved else "there is no checkpoint yet"
    raise TrainingError(
        f"the loss became {losses[-1].item()} before step {session.step.step}: {back}. A lower --lr (and --muon-lr), more "
        "--warmup-steps or a smaller --grad-clip help; in float16 so does --dtype bfloat16"
    )


def skipped_steps(session: Session, steps: int) -> dict[str, int]:
    """Say how many of the last steps were skipped, and return it for the log where there are any."""
    count = int(session.step.skipped.item())
    if not count:
        return {}
    session.step.skipped.zero_()
    why = (
        "; in float16 the first few are usual, while the loss scale finds its height"
        if session.config.train.dtype == "float16"
        else ""
    )
    session.display.say(
        f"{count} of the last {steps} steps skipped: their gradients were not finite, and neither weights nor "
        f"optimizer were touched{why}"
    )
    return {"skipped": count}


def finish(session: Session) -> None:
    """Draw the curve, say how good the model is and what can be done with it.

    Raises:
        TrainingError: a run of full length fell short of `min_accepted`.
    """
    settings = session.config.train
    report: CorpusReport | None = None
    corpus = session.shards.corpus
    if corpus is not None and corpus.log_prob is not None:
        report = evaluate_corpus(session.model, session.shards.tokenizer, corpus, session.step.dtype)
    bytes_per_token = session.shards.val_bytes_per_token
    loss = next(record["val_loss"] for record in reversed(session.log.history) if "val_loss" in record)
    bits = bits_per_byte(loss, bytes_per_token) if bytes_per_token else None
    session.display.end(session.out, settings.steps, plot_runs([session.out]), report, loss, bits)
    if report is None or not settings.min_accepted:
        return
    if settings.steps < (full := full_length(settings)):
        session.display.say(
            f"\n--min-accepted {settings.min_accepted:g} was not applied: "
            f"this run was shortened to {settings.steps:,} of the preset's {full:,} steps"
        )
    elif report.accepted < settings.min_accepted:
        raise TrainingError(
            f"only {report.accepted:.0%} of the generated tales are accepted by the grammar, below the "
            f"{settings.min_accepted:.0%} of --min-accepted; train for more --steps"
        )
