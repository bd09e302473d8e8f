"""The operators' benchmark compares like with like and times nothing that is wrong. Its figures are looked at by people."""

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fusedgpt.bench.__main__ import main
from fusedgpt.bench.ops import peers
from fusedgpt.bench.ops import run as ops
from fusedgpt.bench.ops.cases import NAMES, Implementation, P, Sizes, Work, works
from fusedgpt.bench.ops.harness import BACKWARD, FORWARD, Setup
from fusedgpt.bench.ops.run import BOTH, Ceilings
from fusedgpt.bench.record import draw
from fusedgpt.kernels.examples import Example

CPU = torch.device("cpu")
TINY = Sizes(tokens=96, rows=40, length=48, lengths=(32, 96), widths=(128,), vocab=67)
MOST = Ceilings(copy=1e9, matmul=1e12)
WORKS = list(works(CPU, torch.float32, TINY))


def measured(*implementations: Implementation, **more) -> list[ops.Row]:
    shape = (60, 80)
    example = Example("an operator", "", implementations[0].call, {"x": shape})
    work = Work(example, {"M": 60}, list(implementations), (shape,), (9600, 14400), **more)
    return list(ops.compare(work, Setup(work, torch.float32, CPU), MOST, 2))


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.name} {work.size}")
def test_every_implementation_of_every_operator_is_right(work: Work) -> None:
    """Ours and torch's, neither of which knows the other, both as float64 has it."""
    setup = Setup(work, torch.float32, CPU)
    assert len(work.implementations) >= 2
    for one in work.implementations:
        assert setup.right(setup.error(one)), (one.name, setup.error(one))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("attention", slice(0, 1)),
        *((name, slice(None, None, 7)) for name in ("linear_cross_entropy", "gelu_mlp", "linear")),
    ],
)
def test_comparing_some_rows_is_enough_where_all_would_be_too_many(name: str, rows: slice) -> None:
    work = next(work for work in WORKS if work.name == name)._replace(checked=rows)
    setup = Setup(work, torch.float32, CPU)
    for one in work.implementations:
        assert setup.right(setup.error(one)), one.name
    off = Implementation(
        "off", lambda *tensors: work.implementations[0].call(tensors[0] * 1.001, *tensors[1:])
    )
    assert not setup.right(setup.error(off))


def test_every_operator_of_the_design_is_there() -> None:
    assert {work.name for work in WORKS} == set(NAMES)
    attention = {(w.sizes["T"], w.sizes["D"], w.sizes["p"]) for w in WORKS if w.name == "attention"}
    sweep = {(t, 64, p) for t in (32, 48, 96) for p in (0.0, P)}
    assert attention == sweep | {(48, 128, 0.0), (48, 128, P)}


def test_the_limit_is_that_of_the_formulas() -> None:
    by_name = {work.name: work for work in reversed(WORKS)}
    # four tensors of 96 x 128 floats; two matmuls over half of the square for each of 2 sequences and 2 heads
    attention = MOST.limit(by_name["attention"], torch.float32, FORWARD)
    assert attention.gigabytes == pytest.approx(4 * 96 * 128 * 4 / 1e9)
    assert attention.gflop == pytest.approx(2 * 2 * 2 * (2 * 48 * 48 * 64) / 2 / 1e9)
    backward = MOST.limit(by_name["attention"], torch.float32, BACKWARD)
    assert backward.gflop == pytest.approx(2.5 * attention.gflop)
    mlp = MOST.limit(by_name["gelu_mlp"], torch.float32, BOTH)
    assert mlp.gflop == pytest.approx(3 * 2 * 2 * 96 * 128 * 512 / 1e9)
    slow = Ceilings(copy=1e15, matmul=1e9).limit(by_name["gelu_mlp"], torch.float32, BOTH)
    assert slow.milliseconds == pytest.approx(1e3 * slow.gflop)
    assert mlp.milliseconds == pytest.approx(1e3 * mlp.gigabytes), "bytes take longer here"


def test_a_run_from_the_command_to_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedgpt.bench.ops.cases.preset", lambda device: TINY)
    out = tmp_path / "ops.json"
    argv = ["ops", "attention", "linear_cross_entropy", "--device", "cpu", "--rounds", "2", "--out", str(out)]
    assert main(argv) == 0
    kept = json.loads(out.read_text())
    assert kept["kind"] == "ops"
    assert kept["ceilings"]["copy"] > 0 < kept["ceilings"]["matmul"]
    assert {row["name"] for row in kept["rows"]} == {"attention", "linear_cross_entropy"}
    keys = [(row["name"], row["case"], row["side"]) for row in kept["rows"]]
    assert len(set(keys)) == len(keys), "what tells rows apart"
    for row in kept["rows"]:
        assert row["milliseconds"] > 0 < row["share"]
        assert (row["error"] is None) == (row["side"] == ops.MATMULS)
        assert row["share"] == pytest.approx(row["limit"] / row["milliseconds"])
    losses = [row["direction"] for row in kept["rows"] if row["name"] == "linear_cross_entropy"]
    assert set(losses) == {FORWARD, BOTH}, "some implementations make its gradients in the forward"
    printed = capsys.readouterr().out
    assert "linear_cross_entropy, N 96, C 128, V 67; forward no less than" in printed
    assert "SDPA math" in printed
    pictures = [(tmp_path / name).read_bytes() for name in ("operators.png", "attention.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    draw({**kept, "rows": kept["rows"][:9]}, tmp_path / "fewer")
    assert (tmp_path / "fewer" / "operators.png").read_bytes() != pictures[0]
    assert not (tmp_path / "fewer" / "attention.png").exists(), "one T makes no curve"


def test_times_ratio_and_share() -> None:
    rows = measured(
        Implementation("ours", torch.sin), Implementation("twice", lambda x: torch.sin(x).clone())
    )
    assert [row.direction for row in rows] == [FORWARD] * 2 + [BACKWARD] * 2 + [BOTH] * 2
    ours, twice = rows[:2]
    assert ours.ratio == 1.0
    assert ours.gigabytes == pytest.approx(2 * 60 * 80 * 4 / 1e9)
    assert ours.share == pytest.approx(1e3 * ours.gigabytes * 1e9 / 1e9 / ours.milliseconds)
    assert twice.ratio == pytest.approx(twice.milliseconds / ours.milliseconds)
    assert rows[4].milliseconds == pytest.approx(ours.milliseconds + rows[2].milliseconds)


@pytest.mark.parametrize(
    "wrong",
    [
        Implementation("wrong", lambda x: torch.sin(x) * 1.001),
        Implementation("wrong backward", lambda x: torch.sin(x.detach()) + 0 * x),
        Implementation("nan", lambda x: torch.sin(x) * math.nan),
    ],
)
def test_what_is_wrong_is_not_timed(wrong: Implementation) -> None:
    rows = measured(Implementation("ours", torch.sin), wrong)
    assert all(row.milliseconds for row in rows if row.side == "ours")
    assert {(row.milliseconds, row.note[:5]) for row in rows if row.side == wrong.name} == {(None, "wrong")}


def test_an_implementation_that_fails_is_reported_and_left_out() -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    rows = measured(Implementation("ours", torch.sin), Implementation("broken", fail))
    assert {row.note for row in rows if row.side == "broken"} == {"failed: RuntimeError: no such kernel"}
    assert sum(row.milliseconds is not None for row in rows) == 3
    assert any("broken" in text and "no such kernel" in text for text in ops.block(rows))


def test_an_implementation_that_fails_only_when_it_is_timed_leaves_the_others() -> None:
    class Once(torch.autograd.Function):
        """Its graph is good for one backward."""

        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            ctx.used = False
            return torch.sin(x)

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
            if ctx.used:
                raise RuntimeError("used up")
            ctx.used = True
            return grad * torch.cos(ctx.saved_tensors[0])

    rows = measured(Implementation("ours", torch.sin), Implementation("once", Once.apply))
    notes = {(row.direction, row.note) for row in rows if row.side == "once"}
    assert notes == {(FORWARD, ""), (BACKWARD, "failed: RuntimeError: used up")}
    assert sum(row.milliseconds is not None for row in rows if row.side == "ours") == 3


def drawn_error(name: str, call, p: float = P) -> float:
    work = next(work for work in WORKS if work.name == name and work.sizes.get("p") == p)
    return Setup(work, torch.float32, CPU).error(Implementation("peer", call, draws=True))


def causal(dropout_p: float, after=lambda y: y):
    def call(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = peers.heads(qkv, 2)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
        return after(y).transpose(1, 2).flatten(2)

    return call


def test_an_implementation_that_draws_its_mask_is_compared_under_that_mask() -> None:
    assert drawn_error("dropout", lambda x: F.dropout(x, P)) < 1e-6
    assert drawn_error("dropout", lambda x: F.dropout(x, 0.2)) == math.inf
    assert drawn_error("dropout", lambda x: x / (1 - P)) == math.inf, "keeps all"
    assert drawn_error("dropout", lambda x: F.dropout(x, P) * 1.001) > 1e-4
    assert drawn_error("dropout", lambda x: F.dropout(x.detach(), P) + 0 * x) > 0.5
    assert drawn_error("attention", causal(P)) < 1e-6
    assert drawn_error("attention", causal(0.2)) == math.inf
    assert drawn_error("attention", causal(P, lambda y: 1.001 * y)) > 1e-4
    assert drawn_error("attention", causal(P, lambda y: y.detach() + 0 * y)) > 0.5


def test_when_time_is_over_a_word_is_left_for_each_operator() -> None:
    rows = list(ops.measure(CPU, MOST, rounds=1, seconds=-1, sizes=TINY))
    assert [row.name for row in rows] == [work.name for work in WORKS]
    assert {row.note for row in rows} == {"left out: -1 s were over"}
    assert all("left out" in text for row in rows for text in list(ops.block([row]))[1:])
    said = list(ops.summary([vars(row) for row in rows]))
    assert len(said) == len(WORKS)
    assert all("left out" in text for text in said)


def test_without_a_gpu_there_is_nothing_to_sweep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("tiles", "gpu"):
        assert main([command]) == 2
        assert "error: this needs a GPU" in capsys.readouterr().err


def test_a_mistake_in_the_flags_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["opps"], ["ops", "--round", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert main(["ops", "atention"]) == 2
    assert "no operator is called atention; there are attention, gelu_mlp" in capsys.readouterr().err


def test_a_package_that_is_missing_or_broken_is_left_out_with_one_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @peers.optional("no-such-package")
    def missing() -> peers.Peer:
        import no_such_module  # noqa: F401

        return {}

    @peers.optional("torch", "{}, broken")
    def broken() -> peers.Peer:
        raise AttributeError("no driver")

    peers.left_out.cache_clear()
    assert [missing(), missing(), broken()] == [None] * 3
    assert capsys.readouterr().out.splitlines() == [
        "no-such-package is left out: No module named 'no_such_module'",
        "torch is left out: no driver",
    ]
    found = peers.optional("torch", "{}, called")(lambda p: {"call": torch.sin} if p else None)
    assert found(0) is None, "it has no such operator, which is no word worth"
    assert found(1) == {"name": f"torch {version('torch')}, called", "call": torch.sin}
    assert not capsys.readouterr().out


def test_pytest_benchmark_runs_them(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks.json"
    bench = Path(__file__).resolve().parents[2] / "bench"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(bench),
        "-p",
        "no:cacheprovider",
        "-k",
        "embed and forward",
    ]
    # it measures nothing inside a worker of pytest-xdist, which it knows by these
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command.append(f"--benchmark-json={out}")
    done = subprocess.run(command, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["benchmarks"]
    assert {benchmark["group"] for benchmark in found} == {"embed, B 4, T 256, C 384, V 4096, forward"}
    assert len(found) == 2
    assert all(benchmark["extra_info"]["error"] < 1e-6 for benchmark in found)
