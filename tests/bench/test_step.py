"""The step benchmark compares like with like and says so when it does not. Times are looked at by people, not by tests."""

import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

from fusedgpt.bench.step import breakdown, implementations, sizes, step
from fusedgpt.bench.step.implementations import Implementation, builders, fusedgpt, transformers_gpt2
from fusedgpt.bench.step.sizes import SIZES, Workload, workload
from fusedgpt.bench.table import line
from fusedgpt.gpt import model as gpt_model
from fusedgpt.gpt.config import ModelConfig

CPU = torch.device("cpu")
WORK = Workload(
    "test", 2, ModelConfig(65, context_length=16, n_layer=2, n_head=2, n_embd=32), CPU, torch.float32
)
DROPPING = replace(WORK, config=replace(WORK.config, embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile compiles nothing: a compilation takes half a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch, "__file__", "/opt/python/torch/__init__.py")


@pytest.mark.parametrize("work", [WORK, DROPPING], ids=["no dropout", "dropout"])
def test_every_implementation_is_timed_from_the_same_weights(eager: None, work: Workload) -> None:
    rows = list(step.measure(work, rounds=3))
    assert [row.note for row in rows] == [""] * 4
    assert [row.side.split()[0] for row in rows] == ["fusedgpt", "transformers", "fusedgpt,", "transformers"]
    assert rows[0].ratio == 1.0
    for row in rows:
        assert row.loss == pytest.approx(rows[0].loss, rel=1e-5 if work is WORK else 2e-2)
        assert row.tokens_per_second == pytest.approx(32 / row.milliseconds * 1e3)
        assert row.ratio
        assert row.gigabytes > 4 * 4 * 30_000 / 1e9, "weights, gradients and AdamW's two means"
        assert row.side in line(step.COLUMNS, vars(row))


def test_our_compiled_step_is_the_training_loops_with_compile_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile(model: torch.nn.Module, **_: object) -> torch.nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch, "__file__", "/opt/python/torch/__init__.py")  # nothing is linked here
    fusedgpt(WORK)
    assert not compiled
    ours = dict(builders(WORK))[implementations.COMPILED]()
    assert compiled == [ours.model]
    assert ours.name == implementations.COMPILED


def changed(other: Implementation, loss: float = 1.0, norm: float = 1.0) -> Implementation:
    def wrong(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = other.step(inputs, targets)
        return found[0] * loss, found[1] * norm

    return Implementation("other", other.model, wrong)


@pytest.mark.parametrize(
    ("build", "note"),
    [
        (lambda: changed(fusedgpt(WORK), loss=1.01), "a first loss of 4."),
        (lambda: changed(fusedgpt(WORK), norm=1.1), "a first gradient norm of "),
        (lambda: changed(fusedgpt(WORK), loss=float("nan")), "a first loss of nan"),
        (lambda: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_an_implementation_that_computes_something_else_is_not_timed(
    build, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "builders", lambda *_: [("fusedgpt", lambda: fusedgpt(WORK)), ("other", build)])
    ours, other = step.measure(WORK, rounds=2)
    assert ours.milliseconds
    assert other.milliseconds is None
    assert other.note.startswith(note)
    assert note in line(step.COLUMNS, vars(other))


def test_what_compiles_has_to_begin_in_time(eager: None) -> None:
    rows = list(step.measure(WORK, rounds=3, seconds=1e-3))
    assert [bool(row.milliseconds) for row in rows] == [True, True, False, False]
    assert rows[3].note == "left out: most of 0.001 s were over"


def test_a_compiler_that_takes_too_long_is_stopped() -> None:
    row, before = step.Row("step", "", "other"), signal.getsignal(signal.SIGALRM)
    with step._time_limit(0.05, row):
        step._begin(row, lambda: time.sleep(60), WORK, None)
    assert row.note == "left out: not compiled within 0 s"
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_both_do_the_same_step_after_step() -> None:
    losses = []
    for one in (fusedgpt(WORK), transformers_gpt2(WORK)):
        batches = WORK.batches()
        losses.append([one.step(*next(batches))[0].item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_folder_that_is_no_nanogpt_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="clone of nanoGPT"):
        list(builders(WORK, tmp_path))


def test_nanogpt_gets_our_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setattr(implementations, "_training", lambda model, loss: loss)
    ours = implementations.build_model(WORK)
    theirs = implementations.nanogpt(WORK, tmp_path)
    inputs, targets = next(WORK.batches())
    (weights,) = {id(p): p for p in theirs.model.parameters() if p.shape == (32, 32)}.values()
    torch.testing.assert_close(weights, ours.h[0].attn.c_proj.weight)
    assert theirs.step(inputs, targets).item() == pytest.approx(softplus(ours.wte.weight[0]).sum().item())


def test_nanogpt_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo imports the module of the clone by its name. Inductor has no part in that, and needs a C++ compiler and a
    torch in a path without a blank."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    (tmp_path / "model.py").write_text(NANOGPT)
    losses = []
    for compile in (False, True):
        theirs = implementations.nanogpt(WORK, tmp_path, compile)
        losses.append([theirs.step(*batch)[0].item() for batch in islice(WORK.batches(), 3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# as much of nanoGPT's interface as is used: nn.Linear's orientation, its names, and (logits, loss)
NANOGPT = """
import torch
from torch.nn import functional as F
class GPTConfig:
    def __init__(self, **values): vars(self).update(values)
class Names(torch.nn.Module): pass
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        c = config.n_embd
        self.transformer = torch.nn.ModuleDict({"wte": torch.nn.Embedding(config.vocab_size, c), "h": torch.nn.ModuleList([Names()])})
        self.transformer.h[0].attn = Names()
        self.transformer.h[0].attn.c_proj = torch.nn.Linear(c, c)
    def forward(self, inputs, targets): return None, head(self.transformer.wte.weight[0])
def head(row): return F.softplus(row).sum() * (1 if torch.is_grad_enabled() else 0)
"""


# ---- sizes


@pytest.mark.parametrize("size", SIZES)
def test_sizes_on_a_cpu(size: str) -> None:
    work = workload(size, "cpu")
    assert work.case.startswith(f"{size}, ")
    assert work.case.endswith(", float32")
    assert work.tokens <= 2048
    assert workload(size, "cpu", batch=3, dropout=0.1).case.endswith(", dropout 0.1")


@pytest.mark.parametrize(
    ("gibibytes", "batches"), [(141, (64, 32, 16, 16)), (79, (32, 16, 8, 8)), (24, (8, 4, 2, 2))]
)
def test_sizes_on_a_gpu(gibibytes: int, batches: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "pick_device", torch.device)
    monkeypatch.setattr(sizes, "pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(sizes, "memory", lambda _: gibibytes * 2**30)
    names = [size for size in SIZES if size.startswith("gpt2")]
    assert tuple(workload(size, "cuda").batch for size in names) == batches


def test_the_help_lists_the_sizes() -> None:
    from fusedgpt.bench.__main__ import SIZE_NAMES

    assert SIZE_NAMES == SIZES


def test_an_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown size 'gpt2-medum'; did you mean 'gpt2-medium'"):
        workload("gpt2-medum", "cpu")
    with pytest.raises(ValueError, match="there are tiny, small, gpt2"):
        workload("zzz", "cpu")
    with pytest.raises(ValueError, match="batch = 0"):
        workload("tiny", "cpu", batch=0)


# ---- the breakdown


@pytest.mark.parametrize("work", [WORK, replace(DROPPING, recompute=True)], ids=["plain", "recomputed"])
def test_the_parts_add_up_to_the_step(work: Workload) -> None:
    before = gpt_model.linear
    rows = list(breakdown.measure(work, rounds=3))
    assert gpt_model.linear is before
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    both = {*breakdown.PARTS.values()}
    assert {(row.name, row.direction) for row in rows} == {
        *((part, direction) for part in both for direction in ("forward", "backward")),
        *((part, "") for part in ("gradient norm + clip", "update", "other")),
    }
    assert len({(row.name, row.case) for row in rows}) == len(rows)


def test_time_is_given_to_the_part_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the slowed part moves, in its forward and in its backward."""
    clock = [0.0]
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: clock[0])
    own = gpt_model.gelu_mlp

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock[0] += 1.0
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            clock[0] += 3.0
            return gradient

    monkeypatch.setattr(gpt_model, "gelu_mlp", lambda y, *rest: Slow.apply(own(y, *rest)))
    found = {(row.name, row.direction): row.milliseconds for row in breakdown.measure(WORK, rounds=2)}
    layers = WORK.config.n_layer
    assert found.pop(("MLP", "forward")) == pytest.approx(1e3 * layers)
    assert found.pop(("MLP", "backward")) == pytest.approx(3e3 * layers)
    assert not any(found.values())


def test_watching_changes_no_gradient() -> None:
    one, watched = fusedgpt(DROPPING), fusedgpt(DROPPING)

    def losses(ours: Implementation) -> Iterator[float]:
        batches = DROPPING.batches()
        for _ in range(3):
            yield ours.step(*next(batches))[0].item()

    expected = list(losses(one))
    with breakdown.watch(breakdown.Timeline(CPU)):
        assert list(losses(watched)) == expected
