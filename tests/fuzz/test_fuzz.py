"""Mutated files and command lines: 20,000 of them here, the rest in `python -m fusedgpt.bench soak --only fuzz`; and that the
fuzzer finds each kind of mistake."""

import hashlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusedgpt.bench.soak import fuzz, judge
from fusedgpt.bench.soak.targets import TARGETS, Target
from fusedgpt.data.untrusted import InputError

INPUTS, PARTS = 20_000, 4
# what is wrong in the cache is found out anew, and where it is in a checkpoint the one before is used
TOLERANT = ("verdicts", "cached-", "run-state", "run-manifest", "resume-manifest", "resume-state")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with fuzz.made_world() as folder:
        yield folder


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_inputs_are_taken_or_refused_in_one_line(place: Path, part: int) -> None:
    report = fuzz.try_inputs(place, INPUTS // PARTS, part, processes=1)
    assert report.inputs == INPUTS // PARTS
    assert not report.failures, "\n".join(report.lines())
    refusing = {target.name for target in TARGETS if not target.name.startswith(TOLERANT)}
    assert {name for name in refusing if not report.counts[name]["refused"]} == set()


# ---- what the fuzzer must find: a mistake, and what it is called


def refuse(text: str) -> Callable[[], None]:
    def call() -> None:
        raise ValueError(text)

    return call


def leave(name: str, then: Callable[[], object] = lambda: None) -> Callable[[], object]:
    def call() -> object:
        Path(name).write_text("x")
        return then()

    return call


def fill() -> None:
    bytearray(b"x") * (judge.MEMORY + (50 << 20))


def hang() -> None:
    while True:
        pass


def turn() -> None:
    Path("tiny.jsonl").write_bytes(Path("tiny.jsonl").read_bytes()[::-1])


PLANTED: dict[str, tuple[Callable[[], object], str]] = {
    "key": (lambda: {}["x"], "KeyError"),
    "foreign": (lambda: int("x"), "ValueError"),
    "decode": (lambda: b"\xff".decode(), "UnicodeDecodeError"),
    "deep": (lambda: [eval("[" * 99 + "]" * 99), (lambda f: f(f))(lambda f: f(f))], "RecursionError"),
    "hang": (hang, "over 1 s"),
    "memory": (fill, "over 300 MB"),
    "bomb": (lambda: bytearray(1 << 40), "MemoryError"),
    "dies": (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died: SIGKILL"),
    "exits": (lambda: os._exit(0), "the process died: exit code 0"),
    "code": (lambda: 1, "exit code 1 without an error line"),
    "silent": (lambda: 2, "exit code 2 without an error line"),
    "lines": (refuse("tiny.txt: two\nlines; mend it"), "a message of several lines"),
    "escape": (refuse("tiny.txt: \x1b[31mred; mend it"), "a message with control characters"),
    "long": (refuse(f"tiny.txt: {'x' * 400}; mend it"), "a message of more than 400 characters"),
    "nameless": (refuse("it is damaged; mend it"), "a message that does not name the file"),
    "helpless": (refuse("tiny.txt is damaged"), "a message without a remedy"),
    "overwrites": (leave("tiny-bpe.json"), "written: world/tiny-bpe.json"),
    "equal size": (turn, "written: world/tiny.jsonl"),
    "outside": (leave("../outside/new"), "written: outside/new"),
    "refused late": (leave("new", refuse("tiny.txt: no; mend it")), "refused, but written: world/new"),
    "prints": (lambda: print("\x1b[31m"), "control characters on stdout"),
    "warns": (lambda: print("\x1b[31m", file=sys.stderr), "control characters on stderr"),
}  # fmt: skip
RIGHT: dict[str, tuple[Callable[[], object], str]] = {
    "value": (lambda: 3.5, "accepted"),
    "written": (leave("own"), "accepted"),
    "note": (leave("cache/note"), "accepted"),
    "refused": (refuse("tiny.txt: no text; give it some"), "refused"),
}


def test_each_kind_of_mistake_is_found_and_nothing_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "SECONDS", 1.0)
    monkeypatch.setattr(judge, "ROOT", Path(__file__).parent)  # as if these functions were the program's
    calls = PLANTED | RIGHT
    targets = [
        Target(name, 1, "tiny.txt", "text", call, writes=("own",)) for name, (call, _) in calls.items()
    ]
    report = fuzz.try_inputs(place, len(targets), 0, 1, targets=targets)
    found = {failure.first.partition(":")[0]: failure.what for failure in report.failures.values()}
    assert {name: what for name, (_, what) in PLANTED.items() if what not in found.pop(name, "nothing")} == {}
    assert found == {}
    assert {name: report.counts[name] for name in RIGHT} == {
        name: Counter([outcome]) for name, (_, outcome) in RIGHT.items()
    }


def test_a_call_that_waits_for_ever_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BLOCKED", 2.0)
    targets = [Target("waits", 1, "tiny.txt", "text", lambda: time.sleep(600))]
    report = fuzz.try_inputs(place, 1, 0, 1, targets=targets)
    assert list(report.failures) == ["blocked for 2 s"]


def test_an_input_comes_again_from_its_number(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "ROOT", Path(__file__).parent)

    def call() -> None:
        data = Path("tiny.txt").read_bytes() if Path("tiny.txt").is_file() else b""
        raise InputError("tiny.txt", hashlib.sha256(data).hexdigest(), "mend it")

    target = Target("txt", 1, "tiny.txt", "text", call)
    again = [fuzz.try_again(place, f"txt:{number}", [target]) for number in (7, 7, 8)]
    assert again[0].startswith("refused")
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("which", ["", "txt", "txt:x", "no-such:3"])
def test_replay_names_what_it_takes(which: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TARGET:NUMBER"):
        fuzz.try_again(tmp_path, which)
