"""`make gpu` as far as a machine without a GPU can show: its parts stand alone, and what they find is judged and kept."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fusedgpt.bench import parts, table
from fusedgpt.bench.gpu import run as gpu
from fusedgpt.bench.step import step
from fusedgpt.bench.step.sizes import workload
from fusedgpt.kernels import examples
from fusedgpt.kernels._triton import INTERPRETED
from fusedgpt.kernels.examples import SMALL, Example, Parity, draw, full_size, parity, results
from fusedgpt.kernels.tiles import Hardware

FINE = [{"operator": "dropout", "ok": True}]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu, "workload", lambda device_name: workload("tiny", "cpu"))
    monkeypatch.setattr(gpu.suite, "record_name", lambda device: "a-gpu.json")


def test_it_needs_torch_alone_and_says_that_there_is_no_gpu() -> None:
    code = """
import sys
for name in ("tyro", "rich", "matplotlib", "tiktoken", "regex", "safetensors", "transformers"):
    sys.modules[name] = None
import torch
torch.cuda.is_available = lambda: False
from fusedgpt.bench.__main__ import main
sys.exit(main(["gpu"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: this needs a GPU: ")


@pytest.mark.parametrize("operator", SMALL)
def test_every_operator_has_a_full_size(operator: str) -> None:
    sizes = [e for e in full_size(3, "cpu", torch.float32) if e.operator == operator]
    assert sizes
    assert all(parity(example, "cpu", torch.float32).ok for example in sizes)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter takes CPU tensors")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_kernels_take_every_full_size(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed: what the triton backend refuses, it refuses before a launch."""
    from triton.runtime.interpreter import InterpretedFunction

    def forward_and_backward(example: Example, device: torch.device, dtype: torch.dtype) -> Parity:
        results(example, draw(example, device, dtype))
        return Parity(0.0, 1.0)

    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu, "parity", forward_and_backward)
    rows = list(gpu.check_parity({"rows": 3, "dtypes": [dtype]}))
    assert {row["operator"] for row in rows} == set(SMALL)
    assert [row for row in rows if not row["ok"]] == []


def test_attention_is_compared_in_one_pass_where_there_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "INTERPRETED", False)
    monkeypatch.setattr(examples, "hardware", lambda _: Hardware("sm_90", 132))

    def in_one_pass(dtype: torch.dtype) -> list[str]:
        return [example.size for example in full_size(3, "cuda", dtype) if example.one_pass]

    assert len(in_one_pass(torch.bfloat16)) == len(in_one_pass(torch.float16)) == 4
    assert in_one_pass(torch.float32) == []
    assert examples.small("cuda", torch.bfloat16)[-1] is examples.ONE_PASS
    monkeypatch.setattr(examples, "hardware", lambda _: Hardware("sm_80", 108))
    assert in_one_pass(torch.bfloat16) == []
    assert examples.small("cuda", torch.bfloat16) == [*SMALL.values()]


@pytest.mark.parametrize(
    ("device", "dtype", "right"),
    [("cuda", torch.float32, True), ("cpu", torch.float32, False), ("cuda", torch.bfloat16, False)],
)
def test_what_a_gpu_approximates_may_be_off_by_two_units_more(
    device: str, dtype: torch.dtype, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.ones(1, dtype=torch.float64)
    computed = iter([(one + 2 * torch.finfo(dtype).eps).to(dtype), one.to(dtype), one])
    monkeypatch.setattr(examples, "draw", lambda *_, **__: {})
    monkeypatch.setattr(examples, "results", lambda *_, **__: [next(computed)])
    assert parity(SMALL["dropout"], device, dtype).ok == right


@pytest.mark.parametrize(
    ("part", "rows", "error", "code"),
    [
        ("parity", FINE, None, 0),
        ("parity", [{"operator": "layer_norm", "ok": False}], None, 1),
        ("tests", [], "ImportError: x", 1),
        ("sanitizer", [{"left out": "not installed"}], None, 0),
        ("tests", [{"test": "a", "ok": True}], "stopped after 90 s", 0),
        ("step", [], "RuntimeError: a peer", 0),
        ("tiles", [{"row": "Tile(...)"}], None, 0),
    ],
)
def test_the_exit_code_the_table_and_the_record(
    part: str,
    rows: list[dict],
    error: str | None,
    code: int,
    a_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran, caches = [], set()

    def run_part(module: str, name: str, seconds: float, options: dict) -> tuple[list, dict]:
        ran.append(name)
        caches.add((os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"]))
        assert seconds <= gpu.PARTS[name].seconds
        status = {"seconds": 1.0} | ({"error": error} if error and name == part else {})
        return (rows if name == part else FINE if gpu.PARTS[name].judges else []), status

    monkeypatch.setattr(parts, "run_part", run_part)
    assert gpu.run_gpu(tmp_path / "results") == code
    assert ran == list(gpu.PARTS)
    assert len(caches) == 1, "what one part compiles the next need not"
    record = json.loads((tmp_path / "results" / "a-gpu.json").read_text())
    assert record["parts"].keys() == gpu.PARTS.keys()
    printed = capsys.readouterr().out
    for row in rows:
        assert row.get("ok") is not False or "WRONG" in printed
        assert row.get("left out", "") in printed
        assert row.get("row", "") in printed
    assert (error or "") in printed


def test_all_parts_together_stay_below_eight_minutes() -> None:
    assert gpu.SECONDS <= 470
    judging = [part.seconds for part in gpu.PARTS.values() if part.judges]
    assert sum(judging) < gpu.SECONDS / 2


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("ran 3 examples\n========= ERROR SUMMARY: 0 errors\n", {"ok": True, "message": "0 found"}),
        ("ran 3 examples\n========= ERROR SUMMARY: 12 errors\n", {"ok": False, "message": "12 found"}),
        ("ran 3 examples\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", {"ok": True, "message": "0 found"}),
        ("========= Device not supported\n", {"left out": "Device not supported"}),
        ("Traceback\nValueError: x\n========= ERROR SUMMARY: 0 errors\n", {"ok": False, "message": "Traceback ValueError: x ERROR SUMMARY: 0 errors"}),
    ],
)  # fmt: skip
def test_what_the_sanitizer_said(text: str, verdict: dict) -> None:
    assert gpu.sanitizer_verdict(text) == verdict


def test_the_tests_of_a_gpu_are_run_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "kernels").mkdir()
    (tmp_path / "tests" / "kernels" / "test_integration.py").write_text("def test_right(): pass\n")
    (tmp_path / "tests" / "gpu" / "test_some.py").write_text(
        "import pytest\ndef test_wrong(): assert 1 == 2\ndef test_full_size(): pass\n"
        "@pytest.mark.skip(reason='no room')\ndef test_skipped(): pass\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    rows = {row["test"]: row for row in gpu.run_tests({"seconds": 60})}
    assert rows.keys() == {"test_right", "test_wrong", "test_skipped"}
    assert (rows["test_right"]["ok"], rows["test_wrong"]["ok"]) == (True, False)
    assert "assert 1 == 2" in rows["test_wrong"]["message"]
    assert rows["test_skipped"]["left out"] == "no room"


def test_tests_that_have_no_time_are_left_out_and_the_others_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "kernels").mkdir()
    (tmp_path / "tests" / "kernels" / "test_integration.py").write_text("def test_late(): pass\n")
    (tmp_path / "tests" / "gpu" / "test_some.py").write_text(
        "import time, pytest\ndef test_right(): pass\n"
        "@pytest.mark.parametrize('x', ['a/b::c'])\ndef test_slow(x): time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    right, *late = gpu.run_tests({"seconds": 10})
    assert (right["test"], right["ok"]) == ("test_right", True)
    assert late == [
        {"test": name, "left out": "the time was over"} for name in ("test_slow[a/b::c]", "test_late")
    ]


def test_the_compiling_processes_check_every_operator_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def output(command: list[str], seconds: float) -> str | None:
        if "--collect-only" in command:
            return "\n".join(
                ["tests/gpu/test_a.py::test_more_than_2_to_31_elements", *names, "9 tests collected"]
            )
        commands.append(command)
        return None if command[-1] == names[0] else "printed"

    names = ["tests/gpu/test_a.py::test_a", "tests/gpu/test_a.py::test_b"]
    monkeypatch.setattr(gpu, "_output", output)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    *rows, a, b = gpu.compile_kernels({"seconds": 60})
    assert {tuple(command[-1:]) for command in commands[-2:]} == {(names[0],), (names[1],)}
    assert (a["left out"], "left out" in b) == ("not compiled in time", False)
    assert len(rows) == len(commands) - 2 == len(SMALL) * len(gpu.DTYPES)
    monkeypatch.setattr(gpu, "require_gpu", lambda: torch.device("cpu"))
    asked = [json.loads(command[-1]) for command in commands if command[-2] == os.devnull]
    (wanted,) = [o for o in asked if o["operators"] == ["dropout"] and o["dtypes"] == ["float32"]]

    def small(rows: int, device: torch.device, dtype: torch.dtype) -> list[Example]:
        return [example for example in SMALL.values() if rows == 4096]

    monkeypatch.setattr(gpu, "full_size", small)
    (found,) = gpu.check_parity(wanted)
    assert (found["operator"], found["shape"], found["dtype"], found["ok"]) == (
        "dropout",
        SMALL["dropout"].size,
        "float32",
        True,
    )


def test_a_time_that_is_over_names_what_was_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda: torch.device("cpu"))
    rows = list(gpu.check_parity({"seconds": -1, "rows": 3, "operators": ["dropout"], "dtypes": ["float32"]}))
    expected = {
        "operator": "dropout",
        "shape": "3 x 768",
        "dtype": "float32",
        "left out": "the time was over",
    }
    assert rows == [expected]
    found = {"versions": {}, "commit": "x", "clocks": [], "parts": {"parity": {"seconds": 1}}}
    lines = list(gpu.summary(found | {"rows": [{"benchmark": "parity", **row} for row in rows * 2]}))
    assert "    left out, the time was over: dropout 3 x 768 float32; dropout 3 x 768 float32" in lines


def test_a_command_that_takes_too_long_is_stopped() -> None:
    began = time.monotonic()
    assert gpu._output([sys.executable, "-c", "import time; time.sleep(60)"], 1.0) is None
    assert time.monotonic() - began < 30
    assert gpu._output([sys.executable, "-c", "print(1)"], 0.0) is None
    assert gpu._output([sys.executable, "-c", "import os; print(os.environ['A'])"], 30.0, A="b") == "b\n"


def test_memcheck_judges_and_racecheck_informs(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: dict[str, list[str]] = {}

    def output(command: list[str], seconds: float, **variables: str) -> str:
        assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        assert seconds > 50
        commands[command[2]] = command
        summary = {
            "memcheck": "ERROR SUMMARY: 2 errors",
            "racecheck": "RACECHECK SUMMARY: 3 hazards displayed",
        }
        return f"ran 9 examples\n========= {summary[command[2]]}\n"

    monkeypatch.setattr(gpu, "_output", output)
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: "compute-sanitizer")
    rows = list(gpu.sanitize({"seconds": 70}))
    assert rows == [
        {"check": "memcheck", "ok": False, "message": "2 found"},
        {"check": "racecheck", "message": "3 found"},
    ]
    assert "--report-api-errors no" in " ".join(commands["memcheck"])
    assert "--racecheck-detect-level error" in " ".join(commands["racecheck"])
    found = {"versions": {}, "commit": "x", "clocks": [], "parts": {"sanitizer": {"seconds": 1}}}
    found["rows"] = [{"benchmark": "sanitizer", **row} for row in rows]
    assert "    racecheck: 3 found" in list(gpu.summary(found))
    found["rows"] = found["rows"][1:]
    assert not gpu.wrong("sanitizer", found)
    monkeypatch.setattr(gpu, "_output", lambda *_, **__: None)
    assert all(row["left out"] == "the time was over" for row in gpu.sanitize({"seconds": 70}))


def test_without_the_sanitizer_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    assert list(gpu.sanitize({})) == [{"left out": "compute-sanitizer is not installed"}]


def test_out_in_the_environment(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(parts, "run_part", lambda *_: ([], {"seconds": 1.0}))
    assert gpu.run_gpu() == 0
    assert len(os.listdir(tmp_path)) == 1


def test_the_measurements_are_shown_as_their_commands_show_them(capsys: pytest.CaptureFixture[str]) -> None:
    row = step.Row("step", "tiny", "fusedgpt", 12.5, 1000.0, 1.0, 0.25, 1.5, 4.2)
    found = {"versions": {}, "commit": "x", "clocks": [None], "parts": {"step": {"seconds": 1}}}
    lines = list(gpu.summary(found | {"rows": [{"benchmark": "step", **asdict(row)}]}))
    assert lines[-1] == table.line(step.COLUMNS, asdict(row))


def test_the_sweep_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.tile_sweep, "run_tiles", lambda seconds: [f"Tile({seconds:g})"])
    assert list(gpu.sweep_tiles({"seconds": 100})) == [{"row": "Tile(60)"}]
