"""Output that may fail without ending a run: a closed pipe, a full disk behind stdout, a terminal that knows only ASCII."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class Output:
    """Standard output as it is now, which never raises. Once it cannot be written, stderr says so and nothing more is written.

    Characters that its encoding lacks are written as escapes. It is no io.TextIOBase, whose finalizer flushes.
    """

    def __init__(self) -> None:
        # kept: on a terminal rich puts an object into sys.stdout that writes here
        self.stream: TextIO = sys.stdout or io.StringIO()
        self.lost = sys.stdout is None

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self.lost and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def write(self, text: str) -> int:
        if not self.lost:
            with self._watched():
                self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        if not self.lost:
            with self._watched():
                self.stream.flush()

    def close(self) -> None:
        """Nothing: the stream stays open, and is no longer flushed when this object is freed."""

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            self.lost = True
            # what is still in its buffer would fail again at the interpreter's exit
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)
            warn(f"stdout cannot be written ({getattr(error, 'strerror', None) or error}): no more output")


def warn(text: str) -> None:
    """Print a warning on stderr, if that works."""
    with suppress(OSError, ValueError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Optional:
    """What a run can do without, such as a picture: an error in it is said once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """A block whose error is passed over with a warning.

        Args:
            what: it does, as the subject of the warning.
        """
        try:
            yield
        except Exception as error:
            if what not in self._said:
                self._said.add(what)
                reason = (str(error).strip().splitlines() or [""])[0]
                warn(f"{what} failed and is left out: {type(error).__name__}: {reason}")
