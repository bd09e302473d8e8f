"""Programs that stand for a grid, beside the whole grid."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fusedgpt
from fusedgpt.bench.counts.measure import evenly

# In a process of its own: in this one kernels are interpreted.
SCRIPT = """
import json
from dataclasses import asdict
from unittest import mock
from fusedgpt.bench.counts import measure, work
from fusedgpt.bench.counts.sass import executions
from fusedgpt.bench.emulator.ptx import parse
from fusedgpt.kernels import examples

CASES = [
    measure.Case(examples.causal_attention(1, 256, 12, 64), {"B": 1, "T": 256, "H": 12, "D": 64}),
    measure.Case(examples.causal_attention(1, 256, 1, 64), {"B": 1, "T": 256, "H": 1, "D": 64}),
    measure.Case(examples.layer_norm(3072, 256), {"M": 3072, "C": 256}),
    measure.Case(examples.gelu_mlp(3072, 256), {"M": 3072, "C": 256}),
]
measure.MULTIPROCESSORS["sm_90"] = 4  # few, so that small inputs fill them
measure.UNCOMPUTED = 2**16
found, machine = {}, {}


def work_of(counts, architecture):
    code = [(ins, counts.executed[ins.index]) for ins in parse(counts.ptx).code]
    sass = executions(counts, architecture)
    machine[counts.kernel] = {
        "shuffles": (sum(n for ins, n in code if ins.name == "shfl"), sass["SHFL"]),
        "wgmma": (sum(n for ins, n in code if ins.multiplies), sass["HGMMA"]),
        "stores": (sum(n for ins, n in code if ins.op.startswith("st.global")), sass["STG"]),
        "all": (sum(n for _, n in code), sum(sass.values())),
    }
    return work.work_of(counts, architecture)


measure.work_of = work_of
for sampled in (True, False):
    with mock.patch.object(measure, "sampler", measure.sampler if sampled else lambda case: lambda kernel, grid: None):
        for i, case in enumerate(CASES):
            for measured in measure.measure(case, "sm_90"):
                for each in measured.works:
                    found.setdefault(f"{i} {measured.direction} {each.kernel}", []).append(asdict(each))
print(json.dumps([found, machine]))
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ROOT = str(Path(fusedgpt.__path__[0]).parent)


@pytest.fixture(scope="module")
def counted() -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, tuple[int, int]]]]:
    """The work of the sampled programs and of all, by case, direction and kernel; and executions of PTX and of SASS, by kernel."""
    environment = {**ENVIRONMENT, "PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_sampled_programs_stand_for_the_grid(counted: Any) -> None:
    assert {name.split()[2] for name in counted[0]} >= {
        "forward_kernel",
        "one_pass_kernel",
        "query_kernel",
        "gelu_kernel",
    }
    for name, (sampled, everything) in counted[0].items():
        for figure in ("tensor_flops", "special", "asked_bytes", "sectors", "shared_wavefronts", "barriers"):
            assert sampled[figure] == pytest.approx(everything[figure], rel=0.03), f"{name}: {figure}"
        for figure in ("dram_read", "dram_written"):
            assert sampled[figure] == pytest.approx(everything[figure], rel=0.03, abs=1e5), (
                f"{name}: {figure}"
            )
        issued = (sum(work["instructions"].values()) for work in (sampled, everything))
        assert next(issued) == pytest.approx(next(issued), rel=0.03), name


def test_machine_instructions_that_stand_for_one_of_ptx_are_executed_as_often(counted: Any) -> None:
    for kernel, executions in counted[1].items():
        for what in ("wgmma", "stores"):
            ptx, sass = executions[what]
            assert ptx == sass, f"{kernel}: {what}"
        assert executions["shuffles"][1] <= executions["shuffles"][0], kernel  # ptxas does without some
        assert 0.8 < executions["all"][1] / executions["all"][0] < 1.8, kernel
    assert counted[1]["forward_kernel"]["shuffles"][0] == counted[1]["forward_kernel"]["shuffles"][1] > 100
    assert counted[1]["one_pass_kernel"]["wgmma"][0] > 100


def test_a_head_s_tiles_and_rows_through_the_grid() -> None:
    assert evenly((7, 3, 2)) == [(0, 0, 0), (6, 1, 0), (6, 0, 1), (6, 2, 1)]
    assert evenly((2, 2, 1)) is None
