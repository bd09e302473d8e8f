"""A call of the program watched, and the judgement of what it did: what an input from outside may lead to, and nothing else."""

import contextlib
import dis
import io
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ... import __file__ as package
from ...data.untrusted import InputError

SECONDS = 5.0  # of processor time
MEMORY = 300 << 20  # bytes
LINE = 400  # characters of a message
# what a terminal obeys: control characters but line break and tab, surrogates, and what turns the direction of text
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ROOT = Path(package).parent


@dataclass
class Result:
    """What came of an input: "accepted", "refused" or "failed"; what failed; and how, in many lines."""

    outcome: str
    what: str = ""
    detail: str = ""


class Hang(BaseException):
    """The time is over."""


def limit_time() -> None:
    """Let a `Call` of this process end with `Hang` after `SECONDS` of processor time."""
    signal.signal(signal.SIGPROF, _over)


def _over(number: int, frame: object) -> None:
    raise Hang


@contextlib.contextmanager
def quiet() -> Iterator[tuple["Output", "Output"]]:
    """Standard output and error, collected."""
    out, err = Output(), Output()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


class Output(io.StringIO):
    """Collected text, and the exception that was being handled when the last of it was written."""

    error: BaseException | None = None

    def write(self, text: str) -> int:
        if text.strip():
            self.error = sys.exc_info()[1]
        return super().write(text)


class Call:
    """A call, and what it did: exit code or exception, output, memory."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self.code: object = None
        memory, (_, most) = status("VmRSS"), resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        with quiet() as (out, err):
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
                resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 3 * MEMORY, most))
                try:
                    self.code = function()
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            except SystemExit as error:
                self.code = error.code
            except BaseException as error:
                self.error = error
        signal.setitimer(signal.ITIMER_PROF, 0)  # again: it may have run out just before
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        self.memory = status("VmHWM") - memory
        self.out, self.err = out.getvalue(), err.getvalue()
        self.line = isinstance(self.code, int)  # the command line
        if self.code == 2:
            self.error = err.error


def status(key: str) -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(key.encode()):
                return int(line.split()[1]) << 10
    return 0


def judge(call: Call, names: Sequence[str], changed: Sequence[str], writes: Sequence[str]) -> Result:
    """Accepted: it changed only its own output. Refused: it changed nothing, and an error of this package says in one line
    of at most 400 printable characters which file it is and what to do. Anything else has failed.

    Args:
        call: has ended.
        names: of the file and the folders that it is in, one of which the message has to name; empty: none.
        changed: the names of all files that the call has created, changed or removed.
        writes: beginnings of names that it may write, whether it succeeds or not.
    """
    faults = []
    refused = call.error is not None or (call.line and call.code != 0)
    if call.memory > MEMORY:
        faults.append("over 300 MB")
    elif isinstance(call.error, Hang):
        faults.append(f"over {SECONDS:.0f} s {_where(call.error)}")
    elif (
        call.error is not None
        and not _own(call.error)
        and not (call.line and not names and _of_system(call.error))
    ):
        faults.append(f"{type(call.error).__name__} {_where(call.error)}")
    if refused and not faults:
        if call.line:
            text = call.err.removeprefix(call.err[: call.err.rfind("error: ")]).removesuffix("\n")
            if call.code != 2 or not text.startswith("error: "):
                faults.append(f"exit code {call.code} without an error line")
            text = text.removeprefix("error: ")
        else:
            text = str(call.error)
        at = _where(call.error) if call.error else ""
        if "\n" in text:
            faults.append(f"a message of several lines {at}")
        elif not text.isprintable():
            faults.append(f"a message with control characters {at}")
        if len(text) > LINE:
            faults.append(f"a message of more than {LINE} characters {at}")
        if names and not any(name in text for name in names):
            faults.append(f"a message that does not name the file {at}")
        if (
            names
            and not isinstance(call.error, InputError)
            and not any(mark in text for mark in ("; ", ". ", ", or "))
        ):
            faults.append(f"a message without a remedy {at}")
    if over := sorted(
        name for name in changed if not name.startswith(tuple(writes)) and not name.endswith("/.lock")
    ):
        faults.append(f"{'refused, but ' if refused else ''}written: {_general(over[0])}")
    for name, output in (("stdout", call.out), ("stderr", call.err)):
        if CONTROL.search(output):
            faults.append(f"control characters on {name}")
    outcome = "failed" if faults else "refused" if refused else "accepted"
    return Result(outcome, "; ".join(faults), _detail(call, changed))


def _general(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else "a name with control characters"


def _own(error: BaseException) -> bool:
    """Whether a `raise` of this package raised it, as an error for the user."""
    if not isinstance(error, ValueError | OSError | RuntimeError) or isinstance(
        error, UnicodeError | RecursionError
    ):
        return False
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None or not _ours(trace):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _of_system(error: BaseException) -> bool:
    """Whether the system has refused a file whose name was on the command line; the message says which and why."""
    return isinstance(error, OSError) and error.filename is not None and error.strerror is not None


def _ours(trace: TracebackType) -> bool:
    return (
        Path(trace.tb_frame.f_code.co_filename).is_relative_to(ROOT)
        and "soak" not in trace.tb_frame.f_code.co_filename
    )


def _where(error: BaseException) -> str:
    """The innermost line of this package that it came through."""
    place, trace = "", error.__traceback__
    while trace:
        if _ours(trace):
            place = f"at {Path(trace.tb_frame.f_code.co_filename).relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _detail(call: Call, changed: Sequence[str]) -> str:
    error = "".join(traceback.format_exception(call.error)) if call.error else ""
    parts = (
        error,
        call.out[-2_000:],
        call.err[-2_000:],
        f"changed: {', '.join(map(repr, changed)) or 'nothing'}",
    )
    return "\n".join(part for part in parts if part)
