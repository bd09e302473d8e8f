"""The user's cache: where it is, what takes its place where there is none, and what is known of files already read.

What the cache loses is made, fetched or computed again.
"""

import atexit
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from .files import make_folder, write_file
from .untrusted import InputError, read_json, reason

SETTLED = 2_000_000_000  # ns after its last change from which a file's times tell a further change

Identity = tuple[str, int, int, int, int, int]
T = TypeVar("T")


def cache_dir() -> Path:
    """`$FUSEDGPT_CACHE`, else `$XDG_CACHE_HOME/fusedgpt`, else `~/.cache/fusedgpt`; a temporary folder where there is no home.

    Safe to delete while nothing runs.
    """
    own, shared = os.environ.get("FUSEDGPT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "fusedgpt"
    except RuntimeError:  # of pathlib: no such user, or one without a home
        return _temporary("there is no home folder for the cache")


def cached(name: str) -> Path:
    """The file or folder of this name in the cache, or where to put it: a cache that cannot be written is still read."""
    path = cache_dir() / name
    return path if os.path.exists(path) else writable_cache() / name


def writable_cache() -> Path:
    """The cache, or a temporary folder that is removed at exit where it cannot be written, with a warning."""
    folder = cache_dir()
    try:
        make_folder(folder)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        why = "Permission denied"
    except OSError as error:
        why = reason(error)
    return _temporary(f"the cache {folder} cannot be written ({why})")


@functools.cache
def _temporary(why: str) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="fusedgpt-cache-"))
    except OSError:
        remedy = "set FUSEDGPT_CACHE to a folder that can be written"
        raise InputError(tempfile.gettempdir(), f"{why}, and neither can this folder", remedy) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with suppress(OSError):
        print(
            f"warning: {why}; {folder} takes its place and is removed at the end. Set FUSEDGPT_CACHE to a folder to keep",
            file=sys.stderr,
        )
    return folder


def identity(path: Path, status: os.stat_result) -> Identity:
    """What differs when the file at `path` has changed: its size, both times, and which file it is."""
    return (
        os.path.abspath(path),
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,  # nobody can set this one
        status.st_ino,
        status.st_dev,
    )


def remembered(kind: type[T], files: Sequence[Identity], scan: Callable[[], T]) -> T:
    """What `scan` finds in these files, kept in the cache until one of them changes.

    It is not kept for files that changed less than two seconds ago: they could change again within the same tick of the clock.

    Args:
        kind: a dataclass, which `scan` returns.
        files: identities of the files, taken before.
        scan: reads them.
    """
    note = cached(f"known/{hashlib.sha256(repr(files).encode()).hexdigest()}.json")
    with suppress(InputError):  # none yet, or damaged
        return read_json(note, kind, "")
    now, found = time.time_ns(), scan()
    if all(max(mtime, ctime) < now - SETTLED for _, _, mtime, ctime, _, _ in files):
        fields: Any = found
        with suppress(OSError):
            make_folder(note.parent)
            write_file(note, json.dumps(asdict(fields)))
    return found
