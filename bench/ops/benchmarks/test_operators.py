"""`pytest bench [--benchmark-json FILE]`: the operators of `bench ops` under pytest-benchmark.

A benchmark for each work, implementation and direction. Ours fails where it is wrong; another implementation that is wrong or cannot
run is skipped with the reason. Compare implementations by `bench ops`: there they take turns. This folder is no package, so it
is not part of the wheel.
"""

from functools import lru_cache
from itertools import count

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

from fusedgpt.bench.ops.cases import Implementation, Work, works
from fusedgpt.bench.ops.harness import BACKWARD, BOTH, FORWARD, Setup
from fusedgpt.bench.ops.run import ceilings, judge
from fusedgpt.gpt.device import pick_device

DEVICE = pick_device("auto")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
most = lru_cache(ceilings)


@lru_cache(maxsize=1)  # the benchmarks of a work follow each other
def judged(number: int) -> tuple[Setup, dict[str, float], dict[str, str]]:
    setup = Setup(WORKS[number], DTYPE, DEVICE)
    return setup, *judge(WORKS[number], setup)


WORKS = list(works(DEVICE, DTYPE))
CASES = [
    pytest.param(number, one, direction, id=f"{work.name}, {work.size}: {one.name}, {direction}")
    for number, work in enumerate(WORKS)
    for direction in (FORWARD, BOTH if work.at_once else BACKWARD)
    for one in work.implementations
    if one.backward or direction == FORWARD
]


@pytest.mark.benchmark(max_time=0.3, min_rounds=3, warmup=False)
@pytest.mark.parametrize(("number", "implementation", "direction"), CASES)
def test_operator(benchmark, number: int, implementation: Implementation, direction: str) -> None:
    work: Work = WORKS[number]
    setup, errors, notes = judged(number)
    if note := notes.get(implementation.name):
        (pytest.fail if implementation is work.implementations[0] else pytest.skip)(note)
    call, rounds = setup.call(direction, implementation), count()

    def once() -> None:
        call(next(rounds))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{work.name}, {work.size}, {direction}"
    benchmark.extra_info |= {
        "error": errors[implementation.name],
        "limit_ms": most(DEVICE).limit(work, DTYPE, direction).milliseconds,
        "peak_memory": setup.peak(call),
    }
    benchmark(once)
