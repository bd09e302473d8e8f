"""A run that is killed or stopped at any point leaves, once resumed, the files of one that never was, wall-clock fields aside."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.data.files import AppendedFile
from fusedgpt.gpt.checkpoint import CheckpointWriter, valid_checkpoint
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.metrics import MetricsLog
from fusedgpt.gpt.train import loop, saving
from fusedgpt.gpt.train import step as step_module
from fusedgpt.gpt.train.loop import train
from fusedgpt.gpt.train.step import TrainStep

WALL_CLOCK = ("tokens_per_second", "seconds_per_step", "mfu", "memory")
POINTS = [
    (TrainStep, "micro_step"),
    (TrainStep, "update"),
    (MetricsLog, "write"),
    (CheckpointWriter, "save"),
    (loop, "mean_loss"),
    (loop, "generate_text"),
    (AppendedFile, "append"),
    (loop, "plot_runs"),
    (loop, "finish"),
]


class Killed(BaseException):
    """In place of kill -9: nothing is saved after it."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    # what takes most of the time and changes nothing
    monkeypatch.setattr(loop, "plot_runs", lambda _: None)
    monkeypatch.setattr(loop, "warn_of_slow_steps", lambda _: None)
    monkeypatch.setattr(loop, "settled_heap", nullcontext)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    shape = ModelConfig(29, context_length=8, n_layer=1, n_head=1, n_embd=8, resid_dropout=0.1)
    settings = TrainConfig(
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        steps=7,
        batch_size=4,
        lr=1e-2,
        warmup_steps=2,
        log_interval=3,
        eval_interval=4,
        sample_interval=3,
        save_interval=2,
        eval_windows=4,
        sample_tokens=3,
        device="cpu",
        verify="off",
    )
    return RunConfig(shape, settings)


def ticking(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> list[str]:
    """Call `act` at the beginning or end number `at` of the calls of POINTS; returns the list of what has been called."""
    called: list[str] = []

    def tick(name: str) -> None:
        called.append(name)
        if len(called) == at + 1:
            act()

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            tick(f"before {name}")
            result = original(*args, **settings)
            tick(f"after {name}")
            return result

        return call

    for owner, name in POINTS:
        monkeypatch.setattr(owner, name, wrapped(name, getattr(owner, name)))
    return called


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def left(run: Path) -> Iterator[Any]:
    """What a run leaves: its records, samples, and last checkpoint."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield json.dumps({key: value for key, value in json.loads(line).items() if key not in WALL_CLOCK})
    yield (run / "samples.txt").read_bytes()
    checkpoint, skipped = valid_checkpoint(run)
    assert checkpoint is not None
    assert not skipped
    yield checkpoint.name
    yield (checkpoint / "model.safetensors").read_bytes()
    yield (checkpoint / "optimizer.safetensors").read_bytes()
    state = json.loads((checkpoint / "state.json").read_text())
    yield {key: value for key, value in state.items() if key != "files"}


MUON, FLOAT16 = {"optimizer": "muon", "micro_batch": 2}, {"dtype": "float16", "log_interval": 2}


@pytest.mark.parametrize(
    ("act", "changes", "every"),
    [
        (kill, {}, 1),
        (terminate, {}, 3),
        (kill, MUON, 9),
        (terminate, MUON, 7),
        (kill, FLOAT16, 9),
        (terminate, FLOAT16, 7),
    ],
)
def test_whatever_ends_a_run_it_goes_on_as_if_nothing_had(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[], None],
    changes: dict[str, Any],
    every: int,
) -> None:
    monkeypatch.setattr(step_module, "GROWTH_INTERVAL", 2)
    config = replace(config, train=replace(config.train, **changes))
    if act is kill:
        monkeypatch.setattr(saving, "save", lambda *_: None)  # of `rescue`
    with monkeypatch.context() as patch:
        called = ticking(patch, -1, lambda: None)
        train(config, tmp_path / "whole")
    whole = list(left(tmp_path / "whole"))
    for at in range(every - 1, len(called), every):
        run = tmp_path / str(at)
        with monkeypatch.context() as patch:
            ticking(patch, at, act)
            with suppress(Killed, KeyboardInterrupt):
                train(config, run)
        train(config, run, resume=True)
        assert list(left(run)) == whole, called[at]
