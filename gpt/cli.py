"""The command line: from argv to a command of `commands.py`, and how it ends.

Mistakes of the user end as one line `error: ...` and exit code 2. Nothing heavy is imported before a command runs.
"""

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_type_hints, is_typeddict

import tyro
from tyro.conf import Positional, PositionalMetavarFromFieldName, subcommand

from .. import __version__
from .commands import COMMANDS
from .config import ALIASES, DROPOUT_ALIASES, nearest

DESCRIPTION = """GPT-2 training on fused Triton kernels, and the same in plain PyTorch on any CPU.

    gpt train --preset tales --out runs/tales
    gpt generate runs/tales
    gpt COMMAND --help

With every command, --debug shows where an error came from. `gpt --version` prints the version."""


def parse(argv: Sequence[str]) -> Any:
    """The command that `argv` asks for, ready to be called.

    Raises:
        ValueError: an unknown command or flag; the nearest one is named.
        SystemExit: the help was asked for, or tyro has said what is wrong with a value.
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
    command = COMMANDS[name]
    return tyro.cli(
        command,
        prog=f"gpt {name}",
        description=inspect.getdoc(command),
        args=_known_flags(command, argv[1:], f"gpt {name} --help"),
        config=(PositionalMetavarFromFieldName,),
    )


def _known_flags(command: type, words: Sequence[str], see: str) -> list[str]:
    """The same words with every flag under its own name; ValueError for an unknown flag (a value never begins with --)."""
    names, switches = {"help": "help"}, set()
    for name, kind in _fields(command):
        names |= dict.fromkeys((name, *ALIASES.get(name, ())), name)
        if kind is bool:
            names[f"no_{name}"] = f"no_{name}"
            switches |= {name, f"no_{name}"}
    if "dropout" in names:
        names |= dict.fromkeys(DROPOUT_ALIASES, "dropout")
    result = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            known = names.get(flag[2:].replace("-", "_"))
            if known is None:
                near = get_close_matches(flag, map(_as_flag, names), n=1)
                raise ValueError(
                    f"unknown flag {flag}; {f'did you mean {near[0]}?' if near else f'see {see}'}"
                )
            if equals and known in switches:
                name = known.removeprefix("no_")
                raise ValueError(f"{flag} takes no value: write {_as_flag(name)} or {_as_flag(f'no_{name}')}")
            word = _as_flag(known) + equals + value
        result.append(word)
    return result


def _fields(command: type) -> Iterator[tuple[str, Any]]:
    """Name and type of every flag of a command."""
    for name, kind in get_type_hints(command, include_extras=True).items():
        marks = getattr(kind, "__metadata__", ())
        plain = kind.__origin__ if marks else kind
        if is_typeddict(plain):
            yield from get_type_hints(plain).items()
        elif Positional not in marks:
            yield name, plain


def _as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (by default the process's own) and return the exit code: 2 for a mistake of the user."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = None
        try:
            if words == ["--version"]:
                print(f"fusedgpt {__version__}")
            else:
                code = parse(words)()
        finally:  # here, where a reader that went away does no harm, and not at the interpreter's end
            sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:  # training has said what it saved
        return 130
    except BrokenPipeError:  # whoever read the output has had enough
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
