"""How training ends early: an error that names the remedy, or Ctrl-C and SIGTERM, which are collected when they come and
obeyed between two batches or two pieces of a sample."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports the tokenizers, which a machine that only measures may lack
    from ...data.windows import Batch


class TrainingError(RuntimeError):
    """Training cannot go on: what happened, at which step, and what to do."""


class Interrupted(Exception):
    """A signal has come; training stops between two micro-steps."""


def check(signals: list[int]) -> None:
    """Raise Interrupted where there is a signal."""
    if signals:
        raise Interrupted


def until(signals: list[int], batches: "Iterable[Batch]") -> "Iterator[Batch]":
    """The batches; Interrupted instead of the next one once there is a signal."""
    for batch in batches:
        check(signals)
        yield batch


@contextmanager
def collected(signals: list[int]) -> Iterator[None]:
    """Collect Ctrl-C and SIGTERM instead of ending at once; a second one does."""

    def note(number: int, frame: object) -> None:
        signals.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
