"""A record names its commit, survives JSON with figures that JSON cannot hold, and needs neither git nor a GPU."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fusedgpt.bench import record

CPU = torch.device("cpu")


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True)


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() is None, "outside a clone"
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "a file")
    (tmp_path / "results.json").write_text("{}")  # what a run leaves changes nothing that was measured
    clean = record.commit()
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "a.py").write_text("2")
    assert record.commit() == clean + "+"
    monkeypatch.setattr(record.shutil, "which", lambda _: None)
    assert record.commit() is None, "without git"


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    file = tmp_path / "new" / "record.json"
    record.write(file, {**record.machine(CPU), "rows": [{"ms": math.nan, "p": (0.5, math.inf)}]})
    found = json.loads(file.read_text())
    assert found["rows"] == [{"ms": None, "p": [0.5, None]}]
    assert found["versions"]["torch"] == torch.__version__
    assert found.keys() == {"date", "commit", "versions", "rows"}


def test_clocks_are_told_where_a_tool_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.clocks(CPU) is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1980 MHz, 3201 MHz, 500.10 W, 700.00 W, 40\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: object())
    assert record.clocks(torch.device("cuda")) == "SM 1980 MHz, memory 3201 MHz, 500.10 W of 700.00 W, 40 °C"
    tool.write_text("#!/bin/sh\necho no devices; exit 9\n")
    assert record.clocks(torch.device("cuda")) is None
