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
from fusedgpt.bench.counts import measure
from fusedgpt.kernels import examples

CASES = [
    measure.Case(examples.causal_attention(1, 256, 12, 64), {"B": 1, "T": 256, "H": 12, "D": 64}),
    measure.Case(examples.causal_attention(1, 256, 1, 64), {"B": 1, "T": 256, "H": 1, "D": 64}),
    measure.Case(examples.layer_norm(3072, 256), {"M": 3072, "C": 256}),
    measure.Case(examples.gelu_mlp(3072, 256), {"M": 3072, "C": 256}),
]
measure.MULTIPROCESSORS["sm_90"] = 4  # few, so that small inputs fill them
found = {}
for sampled in (True, False):
    with mock.patch.object(measure, "sampler", measure.sampler if sampled else lambda case: lambda kernel, grid: None):
        for i, case in enumerate(CASES):
            for measured in measure.measure(case, "sm_90"):
                for work in measured.works:
                    found.setdefault(f"{i} {measured.direction} {work.kernel}", []).append(asdict(work))
print(json.dumps(found))
"""


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ROOT = str(Path(fusedgpt.__path__[0]).parent)


@pytest.fixture(scope="module")
def counted() -> dict[str, list[dict[str, Any]]]:
    """The work of the sampled programs and of all, by case, direction and kernel."""
    environment = {**ENVIRONMENT, "PYTHONPATH": ROOT, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_sampled_programs_stand_for_the_grid(counted: dict[str, list[dict[str, Any]]]) -> None:
    assert {name.split()[2] for name in counted} >= {
        "forward_kernel",
        "one_pass_kernel",
        "query_kernel",
        "gelu_kernel",
    }
    for name, (sampled, everything) in counted.items():
        for figure in ("tensor_flops", "special", "asked_bytes", "sectors", "shared_wavefronts", "barriers"):
            assert sampled[figure] == pytest.approx(everything[figure], rel=0.03), f"{name}: {figure}"
        for figure in ("dram_read", "dram_written"):
            assert sampled[figure] == pytest.approx(everything[figure], rel=0.03, abs=1e5), (
                f"{name}: {figure}"
            )
        issued = (sum(work["instructions"].values()) for work in (sampled, everything))
        assert next(issued) == pytest.approx(next(issued), rel=0.03), name


def test_a_head_s_tiles_and_rows_through_the_grid() -> None:
    assert evenly((7, 3, 2)) == [(0, 0, 0), (6, 1, 0), (6, 0, 1), (6, 2, 1)]
    assert evenly((2, 2, 1)) is None
