"""What needs a GPU in the bench: stamps on a stream, the allocator's statistics, the captured step."""

from dataclasses import replace

import pytest
import torch

from fusedgpt.bench.step import breakdown, decode, step
from fusedgpt.bench.step.implementations import OURS, PLAIN, fusedgpt
from fusedgpt.bench.step.memory import allocations
from fusedgpt.bench.step.sizes import workload
from fusedgpt.kernels._triton import INTERPRETED

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU that Triton compiles for"
)


def test_every_implementation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = list(step.measure(workload("small", "cuda"), rounds=3))
    assert [row.side for row in rows][:2] == [OURS, PLAIN]
    for row in rows:
        assert (row.side, row.note) == (row.side, "")
        assert row.milliseconds > 0
        assert row.gigabytes > 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_captured_and_uncaptured_do_the_same_step(dropout: float) -> None:
    work = workload("small", "cuda", dropout=dropout)
    losses = []
    for captured in (True, False):
        ours, batches = fusedgpt(work, captured=captured), work.batches()
        losses.append([ours.step(*next(batches))[0].item() for _ in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_parts_take_about_as_long_as_the_step(recompute: bool) -> None:
    work = replace(workload("gpt2", "cuda", batch=8), recompute=recompute)
    rows = list(breakdown.measure(work, rounds=5))
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert len(rows) == 2 * len({*breakdown.PARTS.values()}) + 3
    assert next(row for row in rows if row.name == breakdown.OTHER).share < 0.2
    ours, batches = fusedgpt(work, captured=False), work.batches()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(3):
        ours.step(*next(batches))
    batch = next(batches)
    torch.cuda._sleep(breakdown.HEAD_START)
    marks[0].record()
    ours.step(*batch)
    marks[1].record()
    torch.cuda.synchronize()
    assert sum(row.milliseconds for row in rows) == pytest.approx(marks[0].elapsed_time(marks[1]), rel=0.3)


def test_allocations_are_counted_with_temporaries() -> None:
    torch.cuda.empty_cache()  # a cached block that is a little larger would be counted whole
    with allocations(torch.device("cuda")) as found:
        kept = torch.ones(2**20, device="cuda")
        torch.ones(5 * 2**20, device="cuda")
    assert (found.peak, found.held) == (6 * 2**22, 2**22)
    del kept


def test_the_same_text_as_transformers() -> None:
    pytest.importorskip("transformers")
    assert [row.note for row in decode.measure(workload("small", "cuda"), rounds=1)] == [""] * 4
