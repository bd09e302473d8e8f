"""Writing checkpoints: which are kept, in the background, whole or not at all."""

import math
import os
import shutil
import threading
from concurrent.futures import wait
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusedgpt.data.tokenizers import CharTokenizer
from fusedgpt.data.untrusted import MissingFile
from fusedgpt.gpt import checkpoint as module
from fusedgpt.gpt.checkpoint import (
    CheckpointWriter,
    State,
    checkpoints,
    load_model,
    load_optimizers,
    load_state,
    model_tensors,
    valid_checkpoint,
    verify,
)
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import Optimizers, build_optimizers
from fusedgpt.gpt.run import create_run, load_run
from fusedgpt.gpt.train.loop import train

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SHAPE = ModelConfig(29, context_length=16, n_layer=1, n_head=2, n_embd=16)
NAMES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a cache, and a run of 6 steps with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDGPT_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text(TEXT)
        train(configuration(folder), folder / "run")
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run; its data are beside the original."""
    monkeypatch.setenv("FUSEDGPT_CACHE", str(original / "cache"))
    return Path(shutil.copytree(original / "run", tmp_path / "run"))


def configuration(folder: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"steps": 6, "save_interval": 2, "keep_checkpoints": 3, "eval_interval": 6}
    settings |= {
        "tokenizer": "char",
        "batch_size": 4,
        "sample_tokens": 0,
        "device": "cpu",
        "optimizer": "muon",
    }
    return RunConfig(SHAPE, TrainConfig(data=str(folder / "text.txt"), **(settings | changes)))


def newest(run: Path) -> Path:
    return checkpoints(run)[-1]


def fresh(optimizer: str = "muon", **changes: Any) -> tuple[GPT, Optimizers]:
    model = GPT(replace(SHAPE, **changes))
    return model, build_optimizers(model, TrainConfig(optimizer=optimizer))  # type: ignore[arg-type]


# ---- what is kept


def state(step: int, **changes: Any) -> State:
    return replace(State(step, {"position": 0}, None, [], 0, 0, {}, {}, {}, ""), **changes)


def write(run: Path, steps: range, losses: dict[int, float], **settings: Any) -> list[int]:
    """Save at these steps; the steps that remain."""
    model, optimizers = fresh()
    keep, every = settings.get("keep", 2), settings.get("keep_every", 0)
    writer, history = CheckpointWriter(run, keep, every, settings.get("background", False)), []
    for step in steps:
        writer.save(model, optimizers, state(step), history)
        history += (
            [{"step": step, "val_loss": losses[step]}] if step in losses else [{"step": step, "loss": 1.0}]
        )
    writer.close()
    return [int(path.name[5:]) for path in checkpoints(run)]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("losses", "settings", "kept"),
    [
        ({}, {"keep": 1}, [50]),
        ({}, {"keep": 9}, [10, 20, 30, 40, 50]),
        ({20: 1.0, 30: 2.0, 40: math.nan}, {}, [20, 40, 50]),
        ({10: 2.0, 20: 1.0, 30: 0.5}, {}, [30, 40, 50]),
        ({10: 2.0, 40: 1.0}, {"keep": 1}, [40, 50]),
        ({25: 0.1, 30: 0.5}, {"keep": 1}, [30, 50]),  # step 25 was not saved
        ({}, {"keep": 1, "keep_every": 20}, [20, 40, 50]),
        ({10: 1.0}, {"keep": 1, "keep_every": 20}, [10, 20, 40, 50]),
        ({10: -math.inf, 20: math.inf}, {"keep": 1}, [50]),
    ],
)
def test_the_newest_the_best_and_every_so_many_th_stay(
    empty_run: Path, background: bool, losses: dict[int, float], settings: dict[str, int], kept: list[int]
) -> None:
    assert write(empty_run, range(10, 60, 10), losses, background=background, **settings) == kept
    for checkpoint in checkpoints(empty_run):
        verify(checkpoint)
    assert [p.name for p in (empty_run / "checkpoints").iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def empty_run(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    create_run(out, RunConfig(SHAPE, TrainConfig()), CharTokenizer.train([TEXT]), {})
    return out


def test_damaged_checkpoints_of_later_steps_never_push_out_the_one_just_written(run: Path) -> None:
    for checkpoint in checkpoints(run)[1:]:
        (checkpoint / "model.safetensors").write_bytes(b"")
    assert write(run, range(3, 4), {}, keep=1) == [3, 4, 6]
    assert valid_checkpoint(run)[0] == run / "checkpoints" / "step-000003"
    assert write(run, range(4, 8, 2), {}, keep=1) == [6]
    assert valid_checkpoint(run) == (newest(run), [])


def test_what_killed_processes_left_is_removed_when_the_run_is_opened(run: Path) -> None:
    for name in (
        ".config.toml.77.tmp",
        "checkpoints/.step-000008.77.tmp/x",
        "checkpoints/.step-000002.removed/x",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("half")
    (run / "notes.tmp").write_text("the user's")
    assert load_run(run).step == 6, "using a run removes nothing"
    assert len(list((run / "checkpoints").iterdir())) == 5
    CheckpointWriter(run, 2, 0, False)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-000002",
        "step-000004",
        "step-000006",
    }
    assert not (run / ".config.toml.77.tmp").exists()
    assert (run / "notes.tmp").exists()


@pytest.mark.parametrize("background", [False, True])
def test_a_run_folder_that_was_removed_is_said_and_not_made_again(empty_run: Path, background: bool) -> None:
    writer = CheckpointWriter(empty_run, 2, 0, background)
    shutil.rmtree(empty_run)
    with pytest.raises(MissingFile, match="the folder was removed while"), closing(writer):
        writer.save(*fresh(), state(2), [])
    assert not empty_run.exists()


# ---- in the background


class Slow:
    """A `fill` that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.calls, self.fill = threading.Event(), 0, module.fill
        monkeypatch.setattr(module, "fill", self)

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        assert self.go.wait(30)
        self.fill(*args)


def test_a_background_save_is_of_the_moment_it_was_asked_for(
    empty_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizers = fresh()
    expected = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    slow = Slow(monkeypatch)
    writer = CheckpointWriter(empty_run, 2, 0, background=True)
    writer.save(model, optimizers, state(2), [])
    assert checkpoints(empty_run) == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    slow.go.set()
    writer.close()
    saved = load_file(newest(empty_run) / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_there_is_one_snapshot_at_a_time(empty_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = fresh()
    slow = Slow(monkeypatch)
    writer = CheckpointWriter(empty_run, 2, 0, background=True)
    writer.save(model, optimizers, state(2), [])
    second = threading.Thread(target=writer.save, args=(model, optimizers, state(4), []))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second save waits for the first"
    assert slow.calls == 1
    slow.go.set()
    second.join(30)
    writer.close()
    assert [path.name for path in checkpoints(empty_run)] == ["step-000002", "step-000004"]


@pytest.mark.parametrize("how", ["save", "wait", "close"])
def test_an_error_in_the_background_is_raised_once_at_the_next_call(
    empty_run: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    model, optimizers = fresh()
    writer = CheckpointWriter(empty_run, 2, 0, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "fill", fail)
        writer.save(model, optimizers, state(2), [])
        wait([writer._pending])
    call = partial(writer.save, model, optimizers, state(4), []) if how == "save" else getattr(writer, how)
    with pytest.raises(OSError, match="No space left"):
        call()
    writer.close()
    names = {path.name for path in (empty_run / "checkpoints").iterdir()}
    assert names == ({"step-000004"} if how == "save" else set()), "nothing is left of the one that failed"


@pytest.mark.parametrize("changes", [{"optimizer": "adamw"}, {"optimizer": "muon", "dtype": "float16"}])
def test_saving_in_the_background_leaves_the_same_checkpoints(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(original / "cache"))
    for folder, background in (("plain", False), ("background", True)):
        train(configuration(original, async_save=background, **changes), tmp_path / folder)
    ours, theirs = checkpoints(tmp_path / "background"), checkpoints(tmp_path / "plain")
    assert (
        [path.name for path in ours]
        == [path.name for path in theirs]
        == ["step-000002", "step-000004", "step-000006"]
    )
    for one, other in zip(ours, theirs, strict=True):
        for name in NAMES[:2]:
            assert (one / name).read_bytes() == (other / name).read_bytes()
    train(configuration(original, steps=8, async_save=True, **changes), tmp_path / "plain", resume=True)
    assert load_run(tmp_path / "plain").step == 8


# ---- creating, and the state


def test_a_run_folder_exists_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, config = CharTokenizer.train([TEXT]), RunConfig(SHAPE, TrainConfig())
    seen: list[Any] = []
    rename = os.replace

    def watch(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "run":
            seen.extend(path.name for path in Path(source).iterdir())
            assert not (tmp_path / "run").exists()
        rename(source, target)

    monkeypatch.setattr(os, "replace", watch)
    create_run(tmp_path / "run", config, tokenizer, {}, fresh()[0])
    assert sorted(seen) == ["checkpoints", "config.toml", "tokenizer.json"], "complete before it has its name"
    assert load_run(tmp_path / "run").step == 0
    monkeypatch.setattr(CharTokenizer, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create_run(tmp_path / "other", config, tokenizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_state_comes_back_as_it_was(empty_run: Path) -> None:
    given = state(
        7,
        loader={"position": 28, "data": "ab"},
        scaler={"scale": 65536.0, "_growth_tracker": 7},
        losses=[0.1 + 0.2, math.nan, 1e-300, math.inf],
        files={"metrics.jsonl": 1 << 40},
        versions={"torch": "2.13"},
    )
    CheckpointWriter(empty_run, 1, 0, False).save(*fresh(), given, [])
    found = load_state(newest(empty_run))
    assert found.losses[0] == given.losses[0]
    assert found.losses[2] == given.losses[2]
    assert [math.isfinite(loss) for loss in found.losses] == [True, False, True, False]
    assert replace(found, losses=[]) == replace(given, losses=[])


def test_the_state_of_an_optimizer_that_has_not_stepped_is_what_it_would_begin_with(empty_run: Path) -> None:
    """Muon makes its momentum in its first step, which a gradient that is not finite skips."""
    model, optimizers = fresh()
    CheckpointWriter(empty_run, 1, 0, False).save(model, optimizers, state(1), [])
    again, restored = fresh()
    load_model(again, newest(empty_run))
    load_optimizers(again, restored, newest(empty_run))
    for one, other in ((model, optimizers), (again, restored)):
        for p in one.parameters():
            p.grad = torch.full_like(p, 0.5)
        other.step(None, torch.zeros(()))
    for name, tensor in model_tensors(model).items():
        assert torch.equal(tensor, model_tensors(again)[name]), name


def test_a_checkpoint_that_is_there_is_not_written_again(run: Path) -> None:
    before = (newest(run) / "state.json").stat().st_mtime_ns
    CheckpointWriter(run, 3, 0, False, saved=6).save(*fresh(), state(6), [])
    assert (newest(run) / "state.json").stat().st_mtime_ns == before
