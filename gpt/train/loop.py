"""Training from text to a run folder: step, log, save, evaluate and sample until done or interrupted.

The order within a step makes a resumed run's files those of one that was never stopped: a checkpoint is of the moment after
its step's line of the log, and resuming removes what was written after it and makes it again.
"""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch

from ...kernels import use_backend
from ..config import RunConfig, full_length
from ..device import settled_heap
from ..evaluate import CorpusReport, bits_per_byte, evaluate_corpus, mean_loss
from ..generate import generate_text
from ..metrics import is_spike, overfitting
from ..optim import lr_factor
from ..pictures import plot_runs
from .compilation import compile_step
from .display import program
from .divergence import diverged, highest_sane
from .interruption import Interrupted, Signals, TrainingError
from .memory import explained
from .preparation import prepare
from .saving import rescue, save, skipped_steps, stop, written
from .session import Session, finite_mean
from .throughput import peak_memory

SLOW_STEP = 30.0  # seconds; longer ones are announced


def train(
    config: RunConfig, out: Path, resume: bool = False, origins: Mapping[str, str] | None = None
) -> None:
    """Train a model and leave a run folder.

    Args:
        config: of the run; the vocabulary's size is replaced by the tokenizer's.
        out: the run folder; new, or with `resume` one to continue. Of a run that has done its steps, evaluation, sample
            and report are made again.
        resume: continue the run in `out` from its newest checkpoint.
        origins: where each setting came from, to be saved with the run.

    Raises:
        ValueError, OSError: the settings do not fit together, the data cannot be read, the folder is in use.
        TrainingError: the run has diverged, or too many steps in a row were skipped; memory or disk do not suffice; a
            kernel or a graph is wrong where `verify` is "strict"; or the model fell short of `min_accepted`.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP, after a checkpoint of the last finished step. It is a KeyboardInterrupt.
    """
    with use_backend(config.train.backend), Signals() as signals, ExitStack() as held:
        with signals.at_once():
            session = prepare(config, out, resume, origins or {}, signals, held)
        if session.last:
            session.display.say(
                f"{out} has done its {session.step.step:,} steps; go on with --steps and a larger number"
            )
        try:
            with explained(session.config.model, session.config.train, session.step.device):
                with session.display, closing(session.writer), settled_heap():
                    run_steps(session)
                finish(session)
        except Interrupted:
            session.display.say(f"{stopped_at(session)}; go on with: {program()} train --resume {out}")
            raise


def run_steps(session: Session) -> None:
    """Step until the last one is done; whatever ends it earlier, leave a checkpoint of the last finished step."""
    try:
        with session.signals.at_once():
            warn_of_slow_steps(session)
            compile_step(session.step, session.config.model, session.display.say)
        session.speed.start()
        while True:
            if session.losses and session.due(session.config.train.log_interval):
                log(session)
            session.settle()
            pause = time.perf_counter()
            if session.step.step > session.tried and session.due(session.config.train.save_interval):
                save(session)
            session.signals.check()
            follow_up(session)
            session.speed.pause(time.perf_counter() - pause)
            if session.last:
                break
            take_step(session)
        with written(session):
            session.writer.wait()
    except BaseException as error:
        rescue(session, error)
        raise
    finally:
        for tracker in session.trackers:
            with session.optional("a tracker"):
                tracker.close()
        if session.trace:
            session.display.say(session.trace.summary())


def warn_of_slow_steps(session: Session) -> None:
    """Measure one sequence on a CPU, and say what a whole step takes where that is long."""
    settings, step, context = session.config.train, session.step, session.config.model.context_length
    if step.device.type != "cpu":
        return
    ids, seconds = torch.zeros(1, context, dtype=torch.int64), math.inf
    for _ in range(2):  # the first allocates and starts threads
        start = time.perf_counter()
        step.micro_step(ids, ids)
        step.abandon()
        seconds = min(seconds, settings.batch_size * (time.perf_counter() - start))
    if seconds > SLOW_STEP:
        hours = seconds * (settings.steps - step.step) / 3600
        session.display.say(
            f"a step of {settings.batch_size} x {context:,} tokens will take about {seconds:,.0f} s here, the whole run "
            f"{hours:,.0f} h: lower --batch-size, --context-length or the model's size, or take --preset small"
        )


def take_step(session: Session) -> None:
    """One step of training; within forward and backward a signal ends it, and nothing has changed."""
    step = session.step
    # on a GPU between two micro-steps alone, by `until`: an exception within a capture would look like a failed one
    with session.signals.at_once() if step.device.type == "cpu" else nullcontext():
        step.accumulate()
    loss, session.norm = step.apply()
    session.losses.append(loss)
    session.settle()
    session.display.advance(step.step)
    if session.trace:
        with session.optional("the trace"):
            session.trace.step()


def log(session: Session) -> None:
    """Write a line of the log about the steps since the last one.

    Raises:
        TrainingError: the loss stays far above guessing, too many steps in a row were skipped, or the line cannot be written.
    """
    settings, step, history = session.config.train, session.step, session.log.history
    # one transfer, which waits for the device
    numbers = torch.stack([*session.losses, session.norm, *step.skips]).tolist()
    *losses, norm, skipped, in_row = numbers
    tokens_a_step = settings.batch_size * session.config.model.context_length
    record: dict[str, Any] = {"step": step.step}
    if (mean := finite_mean(losses)) is not None:
        record |= {"loss": mean, "highest_loss": max(filter(math.isfinite, losses))}
        if is_spike(history, record["highest_loss"]):
            record["spike"] = True
    record["lr"] = settings.lr * lr_factor(step.step - 1, settings)
    if math.isfinite(norm):
        record["grad_norm"] = norm
    record |= session.speed.read(step.step, tokens_a_step) | {"memory": peak_memory(step.device)}
    record |= {"tokens": step.step * tokens_a_step, "epoch": round(session.loader.epoch, 4)}
    if skipped:
        record["skipped"] = int(skipped)
    keep(session, record)
    step.skipped.zero_()
    session.losses.clear()
    session.display.progress(record, settings.steps)
    if skipped:
        session.display.say(skipped_message(int(skipped), len(losses), settings.dtype))
    if in_row >= settings.max_skipped:
        stop(session, skipped_steps(int(in_row)))
    if diverged(history, limit := highest_sane(session.config)):
        stop(session, f"the loss has stayed far above that of guessing, {limit / 2:.4g} nats a token")


def keep(session: Session, record: dict[str, Any]) -> None:
    """Write a record into the log and to the trackers."""
    with written(session):
        session.log.write(record)
    for tracker in session.trackers:
        with session.optional("a tracker"):
            tracker.write(record)


def skipped_message(skipped: int, steps: int, dtype: str) -> str:
    why = "; in float16 the first few are usual, while the loss scale finds its height"
    return (
        f"{skipped} of the last {steps} steps skipped: their losses or gradients were not finite, and neither weights nor "
        f"optimizer were touched{why if dtype == 'float16' else ''}"
    )


def follow_up(session: Session) -> None:
    """Evaluate and sample where it is time; before the first step only evaluate."""
    settings, first = session.config.train, session.step.step == 0
    if session.due(settings.eval_interval):
        evaluate(session)
        if not first and not settings.sample_interval:
            sample(session)
        if not first:
            with session.signals.at_once(), session.optional("the picture of the loss"):
                plot_runs([session.out])
    if settings.sample_interval and session.step.step % settings.sample_interval == 0 and not first:
        sample(session)


def evaluate(session: Session) -> None:
    """Loss on the validation part, with a word where the model starts to overfit."""
    history = session.log.history
    with session.signals.at_once():
        loss = mean_loss(session.model, session.validation, session.step.dtype)
    record: dict[str, Any] = {"step": session.step.step}
    if math.isfinite(loss):
        record |= {"val_loss": loss, "val_perplexity": math.exp(min(loss, 690.0))}
    if (train_loss := session.recent_loss()) is not None:
        record["train_loss"] = train_loss
        if session.floor is not None:
            record["best_possible"] = session.floor
    before = overfitting(history)
    keep(session, record)
    session.display.evaluation(record)
    if (warning := overfitting(history)) and not before:
        session.display.say(warning)


def sample(session: Session) -> None:
    """Let the model continue the prompt, into samples.txt."""
    settings, step = session.config.train, session.step
    if not settings.sample_tokens:
        return
    text = None
    with session.optional("the sample of text"), session.signals.at_once():
        (text,) = generate_text(
            session.model,
            session.shards.tokenizer,
            [settings.prompt],
            max_tokens=settings.sample_tokens,
            seed=settings.seed,
            dtype=step.dtype,
        )
    if text is not None:
        text = settings.prompt + text
        with written(session):
            session.samples.append(f"--- step {step.step}\n{text}\n\n")
        session.display.sample(text)


def finish(session: Session) -> None:
    """Draw the curve, say how good the model is and what can be done with it.

    Raises:
        TrainingError: a run of full length fell short of `min_accepted`.
    """
    settings = session.config.train
    report: CorpusReport | None = None
    corpus = session.shards.corpus
    if corpus is not None and corpus.log_prob is not None:
        with session.signals.at_once():
            report = evaluate_corpus(session.model, session.shards.tokenizer, corpus, session.step.dtype)
    bytes_per_token = session.shards.val_bytes_per_token
    loss = next(
        (record["val_loss"] for record in reversed(session.log.history) if "val_loss" in record), None
    )
    bits = bits_per_byte(loss, bytes_per_token) if bytes_per_token and loss is not None else None
    session.display.end(session.out, settings.steps, report, loss, bits)
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


def stopped_at(session: Session) -> str:
    """Where a signal has ended the run, and what it goes on from."""
    step, saved = session.step.step, session.writer.saved
    if step == 0:
        return "stopped before the first step"
    kept = (
        ""
        if saved == step
        else f", with {f'the checkpoint of step {saved:,}' if saved else 'no checkpoint yet'}"
    )
    return f"stopped after step {step:,}{kept}"
