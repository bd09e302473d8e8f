"""`make gpu` as far as a machine without a GPU can show: its parts stand alone, and what they find is judged and kept."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedgpt.bench import gpu
from fusedgpt.kernels.backend import TRITON_OPERATORS
from fusedgpt.kernels.selfcheck import parity

FINE = {"seconds": 1.0, "rows": [{"operator": "dropout", "ok": True}]}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu, "versions", lambda device: {"device": "A GPU (80 GB)", "torch": "2"})


def test_it_needs_no_tyro_and_says_that_there_is_no_gpu() -> None:
    code = """
import sys
sys.modules["tyro"] = None
import torch
torch.cuda.is_available = lambda: False
from fusedgpt.bench.__main__ import main
sys.exit(main(["gpu"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: this needs a GPU: ")


@pytest.mark.parametrize("operator", sorted(TRITON_OPERATORS))
def test_every_operator_has_a_full_size(operator: str) -> None:
    for example in gpu.full_size(operator, 3).values():
        error, allowed = parity(example, torch.device("cpu"), torch.float32)
        assert error <= allowed


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ({}, 0),
        ({"parity": {"seconds": 1, "rows": [{"operator": "layer_norm", "ok": False}]}}, 1),
        ({"tests": {"seconds": 1, "rows": [], "error": "ImportError: x"}}, 1),
        ({"sanitizer": {"seconds": 1, "rows": [{"left out": "not installed"}]}}, 0),
        ({"tests": {"seconds": 1, "rows": [{"test": "a", "ok": True}], "error": "stopped after 90 s"}}, 0),
        ({"step": {"seconds": 1, "rows": [], "error": "RuntimeError: a peer"}}, 0),
    ],
)
def test_the_exit_code_the_table_and_the_record(
    parts: dict, code: int, a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    ran = []

    def run_part(name: str, seconds: int) -> dict:
        ran.append(name)
        return parts.get(name, FINE if gpu.PARTS[name].judges else {"seconds": 1, "rows": []})

    monkeypatch.setattr(gpu, "run_part", run_part)
    assert gpu.run_gpu(tmp_path / "results") == code
    assert ran == list(gpu.PARTS)
    (file,) = (tmp_path / "results").iterdir()
    record = json.loads(file.read_text())
    assert file.name == f"a-gpu-80-gb-{record['date']}.json"
    assert record["parts"].keys() == gpu.PARTS.keys()
    printed = capsys.readouterr().out
    for part in parts.values():
        for row in part["rows"]:
            assert row.get("ok") is not False or "WRONG" in printed
            assert row.get("left out", "") in printed
        assert part.get("error", "") in printed


def test_all_parts_together_stay_below_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 460


PART = """
import sys, time
from fusedgpt.bench import gpu

def rows():
    yield {"ok": True, "error": float("nan")}
    print("a word")
    %s

gpu.PARTS["parity"] = gpu.Part(rows, 5, True)
gpu.main(*sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("ending", "seconds", "error"),
    [
        ("yield {'ok': True}", 60, None),
        ("raise ValueError('broken')", 60, "ValueError: broken"),
        ("time.sleep(60)", 0, "stopped after"),
    ],
)
def test_what_a_part_found_is_kept_however_it_ends(
    ending: str, seconds: int, error: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "part.py"
    script.write_text(PART % ending)
    popen = subprocess.Popen

    def start(command: list[str], **options) -> subprocess.Popen:
        process = popen([sys.executable, str(script), *command[3:]], **options)
        if not seconds:  # stopped once the first row is there
            rows = Path(command[-1])
            while not (rows.exists() and rows.read_text()):
                pass
        return process

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    result = gpu.run_part("parity", seconds)
    assert result["rows"][0] == {"ok": True, "error": None}
    assert len(result["rows"]) == (1 if error else 2)
    assert result.get("error", "").startswith(error or "")
    assert ("error" in result) == bool(error)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("ran 3 operators\n========= ERROR SUMMARY: 0 errors\n", {"ok": True, "message": "0 found"}),
        ("ran 3 operators\n========= ERROR SUMMARY: 12 errors\n", {"ok": False, "message": "12 found"}),
        ("ran 3 operators\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", {"ok": True, "message": "0 found"}),
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
    rows = {row["test"]: row for row in gpu.run_tests()}
    assert rows.keys() == {"test_right", "test_wrong", "test_skipped"}
    assert (rows["test_right"]["ok"], rows["test_wrong"]["ok"]) == (True, False)
    assert "assert 1 == 2" in rows["test_wrong"]["message"]
    assert rows["test_skipped"]["left out"] == "no room"


def test_without_the_sanitizer_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    assert list(gpu.sanitize()) == [{"left out": "compute-sanitizer is not installed"}]


def test_the_part_of_the_operators_and_its_lines(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def measure(device: torch.device, most: gpu.ops.Ceilings, **options) -> Iterator[gpu.ops.Row]:
        asked.update(options)
        for side, milliseconds in (("fusedgpt", 0.1), ("slow", 0.3), ("fast", 0.05)):
            yield gpu.ops.Row(
                "layer_norm",
                "M 8, both",
                side,
                gpu.ops.BOTH,
                milliseconds=milliseconds,
                ratio=milliseconds / 0.1,
                share=0.9,
            )
        yield gpu.ops.Row("dropout", "M 8", "all sides", note="left out: 80 s were over")

    monkeypatch.setattr(gpu.ops, "measure", measure)
    monkeypatch.setattr(gpu.ops, "ceilings", lambda device: gpu.ops.Ceilings(4e12, 7e14))
    rows = list(gpu.time_operators())
    assert asked["seconds"] < gpu.PARTS["operators"].seconds, "it stops by itself before it is stopped"
    assert rows[0] == {"ceilings": {"copy": 4e12, "matmul": 7e14}, "clocks": None}
    part = {"seconds": 1, "rows": json.loads(json.dumps(rows))}
    lines = list(gpu.summary({"versions": {}, "commit": None, "parts": {"operators": part}}))
    assert lines[-1].startswith("layer_norm M 8, both")
    assert lines[-1].endswith("0.100 ms, 90% of the limit; best peer fast takes 0.50 of that")
    assert lines[-2].endswith("dropout M 8, all sides: left out: 80 s were over")


def test_out_in_the_environment(a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "run_part", lambda name, seconds: {"seconds": 1, "rows": []})
    assert gpu.run_gpu() == 0
    assert len(os.listdir(tmp_path)) == 1
