"""`gpt inspect`: what a run or a checkpoint holds, every file of it verified."""

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from ..data.tokenizers import load_tokenizer
from ..data.untrusted import InputError, printable
from .checkpoint import (
    MODEL,
    STATE,
    State,
    best_checkpoint,
    checkpoints,
    differences,
    load_state,
    read_manifest,
    step_of,
    validation_losses,
    verify,
)
from .config import RunConfig
from .metrics import read_metrics
from .run import located, require_fit
from .settings import read_run
from .tensors import describe_tensors

ROW = "{:<16}{:>12}{:>10}{:>12}   {}"


class Report:
    """Lines of name and value, printed as they are found; `whole` turns false with the first that cannot be had."""

    def __init__(self) -> None:
        self.whole = True

    def line(self, name: str, value: Callable[[], str]) -> None:
        print(f"{name:<22}{printable(self.tried(value))}", flush=True)

    def tried(self, value: Callable[[], str]) -> str:
        """The value, or what is wrong with it."""
        try:
            return value()
        except (ValueError, OSError) as error:
            self.whole = False
            if isinstance(error, InputError):
                return f"DAMAGED: {Path(error.path).name}: {error.what}"
            return f"DAMAGED: {error}"


def inspect(path: Path) -> bool:
    """Print what the run or checkpoint at `path` holds; returns whether all of it is whole.

    Raises:
        FileNotFoundError: there is neither.
    """
    run, checkpoint = located(path)
    if not (run / "config.toml").exists():
        read_run(run)  # raises, with the runs that there are
    report = Report()
    report.line("run", lambda: str(run))
    report.line("model", lambda: _model(run))
    report.line("training", lambda: _training(run))
    report.line("tokenizer", lambda: _tokenizer(run))
    if checkpoint is None:
        _run(report, run)
    else:
        _checkpoint(report, run, checkpoint)
    return report.whole


def _config(run: Path) -> RunConfig:
    return RunConfig.from_flat(read_run(run))


def _model(run: Path) -> str:
    model = _config(run).model
    return (
        f"{model.n_layer} layers of width {model.n_embd}, {model.n_head} heads, context {model.context_length:,}, "
        f"vocabulary {model.vocab_size:,}"
    )


def _training(run: Path) -> str:
    train = _config(run).train
    return f"{train.steps:,} steps of {train.batch_size:,} sequences, {train.optimizer}, {train.dtype}, data {train.data}"


def _tokenizer(run: Path) -> str:
    tokenizer = load_tokenizer(run / "tokenizer.json")
    require_fit(tokenizer, _config(run).model, run)
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"


# ---- a run


def _run(report: Report, run: Path) -> None:
    """The log, and a row for each checkpoint."""
    history: list[dict[str, Any]] = []

    def log() -> str:
        history.extend(read_metrics(run / "metrics.jsonl"))
        return f"{len(history):,} records" + (
            f", the last of step {history[-1]['step']:,}" if history else ""
        )

    report.line("log", log)
    if left := [*(run / "checkpoints").glob(".step-*"), *run.glob(".*.tmp")]:
        report.line("leftovers", lambda: f"{len(left)} of killed processes; gpt train --resume removes them")
    training = {record["step"]: record["loss"] for record in history if isinstance(record.get("loss"), float)}
    validation, saved = validation_losses(history), checkpoints(run)
    best = best_checkpoint(saved, validation)
    print("\n" + ROW.format("checkpoint", "bytes", "loss", "validation", ""))
    for checkpoint in saved:
        step = step_of(checkpoint)
        if not checkpoint.exists():  # removed by a training that goes on
            continue
        verdict = report.tried(lambda: _verdict(run, checkpoint))  # noqa: B023 (called at once)
        size = sum(file.stat().st_size for file in checkpoint.glob("*"))
        losses = (f"{found[step]:.4f}" if step in found else "" for found in (training, validation))
        note = "best, " if checkpoint == best else ""
        print(ROW.format(checkpoint.name, f"{size:,}", *losses, printable(note + verdict)), flush=True)
    if not saved:
        print("none; gpt train --resume starts the run again")


def _verdict(run: Path, checkpoint: Path) -> str:
    """ "ok" for a whole checkpoint that fits the run.

    Raises:
        InputError: it is not.
    """
    verify(checkpoint)
    state, tokenizer = load_state(checkpoint), load_tokenizer(run / "tokenizer.json")
    if found := differences(state, _config(run), tokenizer.fingerprint()):
        raise InputError(run, f"it does not fit: {', '.join(found)}", "")
    for name, size in state.files.items():
        if (has := (run / name).stat().st_size) < size:
            raise InputError(run / name, f"it has {has:,} bytes of the {size:,} at this step", "")
    return "ok"


# ---- a checkpoint


def _checkpoint(report: Report, run: Path, checkpoint: Path) -> None:
    """A line for each file, and what the state says."""
    names: list[str] = []

    def manifest() -> str:
        names.extend(read_manifest(checkpoint).files)
        return f"step {step_of(checkpoint):,}"

    report.line("manifest.json", manifest)
    for name in names:
        report.line(name, lambda: _file(checkpoint, name))  # noqa: B023 (called at once)
    report.line("fits the run", lambda: _verdict(run, checkpoint))
    if report.whole:
        for name, value in _state(load_state(checkpoint)):
            report.line(name, lambda: value)  # noqa: B023


def _file(checkpoint: Path, name: str) -> str:
    verify(checkpoint, (name,))
    entry = read_manifest(checkpoint).files[name]
    text = f"{entry.size:,} bytes, sha256 {entry.sha256[:12]} ok"
    if name == STATE:
        return text
    tensors = describe_tensors(checkpoint / name, "")
    numbers = sum(prod(shape) for shape, _ in tensors.values())
    return f"{text}, {len(tensors):,} tensors of {numbers:,} {'parameters' if name == MODEL else 'numbers'}"


def _state(state: State) -> Iterator[tuple[str, str]]:
    yield "position in the data", f"{state.loader.get('position', 0):,} windows"
    yield "sha256 of the data", str(state.loader.get("data", "none"))
    yield "loss scale", f"{state.scaler.get('scale')}" if state.scaler else "none"
    yield "steps to be logged", f"{len(state.losses):,}, of which {state.skipped:,} were skipped"
    yield "written by", ", ".join(f"{name} {version}" for name, version in state.versions.items())
