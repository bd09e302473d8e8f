"""The operators of `bench ops` under pytest-benchmark: `pytest bench`, with `--benchmark-json FILE` for the figures.

The same works, sides and tensors as there, each side in each direction a benchmark of its own. Ours fails where it is wrong;
a peer that is wrong or cannot run is skipped with the reason. `bench ops` is the one to compare sides by: there they take turns.
"""

import time
from functools import cache, lru_cache
from itertools import count

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install 'fusedgpt[bench]'")

from fusedgpt.bench.ops.cases import Side, Work, works
from fusedgpt.bench.ops.harness import BACKWARD, BOTH, FORWARD, Setup
from fusedgpt.bench.ops.run import ceilings, judge
from fusedgpt.gpt.device import pick_device

DEVICE = pick_device("auto")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
WORKS = list(works(DEVICE, DTYPE))
SECONDS = 0.3  # of each benchmark


@lru_cache(maxsize=1)  # the tests of a work follow each other
def judged(number: int) -> tuple[Setup, dict[str, float], dict[str, str]]:
    setup = Setup(WORKS[number], DTYPE, DEVICE)
    return setup, *judge(WORKS[number], setup)


most = cache(lambda: ceilings(DEVICE))


def cases() -> list:
    return [
        pytest.param(number, side, direction, id=f"{work.name}, {work.size}: {side.name}, {direction}")
        for number, work in enumerate(WORKS)
        for direction in (FORWARD, BOTH if work.at_once else BACKWARD)
        for side in work.sides
        if side.backward or direction == FORWARD
    ]


@pytest.mark.parametrize(("number", "side", "direction"), cases())
def test_operator(benchmark, number: int, side: Side, direction: str) -> None:
    work: Work = WORKS[number]
    setup, errors, notes = judged(number)
    if side.name in notes:
        (pytest.fail if side is work.sides[0] else pytest.skip)(notes[side.name])
    work_once, rounds = setup.call(direction, side), count()

    def once() -> None:
        work_once(next(rounds))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    once()
    began = time.perf_counter()
    once()
    fitting = int(SECONDS / (time.perf_counter() - began))
    benchmark.group = f"{work.name}, {work.size}, {direction}"
    benchmark.extra_info |= {
        "error": errors[side.name],
        "limit_ms": most().limit(work, DTYPE, direction).milliseconds,
        "peak_memory": setup.peak(work_once),
    }
    benchmark.pedantic(once, rounds=min(max(fitting, 3), 50), warmup_rounds=1)
