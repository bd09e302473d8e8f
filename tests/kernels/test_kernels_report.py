"""Every kernel at every tile row compiles cleanly: no spills, no serialized matrix instructions, no row forgotten.

In a subprocess, because what is compiled and what is interpreted cannot share a process. All of sm_90, and the most
used width elsewhere; `make kernels-report` compiles the rest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fusedgpt.bench.gpu.kernels_report import ARCHITECTURES, Row, faults, uncovered

ELSEWHERE = ["sm_80", "sm_100", "gfx942"]


@pytest.mark.parametrize(
    ("architectures", "word"),
    [(["sm_90"], ""), (ELSEWHERE, "C=768"), (ELSEWHERE, "bf16 D=64 dropout")],
)
def test_no_faults(architectures: list[str], word: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "fusedgpt.bench.gpu.kernels_report",
        "--json",
        str(out),
        "--kernel",
        word,
    ]
    command += ["--architecture", *architectures]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["kernels"]
    assert {row["architecture"] for row in rows} == set(architectures)
    assert all(row["registers"] > 15 and row["instructions"] > 50 for row in rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_has_a_case(architecture: str) -> None:
    assert uncovered(architecture) == set()


def test_what_counts_as_a_fault() -> None:
    clean = Row("a case", "a_kernel", "gfx942", 100, 0, 0, 65_536, 500, 10.0, 0, 0, 4, 4, "")
    assert faults(clean) == []
    assert faults(clean._replace(spilled=4)) == ["spills 4 bytes"]
    assert faults(clean._replace(shared=65_537)) == ["takes 65537 bytes of shared memory of 65536"]
    assert faults(clean._replace(programs=5)) == ["5 persistent programs where 4 are resident"]
    assert faults(clean._replace(warnings="wgmma.mma_async instructions are serialized")) == [
        "matrix instructions are serialized"
    ]


def test_refuses_to_run_interpreted() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "fusedgpt.bench.gpu.kernels_report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
