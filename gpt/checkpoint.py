"""Checkpoints: written whole or not at all, verified before they are used, and kept or removed by rules.

    checkpoints/step-000500/  model.safetensors  optimizer.safetensors  state.json  manifest.json

The manifest has size and sha256 of the other files. Weights are stored at the vocabulary's true size under the model's own
names, the optimizers' state as "parameter|part". An imported model, at step 0, has no optimizer.safetensors.
"""

import hashlib
import math
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from .. import __version__
from ..data.files import new_folder, remove_folder, write_file
from ..data.untrusted import InputError, MissingFile, inside, parse_json, read_bytes, read_json
from .config import RunConfig, shown
from .model import GPT
from .optim import Optimizers
from .settings import FIXED
from .snapshot import Snapshot, model_tensors, not_finite, optimizer_parts, optimizer_tensors
from .tensors import read_tensors, write_tensors

FORMAT = 1
MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
REMEDY = "delete that checkpoint to use the one before"
_NAME = re.compile(r"step-(\d{6,18})")
_LEFTOVER = re.compile(
    r"\..+\.(?:\d+\.tmp|removed)"
)  # of processes that were killed, as data/files.py names them


Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class NotFinite(ValueError):
    """The weights are no longer finite: what they would be saved as is no way back."""


@dataclass
class State:
    """What resuming takes beside tensors; state.json."""

    step: Count
    loader: dict[str, Any]
    """`TokenLoader.state_dict`; empty for an imported model."""
    scaler: dict[str, float] | None
    """`TrainStep.state`: float16's loss scale."""
    losses: list[float]
    """Of the steps since the last line of the log."""
    skipped: Count
    """Steps skipped since the last line of the log."""
    in_row: Count
    """Steps skipped in a row at the end."""
    files: dict[str, Count]
    """Bytes of metrics.jsonl and samples.txt that belong to this step."""
    config: dict[str, Any]
    """The run's settings, `RunConfig.flat`."""
    versions: dict[str, str]
    tokenizer: str
    """Its fingerprint."""
    grad_norm: float | None = None
    """Of the last step, for a line of the log that could not be written."""


@dataclass
class _Saved(State):
    losses: list[float | None]  # type: ignore[assignment]  # JSON has no NaN: null


@dataclass
class Entry:
    size: int
    sha256: str


@dataclass
class Manifest:
    format: int
    step: int
    files: dict[str, Entry]


# ---- finding and verifying


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps, damaged ones too."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def valid_checkpoint(
    run: Path, names: Collection[str] = (MODEL, OPTIMIZER, STATE)
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose files verify, and the newer ones with what is wrong with each.

    Args:
        run: its folder.
        names: the files that will be used; reading all of a large model's takes seconds.

    Returns:
        None for the checkpoint where the run has none.

    Raises:
        InputError: it has some, but all of them are damaged.
    """
    skipped: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints(run)):
        try:
            verify(checkpoint, names)
            return checkpoint, skipped
        except InputError as error:
            skipped.append((checkpoint, f"{Path(error.path).name}: {error.what}"))
    if not skipped:
        return None, []
    newest, reason = skipped[0]
    which = f"all of its {len(skipped)} checkpoints are" if len(skipped) > 1 else "its only checkpoint is"
    raise InputError(
        run, f"{which} damaged ({newest.name}, {reason})", "put it back from a copy, or begin a new run"
    )


def warn_of_skipped(skipped: Iterable[tuple[Path, str]]) -> None:
    """Say on stderr which checkpoints were skipped, and why."""
    for checkpoint, reason in skipped:
        print(f"warning: {checkpoint.name} is skipped: {reason}", file=sys.stderr)


def verify(checkpoint: Path, names: Collection[str] = (MODEL, OPTIMIZER, STATE)) -> Manifest:
    """Compare the files of a checkpoint with its manifest, and its state with its name.

    Args:
        checkpoint: its folder.
        names: the files to compare.

    Raises:
        InputError: a file is missing or damaged, or from another checkpoint or a newer version of this program.
    """
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.files.items():
        if name not in names:
            continue
        file = inside(checkpoint, name, checkpoint / MANIFEST)
        if not file.is_file():
            raise MissingFile(file, "there is no such file", REMEDY)
        if (size := file.stat().st_size) != entry.size:
            raise InputError(file, f"it has {size:,} bytes instead of {entry.size:,}", REMEDY)
        if _entry(file) != entry:
            raise InputError(file, f"its content is not what {MANIFEST} has the sha256 of", REMEDY)
    if (state := load_state(checkpoint)).step != manifest.step:
        raise InputError(checkpoint / STATE, f"it is of step {state.step}", REMEDY)
    return manifest


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        InputError: it is missing, damaged, or of another checkpoint or format.
    """
    file = checkpoint / MANIFEST
    data = read_bytes(file, 1 << 16, REMEDY)
    number = parse_json(data, dict[str, Any], file, REMEDY).get("format")
    if number != FORMAT:
        raise InputError(
            file, f"it has format {number!r} instead of {FORMAT}", "use the version of fusedgpt that wrote it"
        )
    manifest = parse_json(data, Manifest, file, REMEDY)
    if not _NAME.fullmatch(checkpoint.name) or manifest.step != step_of(checkpoint):
        raise InputError(file, f"it is of step {manifest.step}", REMEDY)
    needed = {MODEL, STATE} | ({OPTIMIZER} if manifest.step else set())
    if wrong := needed - manifest.files.keys() or manifest.files.keys() - {MODEL, OPTIMIZER, STATE}:
        what = "lacks" if wrong <= needed else "names"
        raise InputError(file, f"it {what} {min(wrong)}", REMEDY)
    return manifest


def load_state(checkpoint: Path) -> State:
    """The state of a checkpoint that `verify` has found whole.

    Raises:
        InputError: it is damaged or incomplete.
    """
    saved = read_json(checkpoint / STATE, _Saved, REMEDY)
    losses = [math.nan if loss is None else loss for loss in saved.losses]
    state = State(**(vars(saved) | {"losses": losses}))
    if state.step and not state.loader:
        raise InputError(checkpoint / STATE, "it lacks the position in the data", REMEDY)
    if state.scaler and state.scaler.keys() != {"scale", "_growth_tracker"}:
        raise InputError(checkpoint / STATE, "its loss scale is incomplete", REMEDY)
    return state


def differences(state: State, config: RunConfig, tokenizer: str) -> list[str]:
    """What keeps a run from using a checkpoint, one phrase each. The loader compares the data: `TokenLoader.load_state_dict`.

    Args:
        state: of the checkpoint.
        config: of the run.
        tokenizer: the fingerprint of the run's tokenizer.
    """
    settings = config.flat()
    found = [
        f"{key} = {shown(settings[key])} instead of {shown(state.config.get(key))}"
        for key in (*FIXED, *(["optimizer"] if state.step else []))  # an imported model takes either
        if state.config.get(key) != settings[key]
    ]
    return found + (["another tokenizer.json"] if tokenizer != state.tokenizer else [])


# ---- into memory


@torch.no_grad()
def load_model(model: GPT, checkpoint: Path) -> None:
    """Copy the weights of a verified checkpoint into a model of the same shape.

    Raises:
        InputError: the file is damaged or belongs to another model, or its weights are not finite.
    """
    own = model_tensors(model)
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    tensors = read_tensors(checkpoint / MODEL, expected, REMEDY)
    if name := not_finite(tensors):
        raise InputError(checkpoint / MODEL, f"{name} is not finite", REMEDY)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def load_optimizers(model: GPT, optimizers: Optimizers, checkpoint: Path) -> None:
    """Restore the optimizers' state from a verified checkpoint; one without it (an imported model) leaves it unchanged.

    Raises:
        InputError: the file is damaged or belongs to another model or optimizer.
    """
    if OPTIMIZER not in read_manifest(checkpoint).files:
        return
    parts = optimizer_parts(model, optimizers)
    expected = {name: spec for name, (_, _, spec) in parts.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(checkpoint / OPTIMIZER, expected, REMEDY).items():
        p, part, _ = parts[name]
        # step counters too: fused AdamW needs them on the parameter's device
        state.setdefault(id(p), {})[part] = tensor.to(p.device)
    optimizers.load_state(state)


# ---- writing and removing


def fill(folder: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: State) -> None:
    """Write the files of a checkpoint into an empty folder; no tensors of an optimizer, no file of them.

    Raises:
        NotFinite: the weights are not.
        OSError: a file cannot be written.
    """
    if name := not_finite(model):
        raise NotFinite(
            f"{name} is no longer finite after step {state.step:,}: no checkpoint was written of it"
        )
    write_tensors(model, folder / MODEL)
    if optimizer:
        write_tensors(optimizer, folder / OPTIMIZER)
    write_file(folder / STATE, msgspec.json.format(msgspec.json.encode(state), indent=1))
    files = {file.name: _entry(file) for file in sorted(folder.iterdir())}
    write_file(
        folder / MANIFEST, msgspec.json.format(msgspec.json.encode(Manifest(FORMAT, state.step, files)))
    )


def _entry(file: Path) -> Entry:
    with file.open("rb") as opened:
        return Entry(file.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest())


def versions() -> dict[str, str]:
    """Of what computes a run."""
    found = {"fusedgpt": __version__, "python": python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a CPU needs no Triton
            continue
    return found


def removable(run: Path, step: int, keep: int, keep_every: int, losses: Mapping[int, float]) -> list[Path]:
    """The checkpoints up to a step that need not be kept: not among the newest, the best, or every so many-th.

    Those of later steps were skipped as damaged when the run was resumed; they give way when their step comes again.
    """
    saved = [path for path in checkpoints(run) if step_of(path) <= step]
    best = best_checkpoint(saved, losses)
    others = [path for path in saved[:-keep] if path != best]
    return [path for path in others if not keep_every or step_of(path) % keep_every]


def best_checkpoint(saved: Iterable[Path], losses: Mapping[int, float]) -> Path | None:
    """The one with the lowest validation loss; None where none has been evaluated."""
    evaluated = [path for path in saved if step_of(path) in losses]
    return min(evaluated, key=lambda path: losses[step_of(path)], default=None)


def validation_losses(history: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The finite validation losses among the records of a run's log, by step."""
    records = [record for record in history if isinstance(record.get("val_loss"), float)]
    return {record["step"]: record["val_loss"] for record in records if math.isfinite(record["val_loss"])}


class CheckpointWriter:
    """Writes a run's checkpoints and removes those that are no longer to be kept.

    There stay the newest, the one with the best validation loss, and every so many-th; the one just written always.
    Opening it removes what killed processes have left half written or half removed: hold the run's lock.

    Args:
        run: its folder.
        keep: the number of newest checkpoints to keep.
        keep_every: keep those of steps that this divides; 0: none.
        background: write while training goes on. The tensors are copied first, into host memory that stays allocated; a
            further `save` waits for the one before.
        saved: the step whose checkpoint the run goes on from; it is not written again.
    """

    def __init__(
        self, run: Path, keep: int, keep_every: int, background: bool, saved: int | None = None
    ) -> None:
        self.run, self.keep, self.keep_every, self.saved = run, keep, keep_every, saved
        self._snapshot = Snapshot() if background else None
        self._executor = ThreadPoolExecutor(1, "checkpoint-writer")
        self._pending: Future[None] | None = None
        for path in (*run.iterdir(), *(run / "checkpoints").glob("*")):
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def save(
        self, model: GPT, optimizers: Optimizers, state: State, history: Iterable[Mapping[str, Any]]
    ) -> None:
        """Write a checkpoint, unless that of this step is there already.

        Args:
            model, optimizers: their tensors may change as soon as this returns, except on a GPU: see `wait_for_copy`.
            state: of the same step.
            history: the records of the run's log, whose "val_loss" decides which checkpoint is the best.

        Raises:
            NotFinite: the weights are not.
            OSError: a file cannot be written. Either may be of the save before, where that was in the background.
        """
        try:
            self.wait()
        finally:  # this one is written even where that before could not be
            if state.step != self.saved:
                self._begin(
                    model_tensors(model),
                    optimizer_tensors(model, optimizers),
                    state,
                    validation_losses(history),
                )

    def _begin(
        self,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: State,
        losses: Mapping[int, float],
    ) -> None:
        if self._snapshot is None:
            self._write(model, optimizer, state, losses)
        else:
            model, optimizer = self._snapshot.take(model), self._snapshot.take(optimizer)
            self._pending = self._executor.submit(self._write, model, optimizer, state, losses)

    def wait(self) -> None:
        """Wait for the save in the background; raises what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the save in the background, and end the thread; raises what the save raised."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def wait_for_copy(self) -> None:
        """Let the device wait, before it changes the tensors of the last `save`, until they have been copied."""
        if self._snapshot is not None:
            self._snapshot.wait()

    def _write(
        self,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: State,
        losses: Mapping[int, float],
    ) -> None:
        if not (self.run / "config.toml").exists():
            raise MissingFile(
                self.run, "the folder was removed while it was trained in", "choose another --out"
            )
        if self._snapshot is not None:
            self._snapshot.finish()
        folder = self.run / "checkpoints" / f"step-{state.step:06d}"
        if folder.exists():  # damaged, and skipped when the run was resumed
            remove_folder(folder)
        with new_folder(folder) as temporary:
            fill(temporary, model, optimizer, state)
        self.saved = state.step
        for path in removable(self.run, state.step, self.keep, self.keep_every, losses):
            remove_folder(path)
