"""The records of a run: metrics.jsonl on disk, and the detection of overfitting. Needs no torch."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """A further destination of records, see `gpt/train/trackers.py`."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """An append-only file with one JSON record per line, readable after a crash at any moment.

    Each line is a single write, forced to disk. Opening the file removes an incomplete last line and, if a run is resumed
    from an earlier step, the records of later steps.
    """

    def __init__(self, path: Path, step: int = 0, trackers: Iterable[Tracker] = ()) -> None:
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, without an incomplete last line."""
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is empty or incomplete
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a JSON record; remove that line") from None
    return records


def overfitting(history: Iterable[dict[str, Any]]) -> str | None:
    """Return a warning once validation has risen above its best in two evaluations in a row while training improves."""
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
