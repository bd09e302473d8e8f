"""The operators' benchmark compares like with like and times nothing that is wrong. Its figures are looked at by people."""

import json
from pathlib import Path

import pytest
import torch

from fusedgpt.bench import ops
from fusedgpt.bench.__main__ import main
from fusedgpt.bench.ops import Operator, Side, run_ops

CPU = torch.device("cpu")


def measured(*sides: Side, activations: int = 1) -> list[ops.Row]:
    operator = Operator("an operator", activations, 0, (2, 2), (8,), list(sides))
    return list(ops._compare(operator, 60, 80, torch.float32, CPU, 1e9, 2))


def test_every_operator_with_a_peer_from_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.json"
    rows = run_ops("cpu", rows=9, widths=(5,), rounds=2, out=out)
    assert {row.operator.split()[0] for row in rows} == {"layer_norm", "add_layer_norm", "dropout"}
    assert all(row.milliseconds and row.error is not None and row.error < 1e-5 for row in rows)
    assert {row.side.split()[0] for row in rows} == {"fusedgpt,", "torch"}
    assert [row.direction for row in rows[:4]] == ["forward"] * 2 + ["backward"] * 2
    record = json.loads(out.read_text())
    assert len(record["rows"]) == len(rows)
    assert record["copy_bandwidth"] > 0
    printed = capsys.readouterr().out
    assert "copy bandwidth" in printed
    assert "liger-kernel" in printed
    assert "quack-kernels" in printed


def test_bytes_and_ratio() -> None:
    ours, twice = measured(Side("ours", torch.sin), Side("twice", lambda x: torch.sin(x).clone()))[:2]
    assert (ours.operator, ours.shape, ours.direction, ours.ratio) == (
        "an operator",
        (60, 80),
        "forward",
        1.0,
    )
    assert ours.gigabytes == pytest.approx(2 * 60 * 80 * 4 / 1e9)
    assert twice.ratio == pytest.approx(twice.milliseconds / ours.milliseconds)


@pytest.mark.parametrize(
    "wrong",
    [
        Side("wrong", lambda x: torch.sin(x) * 1.001),
        Side("wrong backward", lambda x: torch.sin(x.detach()) + 0 * x),
        Side("nan", lambda x: torch.sin(x) * float("nan")),
        Side("keeps all", lambda x: x / 0.9, draws=True),
    ],
)
def test_what_is_wrong_is_not_timed(wrong: Side) -> None:
    rows = measured(Side("ours", torch.sin), wrong)
    timed = {row.side: (row.milliseconds is not None, row.note) for row in rows}
    assert timed == {"ours": (True, ""), wrong.name: (False, "wrong: not timed")}


def test_a_peer_that_fails_is_named_and_left_out() -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    rows = measured(Side("ours", torch.sin), Side("broken", fail, backward=False))
    assert [(row.side, row.note) for row in rows if row.milliseconds is None] == [
        ("broken", "failed: RuntimeError: no such kernel")
    ]
    assert sum(row.milliseconds is not None for row in rows) == 2
    assert "failed: RuntimeError" in ops.line(rows[1])


def test_without_a_gpu_there_is_nothing_to_sweep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("tiles", "gpu"):
        assert main([command]) == 2
        assert "error: this needs a GPU" in capsys.readouterr().err


def test_a_mistake_in_the_flags_ends_with_2() -> None:
    for argv in ([], ["opps"], ["ops", "--round", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
