"""A folder in which commands of `gpt` run, as processes that can be killed, and the comparison of what they leave.

The processes are forked from a server that has imported everything (`warm.py`). What is to happen to one is a `Cause`: a
function, called in it before the command, that sets a limit, closes a file or waits for a step (`causes.py`).
"""

import contextlib
import fcntl
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from . import causes, commands

Cause = Callable[[], None]
WALL_CLOCK = (
    "tokens_per_second",
    "seconds_per_step",
    "mfu",
    "memory",
)  # fields of metrics.jsonl that differ between equal runs
PASSING = (".lock", "loss_curve.png")  # of a run folder, not compared
LENGTHS = "lengths.json"  # in the reference: seconds and changes of files of each job
PIPE = 1 << 20  # bytes of output that are kept
SECONDS = 30.0  # for one command, before it counts as hanging


class Failed(AssertionError):
    """A promise that was not kept."""


class Skipped(Exception):
    """What a scenario needs is not here."""


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal that killed it), what it printed, and its seconds."""

    code: int
    output: str
    seconds: float

    def expect(self, *codes: int) -> "Ended":
        if self.code not in codes:
            raise Failed(
                f"exit code {self.code}, not {' or '.join(map(str, codes))}: …{self.output.strip()[-600:]}"
            )
        if "Traceback" in self.output:
            raise Failed(f"a traceback: …{self.output.strip()[-900:]}")
        return self

    def refused(self, *words: str) -> "Ended":
        """Hold it to a refusal: exit code 2 and one line with these words."""
        self.expect(2)
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        if len(errors) != 1 or len(errors[0]) > 420 or self.output.rstrip().splitlines()[-1] != errors[0]:
            raise Failed(f"not one line `error: ...`: {self.output.strip()[-600:]}")
        if missing := [word for word in words if word not in errors[0]]:
            raise Failed(f"does not say {missing[0]!r}: {errors[0]}")
        return self

    def says(self, *words: str) -> "Ended":
        if missing := [word for word in words if word not in self.output]:
            raise Failed(f"does not say {missing[0]!r}: …{self.output.strip()[-600:]}")
        return self


class Child:
    """A running command; what it prints is kept in a pipe, which no limit on files reaches."""

    def __init__(self, process: Any, pipe: int) -> None:
        self.process, self.pipe, self.start = process, pipe, time.monotonic()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Raises Failed where it does not end in time."""
        self.process.join(seconds)
        took = time.monotonic() - self.start
        if hangs := self.process.is_alive():
            self.process.kill()
            self.process.join()
        output = b""
        with open(self.pipe, "rb", buffering=0) as printed:
            while piece := printed.read(PIPE):
                output += piece
        text = output.decode(errors="replace")
        if hangs:
            raise Failed(f"hangs: nothing after {seconds:.0f} s: …{text[-400:]}")
        return Ended(self.process.exitcode, text, took)


class Place:
    """A folder with texts to train on and a cache of its own.

    Args:
        folder: created; it may exist with what earlier commands left.
        reference: where `make_references` has put what is to come out of them.
    """

    def __init__(self, folder: Path, reference: Path) -> None:
        self.folder, self.reference = folder, reference
        self.run = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "texts").exists():
            with contextlib.chdir(folder):
                commands.write_texts()

    def start(self, argv: Sequence[str], *causes: Cause) -> Child:
        log = self.folder.with_name(f"{self.folder.name}.log")  # not inside, where a fault could reach it
        log.unlink(missing_ok=True)
        os.mkfifo(log)
        pipe = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
        process = _server().Process(target=_command, args=(list(argv), self.folder, log, causes))
        process.start()
        return Child(process, pipe)

    def gpt(self, argv: Sequence[str], *causes: Cause) -> Ended:
        return self.start(argv, *causes).wait()

    def take(self, name: str, under: str | None = None) -> None:
        """Copy a result of the reference into the folder."""
        shutil.copytree(self.reference / name, self.folder / (under or name))

    def take_needs(self, job: commands.Job) -> None:
        if job.needs:
            self.take(*job.needs)

    def go_on(self, *causes: Cause) -> Ended:
        """What a supervisor does after any end: continue the run if there is one, else begin it."""
        return self.gpt(commands.RESUME if self.run.exists() else commands.TRAIN, *causes)

    def finish(self) -> Ended:
        """Go on to the last step without any fault; the run must then equal one that had none."""
        ended = self.go_on().expect(0)
        self.require_equal("run")
        return ended

    def require_equal(self, name: str, reference: str | None = None, passing: Sequence[str] = ()) -> None:
        """Raise Failed where a result differs from one of the reference; passing: files that may."""
        if found := list(differences(self.folder / name, self.reference / (reference or name), passing)):
            raise Failed(f"differs from a run without faults: {'; '.join(found[:6])}")


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.warm"])
    # the CPU computes: what is at stake is what is on disk
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
        multiprocessing.forkserver.ensure_running()
    return context


def _command(argv: list[str], folder: Path, log: Path, causes: Sequence[Cause]) -> None:
    """In the child: run a command of `gpt` with its output in a file."""
    descriptor = os.open(log, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    # anew: those of the server may have been files, in which one can seek
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from ...gpt.cli import main
    from ...gpt.train import loop

    loop.plot_runs = (
        _no_picture  # takes as long as the rest of such a run; the scenario of a failed picture puts it back
    )
    for cause in causes:
        cause()
    sys.exit(main(argv))


def _no_picture(runs: Sequence[Path], out: Path | None = None) -> Path:
    return runs[0] / "loss_curve.png"


def make_references(folder: Path) -> Path:
    """Run every command without a fault, into `folder`: what those with faults are compared with, and how long each takes."""
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    unfinished.mkdir()
    lengths = {}
    for job in commands.JOBS:
        with _spare_place(unfinished) as place:
            note = unfinished.with_name("events")
            place.take_needs(job)
            seconds = place.gpt(job.command, functools.partial(causes.count_events, note)).expect(0).seconds
            lengths[job.name] = seconds, int(note.read_text())
            note.unlink()
            (place.folder / job.makes).rename(unfinished / job.reference)
    with _spare_place(unfinished) as place:
        place.gpt(commands.TRAIN, functools.partial(causes.at_step, 8, causes.die)).expect(-9)
        place.run.rename(unfinished / "stopped")  # with checkpoints of steps 3 and 6
    with _spare_place(unfinished) as place:
        place.take("shards")
        place.gpt(commands.SHARDED).expect(0)
        place.run.rename(unfinished / "sharded")
    (unfinished / LENGTHS).write_text(json.dumps(lengths))
    return unfinished.rename(folder)


@contextlib.contextmanager
def _spare_place(reference: Path) -> Iterator[Place]:
    place = Place(reference.with_name("spare"), reference)
    yield place
    shutil.rmtree(place.folder)


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    names = (path.name for path in (run / "checkpoints").glob("step-*")) if run.exists() else ()
    return sorted(int(name.removeprefix("step-")) for name in names)


def differences(found: Path, wanted: Path, passing: Sequence[str] = ()) -> Iterator[str]:
    """How a file or folder differs from another: names and bytes, of metrics.jsonl without wall-clock fields."""
    if not found.is_dir() or not wanted.is_dir():
        if not found.is_file() or not wanted.is_file():
            yield f"{found.name} is missing"
        elif _content(found) != _content(wanted):
            yield f"{found.name} has other content"
        return
    names = [{path.name for path in folder.iterdir()} - {*PASSING, *passing} for folder in (found, wanted)]
    yield from (f"{name} is missing" for name in sorted(names[1] - names[0]))
    # a stopped run has a checkpoint of its last step besides
    left = sorted(name for name in names[0] - names[1] if not name.startswith("step-"))
    yield from (f"{name} is left over" for name in left)
    for name in sorted(names[0] & names[1]):
        yield from differences(found / name, wanted / name, passing)


def _content(file: Path) -> Any:
    """What of a file must be equal."""
    data = file.read_bytes()
    if file.name == "metrics.jsonl":
        records = [json.loads(line) for line in data.splitlines()]
        return [[(key, value) for key, value in r.items() if key not in WALL_CLOCK] for r in records]
    if file.name == "state.json":
        return json.loads(data) | {
            "files": None
        }  # sizes of the logs, in which wall-clock fields have other lengths
    if file.name == "manifest.json":
        found = json.loads(data)
        return found | {"files": {name: of for name, of in found["files"].items() if name != "state.json"}}
    if file.name == "config.toml":  # its comments say where a value came from
        return tomllib.loads(data.decode())
    return data
