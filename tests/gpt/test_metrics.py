"""The record of a run: crash safety, speed, overfitting and the picture."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fusedgpt.data.untrusted import InputError
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig, preset
from fusedgpt.gpt.metrics import MetricsLog, is_spike, overfitting, read_metrics
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.pictures import plot_runs
from fusedgpt.gpt.train.throughput import Speedometer
from fusedgpt.gpt.train.trackers import open_trackers, require_trackers


def test_a_line_cut_off_by_a_crash_is_dropped_and_the_log_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 3.0}\n{"step": 20, "loss": 2.5}\n{"step": 30, "lo')
    assert [record["step"] for record in read_metrics(path)] == [10, 20]
    log = MetricsLog(path, 10**6)
    log.write({"step": 30, "loss": 2.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_resuming_removes_what_a_checkpoint_does_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log, sizes = MetricsLog(path), []
    for step in (10, 20, 30):
        log.write({"step": step})
        sizes.append(log.size)
    log.close()
    assert [record["step"] for record in MetricsLog(path, sizes[1]).history] == [10, 20]
    assert [record["step"] for record in read_metrics(path)] == [10, 20]
    assert [record["step"] for record in MetricsLog(path, sizes[1] - 1).history] == [10], "no part of a line"
    assert MetricsLog(path).history == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        '{"loss": 1}',
        "[]",
        '{"step": "x"}',
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "loss": 1e400}',
        "[" * 9999,
    ],
)
def test_a_line_that_is_no_record_is_refused_and_nothing_is_written(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    before = path.read_bytes()
    for reader in (read_metrics, lambda path: MetricsLog(path, 10**6)):
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: .*; remove that line"):
            reader(path)
    assert path.read_bytes() == before


def lines(*highest):
    return [{"step": i, "lr": 0.1, "loss": loss, "highest_loss": loss} for i, loss in enumerate(highest)]


def test_a_spike_is_far_above_the_recent_losses():
    noisy = [3.0 + 0.1 * (i % 5) for i in range(20)]  # median 3.2, median absolute deviation 0.1
    assert is_spike(lines(*noisy), 3.2 + 0.15 * 7 + 0.01)
    assert not is_spike(lines(*noisy), 3.2 + 0.14 * 7)
    assert not is_spike(lines(*noisy[:9]), 100.0), "too few to tell"
    assert not is_spike(lines(*[9.0] * 200, *[3.0] * 100), 3.01), "only recent lines count"
    assert is_spike(lines(*[9.0] * 200, *[3.0] * 100), 3.1)
    falling = [10.0 * 0.97**i for i in range(60)]
    assert not any(is_spike(lines(*falling[:i]), falling[i]) for i in range(60))
    assert not is_spike([{"step": i, "lr": 0.1} for i in range(20)], 3.0), "lines without a loss"


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
        log.write({"step": step, "loss": 5.0 - step, "highest_loss": 5.0, "spike": True})
        log.write({"step": step, "val_loss": 5.5 - step, "best_possible": 1.0})
    log.close()
    picture = plot_runs([tmp_path])
    assert picture == tmp_path / "loss_curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss_curve.png", "metrics.jsonl"]
    for _ in range(2):  # the second takes the place of the first
        assert plot_runs([tmp_path, tmp_path], tmp_path / "both.png").exists()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for other in (tmp_path / "metrics.jsonl", tmp_path):
        with pytest.raises(InputError, match="it exists and is no PNG; choose another"):
            plot_runs([tmp_path], other)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_spike_is_marked_in_the_picture(tmp_path):
    pictures = []
    for more in ({}, {"highest_loss": 4.0, "spike": True}):
        log = MetricsLog(tmp_path / "metrics.jsonl")
        for step in range(1, 9):
            log.write({"step": step, "loss": 4.0 - step / 8} | (more if step == 5 else {}))
        log.close()
        pictures.append(plot_runs([tmp_path]).read_bytes())
    assert pictures[0] != pictures[1]


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
    record = {"step": 3, "loss": 2.0}
    for tracker in trackers:
        tracker.write(record)
    for tracker in trackers:
        tracker.close()
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
