"""Output that fails never ends training: closed pipes, full disks, terminals that know only ASCII, pictures, samples, trackers."""

import io
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.gpt.checkpoint import checkpoints
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.metrics import read_metrics
from fusedgpt.gpt.output import Output
from fusedgpt.gpt.train import loop, preparation
from fusedgpt.gpt.train.loop import train
from fusedgpt.gpt.train.verify import reject


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "settled_heap", nullcontext)  # 0.4 s each
    monkeypatch.setattr(loop, "plot_runs", lambda _: None)
    (tmp_path / "text.txt").write_text(
        "the quick brown fox é jumps over the lazy dog. " * 60, encoding="utf-8"
    )
    settings = TrainConfig(
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        steps=4,
        batch_size=4,
        log_interval=1,
        eval_interval=2,
        eval_windows=4,
        sample_tokens=3,
        prompt="é",
        device="cpu",
        verify="off",
    )
    return RunConfig(ModelConfig(30, context_length=8, n_layer=1, n_head=1, n_embd=8), settings)


class Failing(io.TextIOBase):
    """A stdout whose writes or flushes fail."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, error: Exception, method: str) -> None:
        self.error, self.method, self.calls = error, method, 0

    def write(self, text: str) -> int:
        return self._call("write", len(text))

    def flush(self) -> None:
        self._call("flush", 0)

    def _call(self, method: str, result: int) -> int:
        if method == self.method:
            self.calls += 1
            raise self.error
        return result


def complete(run: Path) -> bool:
    return [path.name for path in checkpoints(run)] == ["step-000004"] and (
        [r["step"] for r in read_metrics(run / "metrics.jsonl") if "val_loss" in r] == [0, 2, 4]
    )


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), ValueError("closed")]
)
@pytest.mark.parametrize("method", ["write", "flush"])
def test_a_stdout_that_fails_is_said_once_and_training_goes_on(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    method: str,
) -> None:
    stdout = Failing(error, method)
    monkeypatch.setattr(sys, "stdout", stdout)
    train(config, tmp_path / "run")
    assert complete(tmp_path / "run")
    assert stdout.calls == 1
    assert capsys.readouterr().err.count("warning: stdout cannot be written") == 1


def test_without_stdout_and_stderr_training_goes_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", Failing(BrokenPipeError(), "write"))
    train(config, tmp_path / "run")
    assert complete(tmp_path / "run")
    reject("a kernel is wrong", strict=False)


def test_a_terminal_that_knows_only_ascii_gets_escapes(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    train(config, tmp_path / "run")
    assert complete(tmp_path / "run")
    assert b"    \\xe9" in raw.getvalue()
    assert "é" in (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")


def test_escape_sequences_do_not_reach_the_terminal(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "generate_text", lambda *_, **__: ["\x1b[2Jgone\x9b\r\x07"])
    train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "\\x1b[2Jgone\\x9b\\r\\x07" in out
    assert not set("\x1b\x9b\r\x07") & set(out)


class Tracking:
    """A tracker whose service is gone."""

    def write(self, record: dict[str, Any]) -> None:
        raise RuntimeError("service gone\nand more")

    close = None


def test_a_failing_picture_sample_or_tracker_is_said_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", "curve.png")

    monkeypatch.setattr(loop, "plot_runs", fail)
    monkeypatch.setattr(loop, "generate_text", fail)
    monkeypatch.setattr(preparation, "open_trackers", lambda *_: [Tracking()])
    train(config, tmp_path / "run")
    assert complete(tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [
        "warning: a tracker failed and is left out: RuntimeError: service gone",
        "warning: the picture of the loss failed and is left out: OSError: [Errno 28] No space left on device: 'curve.png'",
        "warning: the sample of text failed and is left out: OSError: [Errno 28] No space left on device: 'curve.png'",
    ]


def test_gpt_train_into_a_pipe_that_closes_trains_to_its_end(config: RunConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusedgpt.gpt", "train", "--out", str(tmp_path / "run")]
    command += [
        "--data",
        str(tmp_path / "text.txt"),
        "--tokenizer",
        "char",
        "--steps",
        "4",
        "--eval-interval",
        "2",
    ]
    command += [
        "--n-layer",
        "1",
        "--n-head",
        "1",
        "--n-embd",
        "8",
        "--context-length",
        "8",
        "--device",
        "cpu",
    ]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert complete(tmp_path / "run")
    assert done.stderr.splitlines() == ["warning: stdout cannot be written (Broken pipe): no more output"]


def test_the_disk_behind_stdout_may_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays in Python's buffer does not fail again when it is closed."""
    full = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(full, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        output = Output()
        output.write("text")
        output.flush()
        assert output.lost
        monkeypatch.undo()
