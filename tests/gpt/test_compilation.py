"""`--compile`: the same losses with it and without, when it is left alone, and what its failures say.

Inductor takes half a minute for a model, so what runs here stops short of it: Dynamo and AOTAutograd trace, PyTorch computes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.metrics import read_metrics
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.train import compilation
from fusedgpt.gpt.train.compilation import compile_step
from fusedgpt.gpt.train.interruption import TrainingError
from fusedgpt.gpt.train.loop import train
from fusedgpt.gpt.train.step import TrainStep
from fusedgpt.kernels import use_backend

DROPOUTS = {"embd_dropout": 0.1, "attn_dropout": 0.1, "resid_dropout": 0.1}
SHAPE = ModelConfig(29, context_length=16, n_layer=1, n_head=1, n_embd=16, **DROPOUTS)
SETTINGS = TrainConfig(steps=4, batch_size=2, warmup_steps=0, dtype="float32", compile="on", device="cpu")
Inductor = torch.compile


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """What AOTAutograd made of every compiled function: forward, backward."""
    found: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> Callable:
        found.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    monkeypatch.setattr(torch, "compile", partial(Inductor, backend=backend))
    monkeypatch.setattr(torch, "__file__", "/opt/python/torch/__init__.py")  # nothing is linked here
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


def make(settings: TrainConfig = SETTINGS, shape: ModelConfig = SHAPE) -> TrainStep:
    torch.manual_seed(0)
    model = GPT(shape)
    inputs, targets = torch.randint(29, (2, settings.sequences, 16))
    return TrainStep(model, build_optimizers(model, settings), repeat((inputs, targets)), settings)


def losses(step: TrainStep) -> list[Tensor]:
    return [step()[0] for _ in range(2)]


def lines(step: TrainStep) -> list[str]:
    """What compiling it says."""
    said: list[str] = []
    compile_step(step, SHAPE, said.append)
    return said


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({}, {}),
        ({"norm": "post", "gelu": "exact", "tie_weights": False}, {"micro_batch": 1, "label_smoothing": 0.1}),
        ({}, {"dtype": "bfloat16", "activation_checkpointing": True, "float32_residual": True}),
    ],
)
def test_a_compiled_step_is_one_graph_and_computes_the_same(
    graphs: list[torch.fx.GraphModule], shape: dict, settings: dict
) -> None:
    changed, run = replace(SHAPE, **shape), replace(SETTINGS, **settings)
    eager, compiled = make(run, changed), make(run, changed)
    assert lines(compiled) == []
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-5, atol=0)
    assert len(graphs) == 2, "forward and backward, compiled once"
    for ours, theirs in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_kernels_stay_whole_in_a_compiled_step(graphs: list[torch.fx.GraphModule]) -> None:
    pytest.importorskip("triton")
    with use_backend("triton"):
        eager, compiled = make(), make()
        lines(compiled)
        torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-6, atol=0)
    # an operator that may add to a gradient in place is the argument of a call that leaves its inputs alone
    called = [
        {str(name) for node in graph.graph.nodes for name in (node.target, *node.args[:1])}
        for graph in graphs
    ]
    names = ("embed", "add_layer_norm", "packed_attention", "gelu_mlp", "linear")
    assert called[0] >= {f"fusedgpt.{name}.default" for name in names}
    assert called[1] >= {f"fusedgpt.{name}.default" for name in ("gelu_mlp_backward", "linear_backward")}
    for targets in called:
        assert not {
            name for name in targets if name.startswith(("aten.mm", "aten.native_layer", "aten.tanh"))
        }


def test_a_run_goes_on_with_it_or_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[torch.fx.GraphModule]
) -> None:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    settings = replace(
        SETTINGS,
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        schedule="constant",
        log_interval=1,
        eval_windows=2,
        sample_tokens=0,
    )

    def curve(name: str, *parts: tuple[int, str]) -> list[float]:
        for resume, (steps, compile) in enumerate(parts):
            changed: Any = replace(settings, steps=steps, compile=compile)
            train(RunConfig(SHAPE, changed), tmp_path / name, resume=bool(resume))
        return [
            record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in record
        ]

    eager = curve("eager", (6, "off"))
    assert not graphs
    assert curve("mixed", (2, "off"), (4, "on"), (6, "off")) == pytest.approx(eager, rel=1e-5)
    assert len(graphs) == 2


def test_auto_compiles_long_runs_only(
    monkeypatch: pytest.MonkeyPatch, graphs: list[torch.fx.GraphModule]
) -> None:
    short, untouched = make(replace(SETTINGS, compile="auto")), make()
    (line,) = lines(short)
    assert line.startswith("--compile auto: not compiled, since the run will take about 0 s")
    assert line.endswith("a compilation takes about 15 s")
    assert not graphs
    assert torch.equal(short.seed, untouched.seed)
    assert torch.equal(torch.stack(losses(short)), torch.stack(losses(untouched))), (
        "measuring changes nothing"
    )

    monkeypatch.setattr(compilation, "run_seconds", lambda *_: 7200.0)
    long = make(replace(SETTINGS, compile="auto"))
    assert lines(long) == ["--compile auto: compiling, about 15 s, in a run of about 120 min"]
    assert len(graphs) == 2
    assert lines(make(replace(SETTINGS, compile="off"))) == []


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CXX", "no-such-compiler")
    return r"there is no C\+\+ compiler 'no-such-compiler' \(install g\+\+"


def blank(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch, "__file__", "/opt/my python/torch/__init__.py")
    return "torch's path has a blank, as '/opt/my python/torch' has"


def fails(monkeypatch: pytest.MonkeyPatch) -> str:
    def backend(*_: Any) -> Callable:
        raise AssertionError("no such code\nand a long trace")

    monkeypatch.setattr(torch, "compile", partial(Inductor, backend=backend))
    return "AssertionError: no such code"


@pytest.mark.parametrize("broken", [no_compiler, blank, fails])
def test_what_cannot_be_compiled_is_named(
    broken: Callable[[pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = losses(make())
    message = broken(monkeypatch)
    with pytest.raises(TrainingError, match=f"--compile on: .*{message}"):
        lines(make())
    monkeypatch.setattr(compilation, "run_seconds", lambda *_: 7200.0)
    step = make(replace(SETTINGS, compile="auto"))
    said = lines(step)
    assert len(said) == 2
    assert "\n" not in said[1]
    with pytest.raises(TrainingError, match=message):
        raise TrainingError(said[1])
    assert torch.equal(torch.stack(losses(step)), torch.stack(eager))
