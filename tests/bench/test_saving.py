"""What saving costs: the arithmetic of the table, and that a real checkpoint is written and nothing of it is left."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fusedgpt.bench.step import saving
from fusedgpt.bench.step.sizes import workload
from fusedgpt.gpt.checkpoint import checkpoints


def test_saving_is_measured_beside_steps_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saving, "BLOCK", 0.001)
    written: list[int] = []

    def times(blocks: Sequence[Callable[[], object]]) -> list[float]:
        """Two steps of 20 ms; a checkpoint takes 50 ms more, in the background 10."""
        for block in blocks:
            block()
        written.append(sum(len(checkpoints(run)) for run in tmp_path.glob("saving-*/*")))
        return [0.04, 0.09, 0.05][: len(blocks)]

    monkeypatch.setattr(saving, "_times", times)
    in_place, background = saving.measure(workload("tiny", "cpu", batch=1), rounds=3)
    assert written[-1] == 4, "two writers keep two checkpoints each"
    assert [in_place.side, background.side] == ["in place", "--async-save"]
    assert [in_place.milliseconds, background.milliseconds] == pytest.approx([50, 10])
    assert in_place.step == pytest.approx(20)
    assert in_place.share == pytest.approx(0.05 / (500 * 0.02 + 0.05))
    assert in_place.megabytes == pytest.approx(12 * 0.81, rel=0.5)
    assert not list(tmp_path.iterdir())
