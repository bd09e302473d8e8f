"""Ctrl-C, SIGTERM and SIGHUP: what they end at once, what is finished first, and the exit code."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.gpt import cli
from fusedgpt.gpt.checkpoint import CheckpointWriter, checkpoints, valid_checkpoint
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.metrics import MetricsLog, read_metrics
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.train import loop, preparation
from fusedgpt.gpt.train.interruption import Interrupted, Signals
from fusedgpt.gpt.train.loop import train
from fusedgpt.gpt.train.step import TrainStep

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "settled_heap", nullcontext)  # 0.4 s each
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    settings = TrainConfig(
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        steps=8,
        batch_size=4,
        log_interval=4,
        eval_interval=4,
        save_interval=100,
        eval_windows=4,
        sample_tokens=3,
        device="cpu",
        verify="off",
    )
    return RunConfig(ModelConfig(29, context_length=8, n_layer=2, n_head=1, n_embd=8), settings)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def at(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], call: int = 1
) -> list[str]:
    """Act in the middle of the call number `call` of a function; returns what happened around it."""
    original, seen = getattr(owner, name), []

    def acting(*args: Any, **settings: Any) -> Any:
        seen.append("called")
        if seen.count("called") == call:
            act()
            seen.append("went on")
        return original(*args, **settings)

    monkeypatch.setattr(owner, name, acting)
    return seen


def test_a_signal_ends_a_long_micro_step_between_two_layers(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []
    original = GPT.forward

    def forward(model: GPT, *args: Any, **settings: Any) -> Any:
        for number, block in enumerate(model.h):
            block.register_forward_pre_hook(lambda *_, number=number: step(number))
        monkeypatch.setattr(GPT, "forward", original)
        return original(model, *args, **settings)

    def step(number: int) -> None:
        layers.append(number)
        if training and layers.count(0) == 3:
            send(signal.SIGTERM)

    training = True
    monkeypatch.setattr(loop, "warn_of_slow_steps", lambda _: None)
    monkeypatch.setattr(loop, "mean_loss", lambda *_: 3.0)
    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    assert layers == [0, 1, 0, 1, 0], "the third step's second layer is not computed"
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000002"]


@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "ends", "step"),
    [
        (signal.SIGTERM, loop, "mean_loss", 2, True, 4),  # the first is of step 0
        (signal.SIGHUP, loop, "generate_text", 1, True, 4),
        (signal.SIGINT, loop, "plot_runs", 1, True, 4),
        (signal.SIGTERM, MetricsLog, "write", 2, False, 4),
        (signal.SIGHUP, TrainStep, "update", 3, False, 3),
    ],
)
def test_a_signal_at_any_moment_leaves_a_checkpoint_of_the_last_finished_step(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    owner: Any,
    name: str,
    call: int,
    ends: bool,
    step: int,
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(loop, "plot_runs", lambda _: None)
    seen = at(owner, name, monkeypatch, lambda: send(number), call)
    with pytest.raises(Interrupted) as interrupted:
        train(config, run)
    assert interrupted.value.number == number
    assert ("went on" in seen) != ends
    assert [path.name for path in checkpoints(run)] == [f"step-{step:06d}"]
    assert f"stopped after step {step}; go on with:" in capsys.readouterr().out


def test_further_signals_change_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the checkpoint, which they would cut short, and in the update, which the first one may not."""
    run = tmp_path / "run"
    at(TrainStep, "update", monkeypatch, lambda: send(signal.SIGINT, signal.SIGTERM), 3)
    at(CheckpointWriter, "_write", monkeypatch, lambda: send(signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    with pytest.raises(Interrupted, match="SIGINT"):
        train(config, run)
    path, skipped = valid_checkpoint(run)
    assert path is not None
    assert (path.name, skipped) == ("step-000003", [])


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_the_data_is_prepared_ends_at_once_without_a_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    seen = at(preparation, "token_shards", monkeypatch, lambda: send(number))
    words = [
        "train",
        "--data",
        str(tmp_path / "text.txt"),
        "--tokenizer",
        "char",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(words) == CODES[number]
    assert seen == ["called"]
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_signal_after_the_last_step_leaves_the_report_to_a_resumed_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at(loop, "mean_loss", patch, lambda: send(signal.SIGTERM), 3)  # the last evaluation
        with pytest.raises(Interrupted):
            train(config, run)
    assert "validation loss:" not in capsys.readouterr().out
    train(config, run, resume=True)
    assert "validation loss:" in capsys.readouterr().out
    train(config, tmp_path / "whole")
    last, whole = (read_metrics(folder / "metrics.jsonl")[-1] for folder in (run, tmp_path / "whole"))
    assert last == whole


def test_an_ignored_signal_stays_ignored_and_handlers_are_put_back(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(number) for number in CODES]
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        at(loop, "generate_text", monkeypatch, lambda: send(signal.SIGHUP))
        train(replace(config, train=replace(config.train, steps=4)), tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, old)
    assert [signal.getsignal(number) for number in CODES] == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_swallows_is_obeyed_at_the_end_of_its_block() -> None:
    class Careless:
        def __del__(self) -> None:
            send(signal.SIGTERM)
            for _ in range(1000):  # the handler runs here, and what it raises is only printed
                pass

    with Signals() as signals, pytest.raises(Interrupted), signals.at_once():
        Careless()
