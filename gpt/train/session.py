"""What a run holds in memory, and what it knows about where it is."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.files import AppendedFile
from ...data.loader import TokenLoader
from ...data.shards import TokenShards
from ...data.windows import Batch
from ..checkpoint import CheckpointWriter
from ..config import RunConfig
from ..metrics import MetricsLog, Tracker, training_lines
from ..model import GPT
from ..optim import Optimizers
from ..output import Optional
from .display import Display
from .interruption import Signals
from .step import TrainStep
from .throughput import Speedometer
from .trace import Trace


@dataclass
class Session:
    """Everything that a run needs in memory."""

    out: Path
    config: RunConfig
    shards: TokenShards
    model: GPT
    optimizers: Optimizers
    loader: TokenLoader
    validation: list[Batch]
    step: TrainStep
    log: MetricsLog
    samples: AppendedFile
    trackers: list[Tracker]
    writer: CheckpointWriter
    speed: Speedometer
    trace: Trace | None
    display: Display
    signals: Signals
    floor: float | None  # the best possible loss in nats a token, where it is known
    losses: list[Tensor]  # of the steps since the last line of the log
    norm: Tensor  # of the last step's gradients
    ends: set[Any]  # the last step, and that of a shorter run which this one goes on from
    optional: Optional = field(default_factory=Optional)
    position: int = field(init=False)  # the loader's after the last step
    sizes: dict[str, int] = field(init=False)  # of metrics.jsonl and samples.txt after the last step
    tried: int = field(init=False)  # the step of the last attempt to save

    def __post_init__(self) -> None:
        self.tried = self.step.step
        self.settle()

    def settle(self) -> None:
        """Note what belongs to the step that is done: evaluations and samples after it will be made again on resuming."""
        self.position = self.loader.position
        self.sizes = {"metrics.jsonl": self.log.size, "samples.txt": self.samples.size}

    @property
    def last(self) -> bool:
        """Whether all steps are done."""
        return self.step.step >= self.config.train.steps

    def due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps is to happen now; at the end it always is."""
        return self.step.step % interval == 0 or self.step.step in self.ends

    def pending(self) -> list[float]:
        """The losses of the steps since the last line of the log."""
        return torch.stack(self.losses).tolist() if self.losses else []

    def recent_loss(self) -> float | None:
        """The mean loss of the steps since the last line of the log, or of that line's; None if none was finite."""
        if self.losses:
            return finite_mean(self.pending())
        return next(training_lines(self.log.history), {}).get("loss")


def finite_mean(losses: list[float]) -> float | None:
    """The mean of those losses that are finite; None if none is."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return math.fsum(finite) / len(finite) if finite else None
