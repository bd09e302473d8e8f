"""Every kernel at every tile row compiles cleanly: no spills, no serialized matrix instructions, no row or kernel forgotten.

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

from fusedgpt.bench.gpu.kernels_report import Row, faults

COMMAND = [sys.executable, "-m", "fusedgpt.bench", "kernels-report"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ELSEWHERE = ["sm_80", "sm_100", "gfx942"]


@pytest.mark.parametrize(
    ("architectures", "word"),
    [(["sm_90"], ""), (ELSEWHERE, "x 768"), (ELSEWHERE, "3 x 64, 1 heads, p = 0.1 bf16")],
)
def test_no_faults(architectures: list[str], word: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [*COMMAND, "--json", str(out), "--kernel", word, "--architecture", *architectures]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["kernels"]
    assert {row["architecture"] for row in rows} == set(architectures)
    assert all(row["registers"] > 15 and row["instructions"] > 50 for row in rows)


SCRIPT = """
from fusedgpt.bench.gpu import launches
from fusedgpt.bench.gpu.kernels_report import launches as of, uncovered
from fusedgpt.kernels import tiles

found = {architecture: of(architecture) for architecture in launches.ARCHITECTURES}
assert not list(uncovered(found)), list(uncovered(found))
for named in found.values():
    assert len({launch.key for launch in named.values()}) == len(named) > 90
# a row and a kernel that nothing launches
tiles.COLUMN_SUM["sm_80"] = (tiles.COLUMN_SUM["any"][0]._replace(warps=16),)
for named in found.values():
    for name in [name for name, launch in named.items() if launch.kernel == "row_sums_kernel"]:
        del named[name]
missing = list(uncovered(found))
assert [line.split(":")[0] for line in missing if "COLUMN_SUM" in line] == ["sm_80 COLUMN_SUM, sm_80"]
assert [line for line in missing if line.endswith("row_sums_kernel: no example launches it")] == missing[-1:]
"""


def test_every_row_of_every_table_and_every_kernel_is_launched_by_an_example() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_counts_as_a_fault() -> None:
    clean = Row("a case", "a_kernel", "gfx942", 100, 0, 0, 65_536, 500, 10.0, 0, 0, 4, 4, 2, 3, 0, "", "")
    assert faults(clean) == []
    assert faults(clean._replace(spilled=4)) == ["spills 4 bytes"]
    assert faults(clean._replace(shared=65_537)) == ["takes 65537 bytes of shared memory of 65536"]
    assert faults(clean._replace(programs=5)) == ["5 persistent programs where 4 are resident"]
    assert faults(clean._replace(exposed=2)) == ["waits at once for 2 of 3 copies of its pipelined loops"]
    assert faults(clean._replace(pipelined=0)) == ["asks for 2 stages, and no loop is pipelined"]
    assert faults(clean._replace(pipelined=0, stages=1)) == []
    assert faults(clean._replace(hazard="MOV overwrites R1")) == ["MOV overwrites R1"]
    assert faults(clean._replace(warnings="wgmma.mma_async instructions are serialized")) == [
        "matrix instructions are serialized"
    ]


def test_refuses_to_run_interpreted() -> None:
    done = subprocess.run(
        COMMAND, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
