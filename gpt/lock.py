"""One process at a time trains in a run folder: a lock that the system releases when its owner ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.files import no_link
from ..data.untrusted import InputError, printable


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, `.lock`; the file stays and says who held it last.

    Raises:
        InputError: another process holds it.
        OSError: the file cannot be written, or the file system has no locks.
    """
    with open(run / ".lock", "a+", encoding="utf-8", errors="replace", opener=no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = printable(file.read(100).strip(), 60) or "another process"
            raise InputError(
                run, f"{holder} is training in it", "wait for it or stop it, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
