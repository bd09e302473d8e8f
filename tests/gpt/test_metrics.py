"""The record of a run: crash safety, speed, overfitting and the picture."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig, preset
from fusedgpt.gpt.metrics import MetricsLog, overfitting, read_metrics
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.pictures import plot_runs
from fusedgpt.gpt.train.throughput import Speedometer
from fusedgpt.gpt.train.trackers import open_trackers, require_trackers


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_log_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 2.5}\n{"step": 30, "lo')
    assert [record["step"] for record in read_metrics(path)] == [10, 20]
    log = MetricsLog(path, step=20)
    log.write({"step": 30, "loss": 2.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_resuming_from_an_earlier_step_removes_what_is_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.write({"step": step})
    log.close()
    assert [record["step"] for record in MetricsLog(path, step=20).history] == [10, 20]
    assert [record["step"] for record in read_metrics(path)] == [10, 20]


def test_damage_inside_the_file_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_flops_a_token_of_gpt2_and_no_mfu_for_a_cpu():
    shape = preset("gpt2").model
    with torch.device("meta"):
        parameters = GPT(shape).num_params(position_embeddings=False)
    speed = Speedometer(shape, parameters, torch.device("cpu"))
    # 6 N + 12 L C T by hand, and within 1 % of the 8.5e8 that nanoGPT's estimate gives for the same model
    assert speed.flops_per_token == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert "mfu" not in speed.read(1, 1000)


def test_pauses_do_not_count(monkeypatch):
    clock = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speedometer(ModelConfig(), 1000, torch.device("cpu"))
    speed.pause(5.0)
    assert speed.read(10, 50) == {"tokens_per_second": 100.0, "seconds_per_step": 0.5}


def evaluations(*pairs):
    return [{"step": i, "train_loss": t, "val_loss": v} for i, (t, v) in enumerate(pairs)]


def test_overfitting_is_named_when_validation_rises_twice_and_training_falls():
    assert overfitting(evaluations((3, 3), (2, 2), (1.5, 2.1), (1, 2.2))) is not None
    assert "2.000" in overfitting(evaluations((3, 3), (2, 2), (1.5, 2.1), (1, 2.2)))
    assert overfitting(evaluations((3, 3), (2, 2), (1.5, 2.1))) is None, "one rise is noise"
    assert overfitting(evaluations((3, 3), (2, 2), (2.5, 2.1), (2.6, 2.2))) is None, "training got worse too"
    assert overfitting(evaluations((3, 3), (2, 2), (1.5, 2.2), (1, 2.1))) is None, "recovering"


def test_the_picture_is_a_png_and_replaces_the_old_one(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 5):
        log.write({"step": step, "loss": 5.0 - step})
        log.write({"step": step, "val_loss": 5.5 - step, "best_possible": 1.0})
    log.close()
    picture = plot_runs([tmp_path])
    assert picture == tmp_path / "loss_curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curve.png", "metrics.jsonl"]
    assert plot_runs([tmp_path, tmp_path], tmp_path / "both.png").exists()


@pytest.mark.parametrize(("content", "error"), [(None, FileNotFoundError), ("", ValueError)])
def test_nothing_to_plot_is_an_error_that_names_the_run(tmp_path, content, error):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(error, match=str(tmp_path)):
        plot_runs([tmp_path])


def tracking(**which):
    return RunConfig(ModelConfig(), TrainConfig(**which))


def test_tensorboard_and_wandb_get_every_record(tmp_path, monkeypatch):
    calls = []
    writer = SimpleNamespace(
        add_scalar=lambda *args: calls.append(args), close=lambda: calls.append("closed")
    )
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda folder: calls.append(folder) or writer
    run = SimpleNamespace(
        log=lambda record, step: calls.append((record, step)), finish=lambda: calls.append("finished")
    )
    wandb = ModuleType("wandb")
    wandb.init = lambda **settings: calls.append(settings["config"]["lr"]) or run
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = open_trackers(tracking(tensorboard=True, wandb=True, lr=0.5), tmp_path)
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers=trackers)
    log.write({"step": 3, "loss": 2.0})
    log.close()
    record = {"step": 3, "loss": 2.0}
    assert calls == [tmp_path / "tensorboard", 0.5, ("loss", 2.0, 3), (record, 3), "closed", "finished"]
    assert open_trackers(tracking(), tmp_path) == []


@pytest.mark.parametrize("flag", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_names_the_extra(monkeypatch, flag):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=rf"pip install {flag}, or from a clone pip install -e '\.\[{flag}\]'"
    ):
        require_trackers(TrainConfig(**{flag: True}))
    require_trackers(TrainConfig())
