"""`python -m fusedgpt.bench saving`: the throughput that a training run loses to its checkpoints.

Blocks of steps take turns: without a checkpoint, with one before the block's first step, and with one that is written in the
background (`--async-save`), which the block waits for at its end. What a block with a checkpoint takes longer than
its neighbour without one is what a checkpoint costs; over so many steps as lie between two of them, it is the share of throughput lost.
The disk is that of the working folder.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...gpt.checkpoint import CheckpointWriter, State, versions
from ...gpt.config import TrainConfig
from ...gpt.optim import build_optimizers
from ...gpt.train.step import TrainStep
from ..record import recording
from ..table import Column, heading, line
from .implementations import build_model, train_config
from .sizes import Workload, workload

INTERVAL = TrainConfig.save_interval
BLOCK = 0.5  # seconds of steps, so that a block is longer than a save in the background
COLUMNS: tuple[Column, ...] = (
    ("step", "<32", "case", "{}"),
    ("checkpoint", "<14", "side", "{}"),
    ("a step", ">10", "step", "{:.1f} ms"),
    ("lost", ">10", "milliseconds", "{:.1f} ms"),
    ("blocks", ">7", "blocks", "{}"),
    (f"of {INTERVAL} steps", ">13", "share", "{:.3%}"),
)


@dataclass
class Row:
    """What a checkpoint costs a run: medians of paired blocks."""

    name: str
    case: str
    side: str
    step: float  # milliseconds of a step without a checkpoint
    milliseconds: float  # lost to a checkpoint
    share: float  # of the throughput, at the default interval
    megabytes: float  # of a checkpoint
    blocks: int


def run_saving(sizes: Sequence[str], rounds: int, device_name: str, out: Path | None) -> None:
    """Measure sizes of the training step, print a table, and write the record where asked for."""
    works = [workload(size, device_name) for size in sizes]
    with recording("saving", works[0].device, out) as found:
        found["rows"] = []
        print(heading(COLUMNS), flush=True)
        for work in works:
            for row in map(asdict, measure(work, rounds)):
                print(line(COLUMNS, row), flush=True)
                found["rows"].append({"benchmark": "saving", **row})


def measure(work: Workload, rounds: int) -> Iterator[Row]:
    """The rows of a size. rounds: blocks of each kind."""
    model, config = build_model(work), train_config(work)
    optimizers = build_optimizers(model, config)
    step = TrainStep(model, optimizers, work.batches(), config)
    for _ in range(3):
        step()
    (seconds,) = _times([lambda: _steps(step, 4)])
    steps = max(2, math.ceil(4 * BLOCK / seconds))
    with tempfile.TemporaryDirectory(prefix="saving-", dir=".") as folder:
        writers = []
        for name in ("in place", "--async-save"):
            run = Path(folder, name)
            run.mkdir()
            (run / "config.toml").touch()  # without it the folder is no run any more
            writers.append(CheckpointWriter(run, 2, 0, background=name != "in place"))
        step.before_update = writers[1].wait_for_copy

        def saved(writer: CheckpointWriter) -> None:
            state = State(step.step, {}, step.state() or None, [], 0, 0, {}, asdict(config), versions(), "")
            writer.save(model, optimizers, state, [])
            _steps(step, steps)
            writer.wait()

        blocks = [lambda: _steps(step, steps), *(lambda writer=one: saved(writer) for one in writers)]
        samples = [_times(blocks) for _ in range(1 + rounds)][1:]  # the first one allocates
        written = sum(file.stat().st_size for file in Path(folder, "in place").rglob("*") if file.is_file())
        for writer in writers:
            writer.close()
    a_step = statistics.median(times[0] for times in samples) / steps
    for side, name in enumerate(("in place", "--async-save"), 1):
        lost = statistics.median(times[side] - times[0] for times in samples)
        share = lost / (INTERVAL * a_step + lost)
        yield Row("saving", work.case, name, 1e3 * a_step, 1e3 * lost, share, written / 2 / 1e6, rounds)


def _steps(step: TrainStep, number: int) -> None:
    for _ in range(number):
        loss, _ = step()
    loss.item()  # on a GPU: wait for them


def _times(blocks: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each block, in order."""
    found = []
    for block in blocks:
        start = time.perf_counter()
        block()
        found.append(time.perf_counter() - start)
    return found
