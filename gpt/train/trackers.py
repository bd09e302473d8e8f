"""Optional destinations of a run's records: TensorBoard and Weights & Biases."""

import importlib.util
from pathlib import Path
from typing import Any

from ..config import RunConfig, TrainConfig
from ..metrics import Tracker


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
    """Raise ValueError if a requested tracker is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--{name} needs a package: pip install {name}, or from a clone pip install -e '.[{name}]'"
            )


def open_trackers(config: RunConfig, out: Path) -> list[Tracker]:
    """Open the trackers that the settings request."""
    trackers: list[Tracker] = []
    if config.train.tensorboard:
        trackers.append(TensorBoard(out))
    if config.train.wandb:
        trackers.append(WandB(out, config.flat()))
    return trackers
