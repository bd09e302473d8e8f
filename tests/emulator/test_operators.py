"""Every operator as Triton compiles it, forward and backward, in the emulator: sm_80 and sm_90, early and late.

Each case fails on a result beyond the rule, on any finding, and where other kernels ran than the check names.
"""

from concurrent.futures import ProcessPoolExecutor

import pytest

from fusedgpt.bench.emulator import suite
from fusedgpt.bench.emulator.run import Job
from fusedgpt.bench.emulator.suite import HALVES

JOBS = [
    Job(check.name, architecture, dtype, (("early", 0), ("late", 0)))
    for check in suite.checks().values()
    if check.tested
    for architecture in check.architectures
    for dtype in HALVES
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.check}, {job.architecture} {str(job.dtype)[6:]}")
def test_a_compiled_operator_is_right(job: Job, compiling: ProcessPoolExecutor) -> None:
    outcomes = compiling.submit(job).result()
    assert all(outcome.ok for outcome in outcomes), "\n".join(map(str, outcomes))
