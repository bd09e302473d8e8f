"""Mutated files and command lines, and what the program may do with them: take them, or refuse them in one line of its own.

Forked workers call the readers in one process each, thousands of times. An input is known by its target and a number, from
which everything about it is drawn. What counts as a failure is in `judge`.
"""

import contextlib
import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from ...data import corpus
from ...data.untrusted import printable
from ...gpt.cli import main
from .judge import Call, Result, judge, limit_time, quiet
from .mutate import WORDS, mutate, mutate_words
from .targets import TARGETS, Target, make_world, warm

BLOCKED = 60.0  # seconds for one input, after which a worker is killed
LONG_AGO = 1_600_000_000  # seconds since 1970
SCHEDULE = [target for target in TARGETS for _ in range(target.weight)]


@dataclass
class Failure:
    """What went wrong, how often, and the first input that shows it, as --replay takes it."""

    what: str
    inputs: int
    first: str


@dataclass
class FuzzReport:
    """Inputs of every target by their outcome ("accepted", "refused", "failed"), and the failures by what they are."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts.values())

    def add(self, target: str, number: int, outcome: str, what: str) -> None:
        self.counts.setdefault(target, Counter())[outcome] += 1
        if what:
            self.failures.setdefault(what, Failure(what, 0, f"{target}:{number}")).inputs += 1

    def lines(self) -> Iterator[str]:
        """A table, then a line a failure."""
        yield f"{'target':<24}{'inputs':>8}{'accepted':>10}{'refused':>10}{'failed':>8}"
        for target, counts in sorted(self.counts.items()):
            cells = (sum(counts.values()), counts["accepted"], counts["refused"], counts["failed"])
            yield "{:<24}{:>8,}{:>10,}{:>10,}{:>8,}".format(target, *cells)
        for failure in sorted(self.failures.values(), key=lambda failure: -failure.inputs):
            yield f"{failure.inputs:>7,}  {failure.what}  (--replay {failure.first})"


def run(
    inputs: int,
    seed: int,
    processes: int,
    progress: Callable[[int], object] = lambda done: None,
    targets: Sequence[Target] = SCHEDULE,
) -> FuzzReport:
    """Try inputs in a world of their own. Arguments are those of `try_inputs`."""
    with made_world() as place:
        return try_inputs(place, inputs, seed, processes, progress, targets)


def try_inputs(
    place: Path,
    inputs: int,
    seed: int,
    processes: int,
    progress: Callable[[int], object] = lambda done: None,
    targets: Sequence[Target] = SCHEDULE,
) -> FuzzReport:
    """Try inputs number seed · 10⁹, seed · 10⁹ + 1, ... on the targets in turn.

    Args:
        place: of `made_world`.
        inputs: how many.
        seed: of them.
        processes: workers.
        progress: called with the number of inputs done, now and then.
        targets: one for each number; the list starts over at its end.
    """
    report, first, done = FuzzReport(), seed * 10**9, 0
    shares = [list(range(first + i, first + inputs, processes)) for i in range(processes)]
    workers = [_Worker(place, share, targets) for share in shares]
    while workers:
        wait([worker.connection for worker in workers], 1.0)
        for i, worker in enumerate(workers):
            for number, outcome, what in worker.results():
                report.add(targets[number % len(targets)].name, number, outcome, what)
                done += 1
            if worker.ended and worker.left:
                workers[i] = _Worker(place, worker.left, targets)
        workers = [worker for worker in workers if not worker.ended]
        progress(done)
    return report


def replay(which: str) -> str:
    """Try one input again in a world of its own. Argument and result are those of `try_again`."""
    with made_world() as place:
        return try_again(place, which)


def try_again(place: Path, which: str, targets: Sequence[Target] = TARGETS) -> str:
    """What comes of the input `which`, TARGET:NUMBER, with the traceback and the output."""
    name, _, number = which.rpartition(":")
    target = next((target for target in targets if target.name == name), None)
    if target is None or not number.isdecimal():
        raise ValueError(f"--replay {which}: it takes TARGET:NUMBER, as the table of failures shows it")
    worker = _Worker(place, [int(number)], [target], details=True)
    while not (found := list(worker.results())):
        wait([worker.connection])
    worker.process.join()
    _, outcome, what = found[0]
    return f"{outcome} {what}"


# ---- workers

_FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def made_world() -> Iterator[Path]:
    """A folder, in memory where there is such, with the files of the world in its folder `pristine`."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401  # once, not in every worker

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as name:
        place = Path(name)
        process = _FORK.Process(target=_make_pristine, args=(place / "pristine",))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError("the files to mutate could not be made; the message is above")
        yield place


def _make_pristine(folder: Path) -> None:
    _surroundings(folder)
    with quiet() as (out, err):
        try:
            make_world(folder / "world")
        except BaseException:
            print(out.getvalue() + err.getvalue(), file=sys.__stderr__)
            raise


def _surroundings(folder: Path) -> None:
    """The environment of everything that runs in a copy of the world: its own cache and home, no network, one thread."""
    os.environ["FUSEDGPT_CACHE"] = str(folder / "world/cache")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder / "world/cache/tiktoken")
    os.environ["HOME"] = str(folder / "home")
    os.environ["COLUMNS"] = "200"
    for name in ("http_proxy", "https_proxy"):
        os.environ[name] = "http://127.0.0.1:9"
    corpus.TALES_TRAIN, corpus.TALES_VAL = 20, 5  # a mutation may ask for them; 20,000 take 3 s
    gc.collect = lambda generation=2: 0  # 0.5 s in every run that is trained, for all that is imported here
    torch.set_num_threads(1)


class _Worker:
    """A process that tries inputs in order and sends what came of each."""

    def __init__(
        self, place: Path, numbers: list[int], targets: Sequence[Target], details: bool = False
    ) -> None:
        self.left = numbers
        self.connection, child = _FORK.Pipe(duplex=False)
        folder = Path(tempfile.mkdtemp(dir=place))
        arguments = (place / "pristine", folder, numbers, targets, child, details)
        self.process = _FORK.Process(target=_work, args=arguments)
        self.process.start()
        child.close()
        self.heard = time.monotonic()
        self.ended = False

    @property
    def blocked(self) -> bool:
        return time.monotonic() - self.heard > BLOCKED

    def results(self) -> Iterator[tuple[int, str, str]]:
        """What has come since the last call; for a process that died, that it did, at the input that it was at."""
        dead = ""
        if self.blocked:
            self.process.kill()
            dead = f"blocked for {BLOCKED:.0f} s"
        with contextlib.suppress(EOFError):
            while self.connection.poll():
                result = self.connection.recv()
                self.heard = time.monotonic()
                self.left = self.left[1:]
                yield result
            if not dead:
                return
        self.process.join()
        self.ended = True
        if self.left:
            number, *self.left = self.left
            yield number, "failed", dead or f"the process died: {_cause(self.process.exitcode)}"


def _cause(code: int | None) -> str:
    return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _work(
    pristine: Path,
    folder: Path,
    numbers: list[int],
    targets: Sequence[Target],
    out: Connection,
    details: bool,
) -> None:
    with quiet():
        world = _World(pristine, folder / "copy")
        for number in numbers:
            result = world.attempt(targets[number % len(targets)], number)
            out.send((number, result.outcome, f"{result.what}\n{result.detail}" if details else result.what))


# ---- one input


_Scan = dict[str, tuple[int, int] | str]


class _World:
    """A copy of the world, which every attempt leaves as it was."""

    def __init__(self, pristine: Path, folder: Path) -> None:
        _surroundings(folder)
        self.root = folder
        shutil.copytree(pristine, folder)
        os.chdir(folder / "world")
        self._settle()
        ctypes.CDLL(None).mallopt(
            -8, 1
        )  # M_ARENA_MAX: one more for each thread takes address space of which there is a limit
        limit_time()

    def attempt(self, target: Target, number: int) -> Result:
        """Mutate the target's file, or its command line; call; judge; put everything back."""
        draw = random.Random(f"{target.name}:{number}")
        before, names, damaged = self.files, Path().parts, None
        if target.words:
            words = mutate_words(target.words, draw)
            target = replace(target, call=lambda: main(words))
        else:
            found = sorted(
                name
                for path in Path().glob(target.file)
                if (name := f"world/{path}") in self.bytes and path.suffix != ".png"
            )
            if not found:  # this state of the program writes no such file
                return Result("accepted")
            name = draw.choice(found)
            names = Path(name).parts[1:]
            before, damaged = self._mutate(name, target.form, draw)
        call = Call(target.call)
        if names[-1:] and names[-1].endswith(
            ".toml"
        ):  # the flag of a setting, or a file that it names, says as much
            names += ("--", printable(getattr(call.error, "path", "--")))
        after = self._scan()
        own = ["world/cache", *(f"world/{name}" for name in target.writes if name and not call.error)]
        if "" in target.writes and not call.error:
            own += [name for name in after if name not in before and name.startswith("world/")]
        result = judge(call, names, _differences(before, after), own)
        if damaged and call.code == damaged:
            result = Result("failed", "a damaged file of a checkpoint was used", result.detail)
        self._restore(after)
        if target.name.startswith("cached"):
            self._settle()
        return result

    def _settle(self) -> None:
        """Fill the cache with notes, which hold for these very files, and take what is here now for what shall stay."""
        shutil.rmtree(self.root / "world/cache/known", ignore_errors=True)  # of files that were mutated
        warm()
        for path in self.root.rglob("*"):
            if path.is_file():
                os.utime(path, (LONG_AGO, LONG_AGO))
        self.files = self._scan()
        self.bytes = {
            name: (self.root / name).read_bytes() for name, kept in self.files.items() if kept != "/"
        }

    def _mutate(self, name: str, form: str, draw: random.Random) -> tuple[_Scan, str | None]:
        """Change a file, or what stands in its place.

        Returns:
            What `_scan` would now, and the name of the checkpoint that must not be used any more.
        """
        path, data, others = self.root / name, self.bytes[name], list(self.bytes.values())
        form = _FORMS.get(path.suffix, "bytes") if form == "any" else form
        data = mutate(data, form, draw, others)
        kind = draw.randrange(100)
        if kind < 4:
            path.unlink()
        if kind == 1:
            path.mkdir()
        elif kind == 2:
            path.symlink_to(self.root / "outside/other.safetensors")
        elif kind == 3:
            word = draw.choice(
                [word for word in WORDS if "/" not in word and "\0" not in word and word != "\ud800"]
            )
            path = path.with_name(f"{word[:80]}{path.name}")
        written = []
        if kind > 2:
            path.write_bytes(data)
            written.append(path)
        if kind > 3 and draw.random() < 0.7:
            written += _seal(path)
        for one in written:
            os.utime(one, (LONG_AGO, LONG_AGO + draw.randrange(10**6)))
        touched = {name, *(str(one.relative_to(self.root)) for one in written)}
        changed = {one: self._see(one) for one in touched}
        damaged = path.name != "manifest.json" and len(written) == 1 and data != self.bytes[name]
        scan = {one: seen for one, seen in {**self.files, **changed}.items() if seen}
        return scan, path.parent.name if damaged else None

    def _see(self, name: str) -> tuple[int, int] | str:
        """The size and time of a file, "/" for a folder, where a link leads, "" for nothing.

        Files that nobody has written are from long ago, so a time tells more than a clock's resolution would.
        """
        path = self.root / name
        if path.is_symlink():
            return f"link to {os.readlink(path)}"
        if path.is_dir():
            return "/"
        return (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ""

    def _scan(self) -> _Scan:
        """Everything in the folder, as `_see` sees it."""
        found: _Scan = {}
        waiting = [str(self.root)]
        skip = len(waiting[0]) + 1
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    name = entry.path[skip:]
                    if entry.is_file(follow_symlinks=False):
                        stat = entry.stat()
                        found[name] = (stat.st_size, stat.st_mtime_ns)
                    else:
                        found[name] = self._see(name)
                    if found[name] == "/":
                        waiting.append(entry.path)
        return found

    def _restore(self, now: _Scan) -> None:
        wrong = sorted(_differences(self.files, now))
        for name in reversed(wrong):  # what is in a folder comes before it
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for name in wrong:
            path = self.root / name
            if self.files.get(name) == "/":
                path.mkdir(exist_ok=True)
            elif name in self.files:
                path.write_bytes(self.bytes[name])
                os.utime(path, (LONG_AGO, LONG_AGO))


def _seal(file: Path) -> list[Path]:
    """Let the manifest beside a file of a checkpoint agree with it, as somebody who means harm would; returns the manifest."""
    manifest = file.with_name("manifest.json")
    if file == manifest or not manifest.exists():
        return []
    content, data = json.loads(manifest.read_bytes()), file.read_bytes()
    content["files"][file.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.write_text(json.dumps(content))
    return [manifest]


_FORMS = {
    **{".json": "json", ".jsonl": "jsonl", ".toml": "toml", ".txt": "text", ".bpe": "text", ".bin": "shard"},
    **{".safetensors": "safetensors", ".parquet": "parquet"},
}


def _differences(before: _Scan, after: _Scan) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]
