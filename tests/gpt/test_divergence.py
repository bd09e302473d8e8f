"""Runs that go wrong: losses that are no numbers or far above guessing, disks that are full, folders that are gone, no memory."""

import errno
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedgpt.data.files import AppendedFile
from fusedgpt.gpt.checkpoint import CheckpointWriter, checkpoints, load_state, valid_checkpoint
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.metrics import read_metrics
from fusedgpt.gpt.train import divergence, loop, preparation
from fusedgpt.gpt.train.divergence import diverged, highest_sane
from fusedgpt.gpt.train.interruption import Interrupted, TrainingError
from fusedgpt.gpt.train.loop import train
from fusedgpt.gpt.train.step import TrainStep


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "settled_heap", nullcontext)  # 0.4 s each
    monkeypatch.setattr(loop, "plot_runs", lambda _: None)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    settings = TrainConfig(
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        steps=12,
        batch_size=4,
        micro_batch=2,
        warmup_steps=0,
        log_interval=1,
        eval_interval=4,
        save_interval=2,
        eval_windows=4,
        sample_tokens=0,
        device="cpu",
        verify="off",
    )
    return RunConfig(ModelConfig(29, context_length=8, n_layer=1, n_head=1, n_embd=8), settings)


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def records(run: Path) -> list[dict[str, Any]]:
    return [strict_json(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Poisoned(TrainStep):
    """Gradients of the steps in `bad` are not finite."""

    bad: range = range(0)

    def update(self) -> None:
        if self.step in self.bad:
            self.gradients.buffer[0] = math.inf
            self.loss.fill_(math.nan)
        super().update()


def poison(monkeypatch: pytest.MonkeyPatch, bad: range) -> None:
    monkeypatch.setattr(Poisoned, "bad", bad)
    monkeypatch.setattr(preparation, "TrainStep", Poisoned)


def test_a_line_without_a_finite_loss_has_none_and_training_goes_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(4, 8))
    train(with_train(config, log_interval=2), tmp_path / "run")
    lines = [record for record in records(tmp_path / "run") if "lr" in record]
    assert [("loss" in line, "grad_norm" in line, line.get("skipped")) for line in lines] == [
        (True, True, None),
        (True, True, None),
        (False, False, 2),
        (False, False, 2),
        (True, True, None),
        (True, True, None),
    ]


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_a_report(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    poison(monkeypatch, range(3, 100))
    with pytest.raises(
        TrainingError, match=r"after step 8: the last 5 steps were skipped.*stopped\.json"
    ) as error:
        train(with_train(config, max_skipped=5), run)
    assert "the checkpoint of step 8 is the last good one" in str(error.value), (
        "skipping leaves the weights as they are"
    )
    assert names(run)[-1] == "step-000008"
    assert load_state(checkpoints(run)[-1]).in_row == 5
    report = strict_json((run / "stopped.json").read_text())
    assert (report["step"], report["skipped in a row"]) == (8, 5)
    assert [line["loss"] is None for line in report["losses"]] == [True] * 5 + [False] * 3
    assert report["batch"]["first window"] == 7 * 4
    assert 0 < report["batch"]["loss"] < 4
    assert set(report["norms"]) == {"wte", "wpe", "h.0", "ln_f"}
    assert all(0 <= norm < 100 for layer in report["norms"].values() for norm in layer.values())
    monkeypatch.undo()
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    train(with_train(config, max_skipped=6), run, resume=True)


def test_the_report_recomputes_the_batch_that_was_trained_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, losses = tmp_path / "run", []

    class Noting(Poisoned):
        bad = range(100)

        def update(self) -> None:
            losses.append(self.loss.item())
            super().update()

    monkeypatch.setattr(preparation, "TrainStep", Noting)
    shape = replace(config.model, resid_dropout=0.2)
    with pytest.raises(TrainingError, match="skipped"):
        train(with_train(replace(config, model=shape), max_skipped=3), run)
    assert json.loads((run / "stopped.json").read_text())["batch"]["loss"] == losses[2], (
        "same batch, dropout and weights"
    )


def test_a_run_that_diverges_keeps_its_good_checkpoints_and_fails(config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(with_train(config, steps=4), run)
    with pytest.raises(
        TrainingError, match=r"far above that of guessing, 3\.367; the checkpoint of step 4 is the last good"
    ):
        train(with_train(config, lr=1e4, grad_clip=0.0, schedule="constant"), run, resume=True)
    assert names(run) == ["step-000002", "step-000004"]
    assert all(math.isfinite(value) for record in records(run) for value in record.values())
    assert strict_json((run / "stopped.json").read_text())["step"] == 12


def test_a_run_that_stays_diverged_is_stopped_before_its_end(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(divergence, "PATIENCE", 5)
    with pytest.raises(
        TrainingError, match=r"stopped after step 6: the loss has stayed far above.*no checkpoint yet"
    ):
        train(with_train(config, lr=1e4, grad_clip=0.0, schedule="constant"), tmp_path / "run")
    assert names(tmp_path / "run") == []
    assert "stopped after" not in capsys.readouterr().err, "the error says it, once"


def test_what_staying_far_above_guessing_means(config: RunConfig) -> None:
    def lines(*losses: float | None) -> list[dict[str, Any]]:
        return [
            {"step": 50 * i, "lr": 0.1} | ({} if loss is None else {"loss": loss})
            for i, loss in enumerate(losses)
        ]

    assert highest_sane(config) == pytest.approx(2 * math.log(29))
    assert diverged(lines(1, 9, 9, 9), 6.0)
    assert diverged(lines(1, 9, 9), 6.0), "lines of 50 steps"
    assert not diverged(lines(1, 9), 6.0), "not yet 100 steps"
    assert not diverged(lines(9, 9, 9, 5), 6.0)
    assert diverged(lines(1, None, None, None), 6.0)
    assert not diverged([*lines(1, 9), {"step": 900, "val_loss": 9.0}], 6.0)


@pytest.mark.parametrize("interrupted", [False, True])
def test_weights_that_are_not_finite_are_never_saved(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    class Breaking(TrainStep):
        def update(self) -> None:
            super().update()
            if self.step == 5:
                self.model.wpe.weight.data[0, 0] = math.nan
                if interrupted:
                    raise_signal()

    def raise_signal() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(preparation, "TrainStep", Breaking)
    with pytest.raises(TrainingError, match=r"finite.*the checkpoint of step 4 is the last good one"):
        train(config, tmp_path / "run")
    assert names(tmp_path / "run") == ["step-000002", "step-000004"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_folder_that_goes_away_ends_training_at_the_next_line(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    run, steps = tmp_path / "run", []

    class Removing(TrainStep):
        def update(self) -> None:
            steps.append(self.step)
            if self.step == 4:
                run.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(run)
            super().update()

    monkeypatch.setattr(preparation, "TrainStep", Removing)
    with pytest.raises(TrainingError, match=rf"the run's folder is gone at step 6 \({run}"):
        train(with_train(config, log_interval=3, save_interval=100), run)
    assert steps[-1] == 5
    assert not run.exists()


def full_disk(monkeypatch: pytest.MonkeyPatch, run: Path, owner: Any, name: str, call: int) -> None:
    """The call number `call` finds the disk full."""
    original, calls = getattr(owner, name), []

    def failing(self: Any, *args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device", str(run / "file"))
        return original(self, *args, **settings)

    monkeypatch.setattr(owner, name, failing)


def test_a_disk_that_is_full_in_the_log_is_named_and_the_step_saved(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_train(config, log_interval=3, save_interval=100)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_disk(patch, run, AppendedFile, "append", 4)  # evaluation, step 3, evaluation, step 6
        with pytest.raises(
            TrainingError, match=r"file: No space left on device, at step 6; mend that, then go on with: "
        ):
            train(config, run)
    assert names(run) == ["step-000006"]
    assert [record["step"] for record in records(run)] == [0, 3, 4]
    train(config, run, resume=True)
    train(config, tmp_path / "whole")
    kept = ("step", "loss", "grad_norm", "val_loss", "train_loss")
    ours, whole = (
        [[record.get(key) for key in kept] for record in records(folder)]
        for folder in (run, tmp_path / "whole")
    )
    assert ours == whole


@pytest.mark.parametrize(("owner", "name"), [(AppendedFile, "append"), (CheckpointWriter, "_write")])
def test_a_full_disk_may_be_passed_over(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
) -> None:
    run = tmp_path / "run"
    full_disk(monkeypatch, run, owner, name, 2)
    train(with_train(config, on_save_error="continue"), run)
    assert names(run)[-1] == "step-000012"
    assert capsys.readouterr().err.count("No space left on device, at step") == 1


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_keeps_the_last(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for call, step, policy in ((2, 4, "stop"), (6, 12, "continue")):  # at the end there is no going on
        shutil.rmtree(run, ignore_errors=True)
        with monkeypatch.context() as patch:
            full_disk(patch, run, CheckpointWriter, "_write", call)
            with pytest.raises(TrainingError, match=rf"No space left on device, at step {step};"):
                train(with_train(config, on_save_error=policy), run)
        assert names(run)[-1] == f"step-{step - 2:06d}"
        assert valid_checkpoint(run)[1] == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        ),
        MemoryError(),
    ],
)
def test_memory_that_a_cpu_lacks_is_explained_and_the_last_step_saved(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Greedy(TrainStep):
        def micro_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
            super().micro_step(inputs, targets)
            if self.step == 3:
                raise error

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "TrainStep", Greedy)
        with pytest.raises(TrainingError, match=r"out of memory: this machine has .*--micro-batch 1"):
            train(config, run)
    assert names(run)[-1] == "step-000003"
    train(config, run, resume=True)
    train(config, tmp_path / "whole")
    ours, whole = (
        [r.get("loss") for r in read_metrics(folder / "metrics.jsonl")]
        for folder in (run, tmp_path / "whole")
    )
    assert ours == whole


def test_an_error_within_the_update_saves_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torn(TrainStep):
        def update(self) -> None:
            super().update()
            if self.step == 3:
                raise MemoryError

    monkeypatch.setattr(preparation, "TrainStep", Torn)
    with pytest.raises(TrainingError, match="out of memory"):
        train(config, tmp_path / "run")
    assert names(tmp_path / "run") == ["step-000002"], "the weights belong to no step"
    assert not isinstance(Interrupted(2), Exception), "what passes over errors does not pass over signals"
