"""The command line: from argv to a command of `commands.py`, and how it ends.

Mistakes of the user end as one line `error: ...` and exit code 2, one of this program with its place and exit code 1. Nothing
heavy is imported before a command runs.
"""

import inspect
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TextIO, Union, get_type_hints

import tyro
from tyro.conf import Fixed, Positional, PositionalMetavarFromFieldName, subcommand

from .. import __version__
from ..data.untrusted import printable
from .commands import COMMANDS, Sources, Train
from .config import nearest

DESCRIPTION = """GPT-2 training on fused Triton kernels, and the same in plain PyTorch on any CPU.

    gpt train --preset tales --out runs/tales
    gpt generate runs/tales
    gpt COMMAND --help

With every command, --debug shows where an error came from. `gpt --version` prints the version."""


def parse(argv: Sequence[str]) -> Any:
    """Parse `argv` into a command, ready to be called.

    Raises:
        ValueError: an unknown command or flag, the nearest one is named; a wrong value.
        SystemExit: help was requested.
    """
    for word in argv:
        try:
            os.fsencode(word)
        except UnicodeEncodeError:  # no shell passes it, but a caller of `main` may
            raise ValueError(f"{word[:50]!r} holds half of a surrogate pair; write it in UTF-8") from None
    name = argv[0] if argv else "--help"
    if name.startswith("-"):
        commands = tuple(
            Annotated[kind, subcommand(name, description=(kind.__doc__ or "").partition("\n")[0])]
            for name, kind in COMMANDS.items()
        )
        return _tyro(Union[commands], prog="gpt", description=DESCRIPTION, args=[name])  # noqa: UP007
    if name not in COMMANDS:
        there = f"; there are {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name[:50]!r}{nearest(name, COMMANDS) or there}")
    command, words = COMMANDS[name], argv[1:]
    given = _given(command, words, f"gpt {name} --help")
    settings: dict[str, Any] = {"prog": f"gpt {name}", "config": (PositionalMetavarFromFieldName,)}
    default = None
    if command is Train:
        sources = [word for word in words if word not in ("-h", "--help")]
        default = _tyro(Sources, args=sources, return_unknown_args=True, **settings)[0].train()
    result = _tyro(command, args=words, default=default, description=inspect.getdoc(command), **settings)
    return partial(result, given) if command is Train else result


def _tyro(kind: Any, prog: str, **settings: Any) -> Any:
    """`tyro.cli`, with ValueError for a wrong value in place of a box of several lines on stderr."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(kind, prog=prog, **settings)
    except SystemExit as stop:
        if not stop.code:  # help
            raise
        drawn = r"\x1b\[[0-9;]*m|[╭╮╰╯│─]|-{5,}"
        rows = filter(None, (re.sub(drawn, "", row).strip() for row in box.getvalue().splitlines()))
        said = list(takewhile(lambda row: " helptext" not in row, rows))[1:]  # the first is a title
        raise ValueError(f"{printable(' '.join(said), 300)}; see {prog} --help") from None


def _given(command: type, words: Sequence[str], see: str) -> set[str]:
    """Fields of `command` whose flags are in `words`. ValueError for an unknown flag; a value never begins with --."""
    flags = {"--help": "help"} | {flag: name for name, _, names in _fields(command) for flag in names}
    switches = {flag for _, kind, names in _fields(command) if kind is bool for flag in names}
    given = set()
    for word in words:
        flag, equals, _ = word.partition("=")
        if not flag.startswith("--"):
            continue
        flag = flag.replace("_", "-")
        if flag not in flags:
            near = get_close_matches(flag[2:], [known[2:] for known in flags], n=1)
            hint = f"did you mean --{near[0]}?" if near else f"see {see}"
            raise ValueError(f"unknown flag {word.partition('=')[0]}; {hint}")
        if equals and flag in switches:
            on = flag.replace("--no-", "--", 1)
            raise ValueError(f"{flag} takes no value: write {on} or --no-{on[2:]}")
        given.add(flags[flag])
    return given


def _fields(command: Any) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Name, type and flags of every field that is set by flags."""
    for name, kind in get_type_hints(command, include_extras=True).items():
        plain, *marks = (kind.__origin__, *kind.__metadata__) if hasattr(kind, "__metadata__") else (kind,)
        if is_dataclass(plain):
            yield from _fields(plain)
        elif Positional not in marks and Fixed not in marks:
            others = [flag for mark in marks for flag in getattr(mark, "aliases", None) or ()]
            names = [f"--{name.replace('_', '-')}", *others]
            if plain is bool:
                names += [f"--no-{flag[2:]}" for flag in names]
            yield name, plain, tuple(names)


# How often a thread of libgomp, torch's OpenMP, looks for work before it sleeps; its own default is 300,000. Speed of a step
# of `make train` over the default's, on two cores, alone and beside ten busy processes (two measurements, which differ much):
# 1,000: 0.95; 3,000: 0.99 to 1.02, 2 and 17; 5,000: 1.02, 1.5 and 13; 10,000: 1.00, 7; OMP_WAIT_POLICY=passive: 0.68, 20.
SPINS = "3000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (by default the process's own) and return the exit code: 2 for a mistake of the user."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # libgomp reads it when torch is imported
    _mend_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if debug:
        logging.basicConfig()
        logging.getLogger(__package__.partition(".")[0]).setLevel(logging.DEBUG)
    try:
        code = None
        try:
            if words == ["--version"]:
                print(f"fusedgpt {__version__}")
            else:
                code = parse(words)()
        finally:  # here, where a closed pipe is handled below, and not at the interpreter's exit
            sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt as error:  # training has reported what it saved
        return 128 + getattr(error, "number", signal.SIGINT)
    except BrokenPipeError:  # the reader of the output has closed it
        _discard(sys.stdout)
        return 141
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if debug:
            raise
        _report(_described(error))
        return 2
    except Exception as error:
        if debug:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        _report(
            f"this is a bug of fusedgpt, please report it with what --debug shows: {type(error).__name__} in "
            f"{Path(place.filename).name}, line {place.lineno}: {error}"
        )
        return 1


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{printable(error.filename)[-200:]}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory {error}"
    return str(error) or type(error).__name__


def _report(text: str) -> None:
    """Print an error as one line of at most 400 characters."""
    with suppress(OSError):
        print(f"error: {printable(' '.join(text.split()), 390)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # it is full or closed; Python would report it once more at its exit
            _discard(stream)


def _mend_streams() -> None:
    """Let no print fail for a character that the terminal lacks or a stream that is closed."""
    for descriptor in (0, 1, 2):  # a file opened later must not take the number of a closed one
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
