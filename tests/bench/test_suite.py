"""The measurements beside the step, their commands, and the run of all of them."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedgpt.bench import parts, record, suite
from fusedgpt.bench.__main__ import main
from fusedgpt.bench.step import decode, memory, startup
from fusedgpt.bench.step.memory import allocations
from fusedgpt.bench.step.sizes import Workload
from fusedgpt.bench.table import line
from fusedgpt.gpt.config import ModelConfig

CPU = torch.device("cpu")
WORK = Workload(
    "test", 2, ModelConfig(65, context_length=16, n_layer=2, n_head=2, n_embd=32), CPU, torch.float32
)


# ---- memory


def test_a_cpus_allocations_are_counted_with_temporaries() -> None:
    with allocations(CPU) as found:
        kept = torch.ones(1000)
        torch.ones(5000)
        torch.ones(2000).sum()
    assert 4 * 6000 <= found.peak < 4 * 6100
    assert 4 * 1000 <= found.held < 4 * 1100
    del kept


def test_the_peak_is_at_least_what_a_step_keeps() -> None:
    rows = list(memory.measure(WORK, batches=(1, 4)))
    assert [(row.case[:12], row.side.split()[0]) for row in rows] == [
        (f"test, {batch} x 16", name) for batch in (1, 4) for name in ("fusedgpt", "transformers")
    ]
    for small, large in zip(rows[:2], rows[2:], strict=True):
        assert small.gigabytes < large.gigabytes
    for row in rows[::2]:
        assert row.weights == row.gradients == row.optimizer / 2
        assert row.gigabytes >= row.weights + row.optimizer + row.activations
        assert row.gigabytes < 2 * (4 * row.weights + row.activations)
        assert f"{row.activations:.3f}" in line(memory.COLUMNS, vars(row))


def test_an_implementation_that_runs_out_of_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(memory, "builders", lambda *_: [("huge", build)])
    (row,) = memory.measure(WORK, batches=(1,))
    assert (row.gigabytes, row.note) == (None, "out of memory")
    assert line(memory.COLUMNS, vars(row)).endswith("out of memory")


# ---- start-up


def test_the_order_of_processes_and_their_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(name: str, work: Workload, caches: dict[str, Path]) -> dict[str, float]:
        ran.append(name)
        if "compile" in name:
            raise RuntimeError("failed: no compiler")
        return {"seconds": float(len(ran)), "import_torch": 0.5}

    monkeypatch.setattr(startup, "_run", run)
    ours, theirs, cold, warm = startup.measure(WORK, runs=3)
    assert (ours.seconds, ours.ratio, ours.runs) == (2.0, 1.0, 3)
    assert (theirs.seconds, theirs.ratio) == (5.0, 2.5)
    assert (cold.note, warm.note) == ("failed: no compiler",) * 2
    assert (cold.case, warm.case) == (f"{WORK.case}, cold", f"{WORK.case}, warm")
    assert len(list(startup.measure(WORK, runs=1))) == 3
    assert line(startup.COLUMNS, vars(cold)).endswith("failed: no compiler")


def test_a_fresh_process_reports_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = startup._run("fusedgpt", replace(WORK, size="tiny"), {})
    assert 0 < found["seconds"] < 60
    died = subprocess.CompletedProcess([], 1, "{}", "Traceback\nKeyError: 'nobody'\n")
    monkeypatch.setattr(startup.subprocess, "run", lambda *_, **__: died)
    with pytest.raises(RuntimeError, match="failed: KeyError: 'nobody'"):
        startup._run("nobody", replace(WORK, size="tiny"), {})


# ---- decoding


def test_the_same_text_is_timed_and_another_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = decode.measure(WORK, rows=(2,), rounds=5)
    assert ours.ratio == 1.0
    assert theirs.milliseconds > 0
    assert ours.tokens_per_second == pytest.approx(2e3 / ours.milliseconds)

    own = decode._theirs
    monkeypatch.setattr(decode, "_theirs", lambda m: lambda p, n: [[*row[:-1], 66] for row in own(m)(p, n)])
    _, wrong = decode.measure(WORK, rows=(2,), rounds=1)
    assert wrong.milliseconds is None
    assert line(decode.COLUMNS, vars(wrong)).endswith("not comparable, not timed")


# ---- all of it


PARTS = """
import sys, time
from fusedgpt.bench.parts import Part, part_main
def broken(options):
    print("a word")
    yield {"name": "x", "case": "c", "side": "s", "milliseconds": options["size"] + 0.5, "nan": float("nan")}
    raise ValueError("broken")
def slow(options):
    yield {"kept": True}
    print("asleep", flush=True)
    time.sleep(60)
part_main({"broken": Part(broken, 9), "slow": Part(slow, 9)}, *sys.argv[1:])
"""


def test_each_part_is_kept_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    timers = []

    class Timer:
        """Its time has come when the part says that it sleeps."""

        def __init__(self, seconds: float, function) -> None:
            timers.append(function)

        def start(self) -> None: ...

        cancel = start

    monkeypatch.setattr(parts.threading, "Timer", Timer)
    monkeypatch.setattr(
        parts, "print", lambda text, **_: timers[-1]() if text == "asleep\n" else print(text), raising=False
    )
    seconds = {"broken": 60, "slow": 60, "late": 4}
    found = {"kind": "all"}
    file = tmp_path / "out" / "record.json"
    table = {name: parts.Part(lambda _: iter(()), limit) for name, limit in seconds.items()}
    parts.run_parts("some_parts", table, {"size": 3}, found, file, 1000)
    written = json.loads(file.read_text())
    assert written["rows"][0] == {
        "benchmark": "broken", "name": "x", "case": "c", "side": "s", "milliseconds": 3.5, "nan": None,
    }  # fmt: skip
    assert [row["benchmark"] for row in written["rows"][1:]] == ["slow"]
    errors = {name: status.get("error") for name, status in written["parts"].items()}
    assert errors["broken"] == "ValueError: broken"
    assert errors["slow"] == "stopped after 60 s"
    assert errors["late"].startswith("stopped before it began")
    assert "a word" in capsys.readouterr().out


def test_what_a_part_leaves_running_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving.py").write_text(
        "import subprocess, sys\n"
        "nothing = subprocess.DEVNULL\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "child = subprocess.Popen(command, stdout=nothing, stderr=nothing)\n"
        "open(sys.argv[2], 'w').write(f'{child.pid}')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (child,), _ = parts.run_part("leaving", "name", 60, {})
    state = Path(f"/proc/{child}/stat")
    until = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_parts_of_all_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run_part(module: str, name: str, seconds: float, options: dict) -> tuple[list, dict]:
        ran.append((name, seconds))
        assert module == "fusedgpt.bench.suite"
        assert suite.workload(**options) == suite.workload("tiny", "cpu")
        return [], {"seconds": 1.0}

    monkeypatch.setattr(parts, "run_part", run_part)
    monkeypatch.setattr(record, "draw", lambda found, folder: None)
    assert main(["all", "--device", "cpu", "--out", str(tmp_path / "cpu.json")]) == 0
    assert {name for name, _ in ran} == {"ops", *suite.MEASUREMENTS} - {"bytes"}, "which measures no machine"
    assert suite.ALL_SECONDS < 175
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["parts"].keys() == suite.PARTS.keys()
    assert {"kind", "date", "commit", "versions", "clocks", "rows"} <= written.keys()


def test_a_command_writes_its_record_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(suite.workload.__globals__["SMALL"], "tiny", (WORK.batch, WORK.config))
    out = tmp_path / "breakdown.json"
    argv = ["step", "--breakdown", "--size", "tiny", "--device", "cpu", "--rounds", "2", "--out", str(out)]
    assert main(argv) == 0
    written = json.loads(out.read_text())
    assert {row["benchmark"] for row in written["rows"]} == {"breakdown"}
    assert (tmp_path / "breakdown.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert suite.lines("breakdown", written["rows"])[1] in printed
    assert main([*argv, "--nanogpt", "here"]) == 2
    assert "leave --nanogpt out" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [("step", "--rounds"), ("startup", "--runs"), ("memory", "--batches")])
def test_counts_are_whole_numbers_from_1(flag: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as stop:
            main([*flag, value])
        assert stop.value.code == 2
        assert flag[1] in capsys.readouterr().err


def test_mistakes_end_with_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv, said in (
        (["step", "--size", "tinny"], "did you mean 'tiny'"),
        (["step", "--size", "tiny", "--nanogpt", str(tmp_path)], "--nanogpt takes a clone"),
        (["decode", "--device", "cuda:99"], "cannot be used"),
        (["compare", str(tmp_path / "no.json"), "x"], "no.json"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
