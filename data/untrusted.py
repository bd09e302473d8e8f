"""What every reader of a file shares: one error, limits on size and depth, schemas, paths that stay in their folder.

A file may be damaged, made by a newer version, or written by somebody who means harm. Whoever reads one reads it through
here, so a reader says only what the file should hold.
"""

import os
import re
import tomllib
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

MAX_JSON = (
    8 << 20
)  # bytes, of which msgspec makes at most 0.2 GB; the largest tokenizer.json of transformers has 5 MB
MAX_TOML = 64 << 10
DOTTED = re.compile(r"(?:\.[ \t]*[\w\"'-]+[ \t]*){50}")  # tomllib takes a minute for a key of 30,000 parts

T = TypeVar("T")


class InputError(ValueError):
    """A file that cannot be used: one line with its path, what is wrong with it, and what to do.

    Args:
        path: of the file or folder; with a place in it where one is known, such as "text.jsonl, line 3".
        what: is wrong with it.
        remedy: what to do.
    """

    def __init__(self, path: str | Path, what: str, remedy: str) -> None:
        self.path, self.what, self.remedy = str(path), what, remedy
        path, remedy = _tail(str(path)), printable(remedy, 110)
        super().__init__(f"{path}: {printable(what, 390 - len(path) - len(remedy))}; {remedy}")


class MissingFile(InputError, FileNotFoundError):
    """There is no such file or folder."""


def printable(text: object, limit: int | None = None, keep: str = "") -> str:
    """Text that is safe to print: what is not printable (control, format and escape characters) becomes an escape.

    Args:
        text: of a model, a file name, or a value out of a file.
        limit: cut what is longer, the last character becomes "…".
        keep: characters that stay as they are, "\\n\\t" where the text has lines.
    """
    text = str(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def _escape(c: str) -> str:
    return c.encode("unicode_escape").decode()


def _tail(path: str) -> str:
    """The end of a long path: the names of the file and its folders tell more than where they are."""
    path = printable(path)
    return path if len(path) <= 120 else "…" + path[-119:]


def open_file(path: Path, remedy: str) -> BufferedReader:
    """Open a regular file to read. A pipe, which might never answer, is refused like a device or a folder.

    Raises:
        MissingFile: there is no such file.
        InputError: it is no file, or it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without it a pipe waits for a writer
        if S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(path, "there is no such file", remedy) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(path, f"it cannot be read ({reason(error)})", remedy) from None
    raise InputError(path, "it is no file", remedy)


def reason(error: Exception) -> str:
    """What an error says, without the number and the file name of an OSError."""
    return getattr(error, "strerror", None) or str(error)


def read_bytes(path: Path, limit: int, remedy: str) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        MissingFile: there is no such file.
        InputError: it cannot be read, or it is larger.
    """
    with open_file(path, remedy) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise InputError(path, f"it cannot be read ({reason(error)})", remedy) from None
    if len(data) > limit:
        raise InputError(path, f"it has more than {limit:,} bytes, which no such file needs", remedy)
    return data


def read_json(path: Path, kind: type[T], remedy: str, limit: int = MAX_JSON) -> T:
    """The content of a JSON file, checked against a type.

    Args:
        path: of the file.
        kind: what msgspec takes: a dataclass, a TypedDict, `dict[str, Any]`, `list[tuple[int, int]]`, ...; keys that it
            does not know are ignored, unless it is a msgspec.Struct that forbids them.
        remedy: what to do where the file cannot be used.
        limit: the most bytes that it may have.

    Raises:
        MissingFile: there is no such file.
        InputError: it cannot be read, is too large or nested too deep, is no JSON, or not of that type.
    """
    return parse_json(read_bytes(path, limit, remedy), kind, path, remedy)


def parse_json(data: bytes | str, kind: type[T], path: str | Path, remedy: str) -> T:
    """JSON text, checked against a type; `path` names where it comes from. Arguments and errors are those of `read_json`."""
    import msgspec  # late: a machine that only measures may lack it

    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise InputError(path, "it is nested too deep", remedy) from None
    except msgspec.ValidationError as error:
        raise InputError(path, str(error), remedy) from None
    except ValueError as error:  # of msgspec, and broken UTF-8
        raise InputError(path, f"it is damaged or no JSON ({error})", remedy) from None


def read_toml(path: Path, remedy: str, limit: int = MAX_TOML) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        MissingFile: there is no such file.
        InputError: it cannot be read, is too large or nested too deep, or is no TOML (the line is named).
    """
    data = read_bytes(path, limit, remedy)
    try:
        text = data.decode("utf-8-sig")
        if DOTTED.search(text):
            raise InputError(path, "it is nested too deep", remedy)
        return tomllib.loads(text)
    except InputError:
        raise
    except RecursionError:
        raise InputError(path, "it is nested too deep", remedy) from None
    except ValueError as error:  # TOMLDecodeError gives line and column, UnicodeDecodeError the position
        raise InputError(path, str(error), remedy) from None


def inside(folder: Path, name: str, origin: Path) -> Path:
    """The file `name` of a folder, where `name` comes from the file `origin`.

    Raises:
        InputError: it leads out of the folder, by `..`, as an absolute path, or through a symbolic link.
    """
    remedy = "do not use files from that source"
    try:
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()):
            return path
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a loop of links
        pass
    raise InputError(origin, f"it names {printable(name, 60)!r}, which is not in its folder", remedy)
