"""What can happen to a process, caused in it for real. Each is bound with `partial` and called before the command.

Some happen at once (a limit, a closed output), some when training begins a step or enters a part of the loop.
"""

import fcntl
import math
import os
import pty
import resource
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from ...gpt.train import loop
from ...gpt.train.step import TrainStep
from .events import watch

Action = Callable[[], Any]


# ---- when


def at_step(number: int, action: Action) -> None:
    """Do something when training begins the step after `number`, which is not 0."""
    micro_step, done = TrainStep.micro_step, False

    @wraps(micro_step)
    def replaced(self: TrainStep, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        nonlocal done
        if self.step == number and not done:
            done = True
            action()
        micro_step(self, inputs, targets)

    TrainStep.micro_step = replaced  # type: ignore[method-assign]


def on_entering(part: str, time: int, action: Action) -> None:
    """Do something when the loop calls one of its functions (evaluate, sample, log, save) for the so-many-th time."""
    function, calls = getattr(loop, part), 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == time:
            action()
        return function(*args, **kwargs)

    setattr(loop, part, replaced)


def at_event(number: int, action: Action) -> None:
    """Do something at the so-many-th change of a file in the working folder."""
    count = 0

    def seen(event: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            action()

    watch(Path.cwd(), seen)


def count_events(note: Path) -> None:
    """Write the number of changes of files in the working folder into a file."""
    descriptor, count = os.open(note, os.O_WRONLY | os.O_CREAT), 0

    def seen(event: str) -> None:
        nonlocal count
        count += 1
        os.pwrite(descriptor, str(count).encode(), 0)

    watch(Path.cwd(), seen)


# ---- what


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def receive(*numbers: int) -> None:
    """Get these signals at once, one after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def wait_for(file: Path, note: Path) -> None:
    """Leave a note, and wait until a file is there."""
    note.touch()
    while not file.exists():
        time.sleep(0.01)


def limit_files(size: int) -> None:
    """No file grows beyond so many bytes: a write that would is cut short, the next one fails (Python ignores SIGXFSZ)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_growth(file: Path, more: int) -> None:
    """A file, and every larger one, has room for so many bytes more."""
    limit_files(file.stat().st_size + more)


def lift_limit() -> None:
    limit_files(resource.RLIM_INFINITY)


def limit_memory(more: int) -> None:
    """The process may take so many bytes beyond what it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))


def exhaust_memory() -> None:
    """Take what the process has free, and let it have no more."""
    limit_memory(0)
    kept.extend(_pieces())


kept: list[bytearray] = []


def _pieces() -> Iterator[bytearray]:
    size = 1 << 20
    while size >= 64:
        try:
            yield bytearray(size)
        except MemoryError:
            size //= 2


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def change(file: Path, position: int = -40) -> None:
    """Change two bytes in the middle of a file, at equal size and with the old times."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    data[len(data) // 2] ^= 1
    with file.open("r+b") as changed:
        changed.write(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def become(user: int) -> None:
    """Be another user, as which the working folder can be written."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def become_nameless() -> None:
    """Look up no user: as one that /etc/passwd does not have."""
    import pwd

    def unknown(user: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    pwd.getpwuid = unknown


def set_environment(**values: str) -> None:
    """Set variables; an empty value removes one."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value


def spoil_gradients(first: int, steps: float = math.inf) -> None:
    """Make the gradients of so many steps NaN, those after step `first`."""
    update, spoiled = TrainStep.update, 0

    @wraps(update)
    def replaced(self: TrainStep) -> None:
        nonlocal spoiled
        if self.step >= first and spoiled < steps:
            spoiled += 1
            self.gradients.parts[0].fill_(torch.nan)
        update(self)

    TrainStep.update = replaced  # type: ignore[method-assign]


def fail_pictures() -> None:
    """A picture fails, as on a full disk."""

    def failing(*_: Any) -> Path:
        raise OSError(28, "No space left on device", "loss_curve.png")

    loop.plot_runs = failing  # type: ignore[assignment]


# ---- where the output goes


def print_to(path: str) -> None:
    """Standard output and errors go into this device."""
    descriptor = os.open(path, os.O_WRONLY)
    os.dup2(descriptor, 1)


def close_output() -> None:
    """As `>&-`: no standard output at all."""
    os.close(1)
    sys.stdout = None  # what Python makes of it when it starts


def ascii_output() -> None:
    """As LC_ALL=C without UTF-8 mode."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]
    set_environment(LC_ALL="C", LANG="")


def pipe_to_head() -> None:
    """As `| head -1`: the reader goes after the first line."""
    end, descriptor = os.pipe()
    if os.fork() == 0:
        os.close(descriptor)
        while b"\n" not in os.read(end, 1 << 16):
            pass
        os._exit(0)
    os.close(end)
    os.dup2(descriptor, 1)
    os.close(descriptor)


def terminal(columns: int) -> None:
    """Output goes to a terminal of so many columns, whose other end a process reads."""
    other, descriptor = pty.openpty()
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("4H", 5, columns, 0, 0))
    if os.fork() == 0:
        os.close(descriptor)
        try:
            while os.read(other, 1 << 16):
                pass
        finally:
            os._exit(0)
    os.close(other)
    for standard in (0, 1):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    set_environment(TERM="xterm", COLUMNS="", LINES="")


def terminal_that_closes() -> None:
    """Output goes to a terminal whose other end is closed at step 5: each further print fails."""
    other, descriptor = pty.openpty()
    os.dup2(descriptor, 1)
    os.close(descriptor)
    at_step(5, partial(os.close, other))
