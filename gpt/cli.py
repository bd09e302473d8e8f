"""The command line: from argv to a command of `commands.py`, and how it ends.

Mistakes of the user end as one line `error: ...` and exit code 2. Nothing heavy is imported before a command runs.
"""

import inspect
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Union, get_type_hints

import tyro
from tyro.conf import Fixed, Positional, PositionalMetavarFromFieldName, subcommand

from .. import __version__
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
        ValueError: an unknown command or flag; the nearest one is named.
        SystemExit: help was requested, or tyro has reported a wrong value.
    """
    name = argv[0] if argv else "--help"
    if name.startswith("-"):
        commands = tuple(
            Annotated[kind, subcommand(name, description=(kind.__doc__ or "").partition("\n")[0])]
            for name, kind in COMMANDS.items()
        )
        return tyro.cli(Union[commands], prog="gpt", description=DESCRIPTION, args=[name])  # type: ignore[call-overload]  # noqa: UP007
    if name not in COMMANDS:
        there = f"; there are {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name!r}{nearest(name, COMMANDS) or there}")
    command, words = COMMANDS[name], argv[1:]
    given = _given(command, words, f"gpt {name} --help")
    settings: dict[str, Any] = {"prog": f"gpt {name}", "config": (PositionalMetavarFromFieldName,)}
    default = None
    if command is Train:
        sources = [word for word in words if word not in ("-h", "--help")]
        default = tyro.cli(Sources, args=sources, return_unknown_args=True, **settings)[0].train()
    result = tyro.cli(command, args=words, default=default, description=inspect.getdoc(command), **settings)
    return partial(result, given) if command is Train else result


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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, RuntimeError) as error:
        if debug:
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print(f"error: {text}", file=sys.stderr)
        return 2
