"""How a command ends: exit codes, one line for an error, and streams that are closed, full or without Unicode."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusedgpt.gpt.cli import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)


def ended(argv: list[str]) -> int | str | None:
    """The exit code of `gpt argv...`, run in this process."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in which `gpt` is this checkout's."""
    gpt = f"{shlex.quote(sys.executable)} -m fusedgpt.gpt"
    line = command.replace("gpt ", f"{gpt} ", 1)
    dropped = (
        "PYTHONUNBUFFERED",
        "GOMP_SPINCOUNT",
        "OMP_WAIT_POLICY",
    )  # main sets the second in this process, too
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("where", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(where: int) -> None:
    argv = ["train", "--preset", "smal"]
    argv.insert(where, "--debug")
    with pytest.raises(ValueError, match="unknown preset 'smal'"):
        main(argv)


@pytest.mark.parametrize(("flags", "shown"), [([], ""), (["--debug"], "DEBUG:fusedgpt.some:seen\n")])
def test_debug_shows_what_is_logged(flags: list[str], shown: str) -> None:
    program = (
        "import logging, sys; from fusedgpt.gpt.cli import main; main(sys.argv[1:]); "
        "logging.getLogger('fusedgpt.some').debug('seen'); logging.getLogger('other').debug('not ours')"
    )
    command = [sys.executable, "-c", program, "--version", *flags]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == shown


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (ValueError("it is so"), 2, "error: it is so\n"),
        (RuntimeError("out of memory"), 2, "error: out of memory\n"),
        (FileNotFoundError("no run; make one"), 2, "error: no run; make one\n"),
        (PermissionError(13, "Permission denied", "mine"), 2, "error: mine: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_end_quietly(
    error: BaseException, code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "fusedgpt.gpt.evaluate", SimpleNamespace(evaluate_run=fail))
    assert ended(["evaluate", "runs/tiny"]) == code
    assert capsys.readouterr().err == shown
    if code == 2:
        with pytest.raises(type(error)):
            main(["evaluate", "runs/tiny", "--debug"])


def test_a_programming_error_names_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fusedgpt.gpt.evaluate", SimpleNamespace(evaluate_run=lambda: None))
    assert ended(["evaluate", "runs/tiny"]) == 1
    shown = capsys.readouterr().err
    assert re.fullmatch(
        r"error: this is a bug .*--debug shows: TypeError in commands\.py, line \d+: .*\n", shown
    )
    with pytest.raises(TypeError):
        main(["evaluate", "runs/tiny", "--debug"])


def test_a_process_ends_with_a_code_and_one_line() -> None:
    done = shell("gpt train --resume runs/none")
    assert done.returncode == 2
    assert re.fullmatch(r"error: runs/none .*\n", done.stderr)
    done = shell("gpt train --resume runs/none --debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "FileNotFoundError: runs/none" in done.stderr


@pytest.mark.parametrize(
    "command", ["train --help", "--version", "tokenizer train text.txt --kind char --out made.json"]
)
def test_a_reader_that_leaves_early_is_no_error(command: str) -> None:
    done = shell(f"(gpt {command}; echo $? >&2) | true")
    assert done.stderr == "141\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("command", "code"), [("--version", 0), ("train --preset smal", 2)])
def test_a_closed_stream_is_no_traceback(command: str, code: int, closed: str) -> None:
    done = shell(f"(gpt {command} {closed}); echo $?")
    assert done.stdout.splitlines()[-1] == str(code)
    assert "Traceback" not in done.stderr


def test_a_file_does_not_take_the_number_of_a_closed_stream() -> None:
    """What a library in C prints would go into it."""
    program = (
        "import os; from fusedgpt.gpt.cli import main; main(['--version']); os._exit(os.open('made', 65))"
    )
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- >&- 2>&-; echo $?"
    assert int(subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120).stdout) > 2


@pytest.mark.parametrize("full", [">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"])
def test_a_full_stream_is_no_traceback(full: str) -> None:
    done = shell(f"(gpt train --help {full}); echo $?")
    assert done.stdout.splitlines()[-1] == ("0" if full == "2>/dev/full" else "2")
    assert done.stderr == ("error: [Errno 28] No space left on device\n" if full == ">/dev/full" else "")


def test_a_terminal_without_the_letters_gets_escapes() -> None:
    done = shell("PYTHONIOENCODING=ascii LC_ALL=C gpt generate runs/é🙂")
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/\\xe9\\U0001f642 is not a run")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("two\nlines \x1b[31mred\x1b]0;owned\x07"), "two lines \\x1b[31mred\\x1b]0;owned\\x07"),
        (RuntimeError("x" * 5000), "x" * 300),
        (MemoryError(), "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth"),
        (ImportError("No module named 'x'"), "No module named 'x'"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_is_one_short_line_without_escape_sequences(
    error: Exception, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "fusedgpt.gpt.evaluate", SimpleNamespace(evaluate_run=fail))
    assert ended(["evaluate", "runs/tiny"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {shown}")
    assert len(line) <= 400
    assert line[:-1].isprintable()


def test_control_c_during_imports_is_quiet() -> None:
    """The signal comes while an import waits, before `main` and in a command."""
    program = (
        "import os, signal, sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == sys.argv[-1]:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from fusedgpt.gpt.__main__ import start\n"
        "start()\n"
    )
    for module in ("tyro", "fusedgpt.gpt.doctor"):
        command = [sys.executable, "-c", program.replace("sys.argv[-1]", repr(module)), "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (130, ""), module
