"""Durable writes: a file or folder is on disk whole or not at all, after a crash and after a power cut too.

What is written gets a temporary name, is flushed, and is renamed last; then the folder is flushed, which makes the rename
itself durable. Every OSError names its file.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .untrusted import InputError


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an OSError that names no file the name of this one: those of a full disk come from `write`, which knows none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def in_place(name: str, flags: int) -> int:
    """An opener for `open` of a file that is written in place: in the folder of a stranger a link can lead to any file.

    Raises:
        InputError: there is a symbolic link, a pipe or a device of that name.
    """
    remedy = "remove it, or put the file itself there"
    try:
        # opening a pipe without O_NONBLOCK would wait for a reader
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(name, "it is a symbolic link", remedy) from None
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise InputError(name, "it is no regular file", remedy) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(name, "it is no regular file", remedy)
    return descriptor


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    with named(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path: Path) -> None:
    """Create a folder and those above it that do not exist, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write, which takes the place of `path` when the block ends.

    Where the block raises, `path` is as before and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path), open(temporary, "wb", opener=in_place) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_file(path: Path, data: bytes | str) -> None:
    """Write a small file durably, in place of what is there; text as UTF-8."""
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder under a temporary name, which becomes `path` when the block ends, all its files flushed.

    `path` may be an empty folder, and its parents are created. Where the block raises, it is as before and nothing else is left.

    Raises:
        OSError: `path` is a file or holds something, or a file cannot be written.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a process that was killed may have had the same id
    temporary.mkdir()
    try:
        with named(path):
            yield temporary
        for folder, _, files in os.walk(temporary):
            for name in (*files, "."):
                flush(Path(folder, name))
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it never stands half removed under its own name."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class AppendedFile:
    """A file that grows by whole records, each forced to disk; a record that cannot be written leaves nothing of itself.

    Args:
        path: created where it does not exist.

    Raises:
        InputError: it is no regular file: a pipe would take records until its reader is gone.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with named(path):
            self._file = open(path, "ab", buffering=0, opener=in_place)  # noqa: SIM115
        flush(path.parent)

    def cut(self, size: int) -> None:
        """Remove what follows the first `size` bytes."""
        if size < self.size:
            with named(self.path):
                self._file.truncate(size)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self._file.fileno()).st_size

    def append(self, record: bytes | str) -> None:
        """Add a record; text as UTF-8.

        Raises:
            OSError: it cannot be written, or the file is no longer at its path; it is as before.
        """
        self.require_in_place()
        data = memoryview(record.encode() if isinstance(record, str) else record)
        before = self.size
        with named(self.path):
            try:
                while data:  # a write may take a part only
                    data = data[self._file.write(data) or 0 :]
                os.fsync(self._file.fileno())
            except BaseException:
                with suppress(OSError):
                    self._file.truncate(before)
                raise

    def require_in_place(self) -> None:
        """Raise OSError if the file has been removed or moved, or another one is in its place."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                return
        raise FileNotFoundError(errno.ENOENT, "removed or moved while it was written", str(self.path))

    def close(self) -> None:
        self._file.close()
