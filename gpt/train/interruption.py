"""How training ends early: an error that names the remedy, or a signal.

A signal may come at any moment, so two kinds of code are told apart. Forward, backward, evaluation and sampling change nothing
that is kept: a signal ends them at once. Updates, records and checkpoints are finished first.
"""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports the tokenizers, which a machine that only measures may lack
    from ...data.windows import Batch


class TrainingError(RuntimeError):
    """Training cannot go on: what happened, at which step, and what to do."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended training.

    Args:
        number: of the signal; the exit code is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP (a closed terminal) while a run is open: a context manager around it.

    The first one ends what runs `at_once`; all else goes on, and asks with `check`. Further ones change nothing, so
    what is written after the first, such as a checkpoint, is finished. One that was ignored before stays so, as under nohup.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._received.append(number)
        if self._at_once:
            self._at_once = False
            self.check()

    def check(self) -> None:
        """Raise Interrupted where a signal has come."""
        if self._received:
            raise Interrupted(self._received[0])

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that a signal ends where it is, between two operators: what it computes is thrown away then."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False
        self.check()  # it was lost in a callback whose exceptions Python ignores


def until(signals: Signals, batches: "Iterable[Batch]") -> "Iterator[Batch]":
    """The batches; Interrupted instead of the next one once there is a signal."""
    for batch in batches:
        signals.check()
        yield batch
