"""The records of a run: metrics.jsonl on disk, and what is told from them. Needs no torch."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NotRequired, Protocol, TypedDict

from ..data.files import AppendedFile
from ..data.untrusted import InputError, MissingFile, parse_json, read_bytes

MAX_LOG = 512 << 20  # bytes: 2 million records


class Record(TypedDict):
    """A line about training steps, which has `lr`, or about an evaluation. Losses are in nats a token; one that was not
    finite is left out."""

    step: int
    loss: NotRequired[float]
    """Mean over the steps since the line before."""
    highest_loss: NotRequired[float]
    spike: NotRequired[bool]
    lr: NotRequired[float]
    grad_norm: NotRequired[float]
    tokens_per_second: NotRequired[float]
    seconds_per_step: NotRequired[float]
    mfu: NotRequired[float]
    memory: NotRequired[int]
    tokens: NotRequired[int]
    epoch: NotRequired[float]
    skipped: NotRequired[int]
    val_loss: NotRequired[float]
    val_perplexity: NotRequired[float]
    train_loss: NotRequired[float]
    best_possible: NotRequired[float]


class Tracker(Protocol):
    """A further destination of records, see `gpt/train/trackers.py`."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """A file with one JSON record per line, each forced to disk, readable after a crash at any moment.

    Args:
        path: created where it does not exist.
        size: bytes of it to keep, as a checkpoint counts them; what follows is removed, and so is an incomplete line.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        kept = _content(path)[:size].rpartition(b"\n")
        self.history = _records(path, kept[0] + kept[1])
        self._file = AppendedFile(path)
        self._file.cut(len(kept[0] + kept[1]))

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.size

    def write(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: it cannot be written, or the file is no longer where it was; its content is as before.
        """
        self._file.append(json.dumps(record, allow_nan=False) + "\n")
        self.history.append(record)

    def require_in_place(self) -> None:
        """Raise OSError if the file is no longer where it was."""
        self._file.require_in_place()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, without an incomplete last line; none where there is no file.

    Raises:
        InputError: a line is no such record.
    """
    content, end, _ = _content(path).rpartition(b"\n")
    return _records(path, content + end)


def _content(path: Path) -> bytes:
    with suppress(MissingFile):
        return read_bytes(path, MAX_LOG, "remove it; the run goes on without")
    return b""


def _records(path: Path, content: bytes) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        place, remedy = f"{path}, line {number}", "remove that line"
        record: dict[str, Any] = {**parse_json(line, Record, place, remedy)}
        if not all(abs(value) < 1e308 and math.isfinite(value) for value in record.values()):
            raise InputError(place, "it holds a number that no run has", remedy)
        records.append(record)
    return records


def training_lines(history: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records about training steps, the newest first."""
    return (record for record in reversed(history) if "lr" in record)


def overfitting(history: Iterable[dict[str, Any]]) -> str | None:
    """Return a warning once validation has risen above its best in two evaluations in a row while training improves."""
    evaluations = [record for record in history if "val_loss" in record]
    if len(evaluations) < 3:
        return None
    best = min(evaluations, key=lambda record: record["val_loss"])
    before, last = evaluations[-2:]
    rising = best["val_loss"] < before["val_loss"] < last["val_loss"]
    if not rising or last.get("train_loss", math.inf) >= best.get("train_loss", -math.inf):
        return None
    return (
        f"overfitting: validation loss rose from its best {best['val_loss']:.3f} (step {best['step']}) to "
        f"{last['val_loss']:.3f} while training loss fell to {last['train_loss']:.3f}; "
        "more data, more dropout or fewer steps help"
    )


SPIKE = 7  # standard deviations
_RECENT, _FEWEST = 100, 10  # lines of the log; a line is 10 steps by default


def is_spike(history: Sequence[dict[str, Any]], highest: float) -> bool:
    """Whether the highest loss of a line's steps is far above those of the lines before it.

    The distance is that of OLMo 2's spike score, seven standard deviations over the last 1000 steps (Team OLMo, 2025,
    arXiv 2501.00656). Median and median absolute deviation, which earlier spikes do not move, stand for mean and standard
    deviation (Hampel, 1974).

    Args:
        history: the records before that line; where they are few, nothing is a spike.
        highest: loss in nats a token.
    """
    lines = [
        line["highest_loss"] for line in islice(training_lines(history), _RECENT) if "highest_loss" in line
    ]
    if len(lines) < _FEWEST:
        return False
    middle = median(lines)
    deviation = 1.4826 * median(abs(loss - middle) for loss in lines)
    return highest > middle + SPIKE * max(deviation, 1e-3 * middle)
