"""What a run tells about itself: its record in metrics.jsonl, its speed, signs of overfitting, and its picture."""

import importlib.util
import json
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config import ModelConfig, RunConfig, TrainConfig

# Dense bf16 peaks in FLOP/s, from the vendors' datasheets. The longest name that a device's contains counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


class MetricsLog:
    """An append-only file of JSON lines, one a record, that a crash at any moment leaves readable.

    Each line is one write of its own, forced to disk. Opening the file removes what a crash left of a last line and,
    where a run is continued from an earlier step, the records of later steps.
    """

    def __init__(self, path: Path, step: int = 0, trackers: Iterable["Tracker"] = ()) -> None:
        self.trackers = tuple(trackers)
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, path)
        self.history = kept
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        os.write(self._descriptor, (json.dumps(record) + "\n").encode())
        os.fsync(self._descriptor)
        for tracker in self.trackers:
            tracker.write(record)

    def close(self) -> None:
        os.close(self._descriptor)
        for tracker in self.trackers:
            tracker.close()


class Tracker(Protocol):
    """Where records go besides metrics.jsonl."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, for `tensorboard --logdir runs`."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(out / "tensorboard")

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases in the project fusedgpt, named like the run's folder."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project="fusedgpt", name=out.name, dir=str(out), config=settings)

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(record, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def require_trackers(settings: TrainConfig) -> None:
    """Raise ValueError where a tracker is asked for that is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"--{name} needs a package: pip install 'fusedgpt[{name}]'")


def open_trackers(config: RunConfig, out: Path) -> list[Tracker]:
    """The trackers that the settings ask for."""
    trackers: list[Tracker] = []
    if config.train.tensorboard:
        trackers.append(TensorBoard(out))
    if config.train.wandb:
        trackers.append(WandB(out, config.flat()))
    return trackers


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is empty or cut off
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a JSON record; remove that line") from None
    return records


class Speedometer:
    """Tokens a second and model FLOPs utilisation since it was last read, without the pauses.

    MFU = (6 N + 12 L C T) · tokens/s over the device's dense bf16 peak (Chowdhery et al., 2022, appendix B), N being
    the parameters without position embeddings. A device that is not in PEAK_FLOPS has none.
    """

    def __init__(self, model: ModelConfig, parameters: int, device: torch.device) -> None:
        self.device = device
        self.flops_per_token = 6 * parameters + 12 * model.n_layer * model.n_embd * model.context_length
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        matching = [key for key in PEAK_FLOPS if key in name]
        self.peak = PEAK_FLOPS[max(matching, key=len)] if matching else None
        self.start()

    def start(self) -> None:
        self._start, self._paused = time.perf_counter(), 0.0

    def pause(self, seconds: float) -> None:
        """Leave these seconds (of an evaluation, a checkpoint) out of the speed."""
        self._paused += seconds

    def read(self, steps: int, tokens_a_step: int) -> dict[str, float]:
        """The speed over the steps done since the last reading."""
        seconds = time.perf_counter() - self._start - self._paused
        self.start()
        record = {"tokens_per_second": steps * tokens_a_step / seconds, "seconds_per_step": seconds / steps}
        if self.peak:
            record["mfu"] = self.flops_per_token * record["tokens_per_second"] / self.peak
        return record


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: the device's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def overfitting(history: Iterable[dict[str, Any]]) -> str | None:
    """A sentence once validation has risen above its best for two evaluations running while training improves."""
    evaluations = [record for record in history if "val_loss" in record]
    if len(evaluations) < 3:
        return None
    best = min(evaluations, key=lambda record: record["val_loss"])
    before, last = evaluations[-2:]
    rising = best["val_loss"] < before["val_loss"] < last["val_loss"]
    if not rising or last["train_loss"] >= best["train_loss"]:
        return None
    return (
        f"overfitting: validation loss rose from its best {best['val_loss']:.3f} (step {best['step']}) to "
        f"{last['val_loss']:.3f} while training loss fell to {last['train_loss']:.3f}; "
        "more data, more dropout or fewer steps help"
    )


def plot_runs(runs: list[Path], out: Path | None = None) -> Path:
    """Draw the loss curves of runs, training and validation, as a PNG; returns its path.

    Args:
        runs: run folders.
        out: the file; by default loss_curve.png in the run's folder (of the first run).

    Raises:
        FileNotFoundError, ValueError: a folder is not a run, or its log holds nothing yet.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, run in enumerate(runs):
        file = run / "metrics.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"{run} is not a run with a log: it has no metrics.jsonl")
        records = read_metrics(file)
        training = [(r["step"], r["loss"]) for r in records if "loss" in r]
        validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        if not training and not validation:
            raise ValueError(f"{file} holds no losses yet")
        colour, label = colours[i % 10], f"{run.name}: " if len(runs) > 1 else ""
        if training:
            axes.plot(*zip(*training, strict=True), color=colour, alpha=0.45, lw=1, label=f"{label}training")
        if validation:
            axes.plot(
                *zip(*validation, strict=True), color=colour, marker="o", ms=3, label=f"{label}validation"
            )
            step, best = min(validation, key=lambda point: point[1])
            axes.annotate(
                f"{best:.3f}", (step, best), (0, 8), textcoords="offset points", ha="center", color=colour
            )
        floor = next((r["best_possible"] for r in reversed(records) if "best_possible" in r), None)
        if floor is not None:
            axes.axhline(floor, color=colour, ls=":", label=f"{label}best possible {floor:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats a token", title=", ".join(run.name for run in runs))
    low, high = axes.dataLim.intervaly
    if high > 5 * low > 0:  # else the first steps take all the room
        axes.set_yscale("log")
        ticks = [
            tick
            for decade in (0.1, 1.0, 10.0)
            for tick in (decade, 1.5 * decade, 2 * decade, 3 * decade, 5 * decade, 7 * decade)
        ]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(0.9 * low, 1.1 * high)
    axes.grid(alpha=0.25)
    axes.legend()
    out = out or runs[0] / "loss_curve.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, out)
    return out
