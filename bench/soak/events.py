"""The file-system events of a process: what opens, makes, renames, removes and flushes files, seen as it happens."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# of Python's audit events: where the path stands among the arguments, and a descriptor of the folder it is relative to
CHANGES = {
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.mkdir": (0, 2),
    "os.truncate": (0, None),
}


def watch(folder: Path, seen: Callable[[str], None]) -> None:
    """Call `seen` with the event's name before every change in `folder`, and after every flush of a file there.

    In a forked process of its own: an audit hook cannot be taken back.
    """
    root, inside = str(folder.resolve()), threading.local()

    def notice(event: str, path: Any, base: Any) -> None:
        if getattr(inside, "busy", False):  # what `seen` does itself
            return
        inside.busy = True
        try:
            if _absolute(path, base).startswith(root):
                seen(event)
        finally:
            inside.busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and len(arguments) == 3 and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                notice(event, arguments[0], None)
        elif event in CHANGES:
            path, base = CHANGES[event]
            notice(event, arguments[path], None if base is None else arguments[base])

    flush = os.fsync

    def flushed(file: Any) -> None:
        flush(file)
        notice("flush", file, None)

    os.fsync = flushed  # type: ignore[assignment]  # no audit event tells of it
    sys.addaudithook(hook)


def _absolute(path: Any, base: Any) -> str:
    if hasattr(path, "fileno"):
        path = path.fileno()
    try:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        folder = os.readlink(f"/proc/self/fd/{base}") if isinstance(base, int) and base >= 0 else os.getcwd()
    except OSError:
        return ""
    return os.path.join(folder, os.fsdecode(path))
