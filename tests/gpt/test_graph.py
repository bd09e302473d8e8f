"""The first captured step is compared with an eager one. On a CPU a stand-in replays, rightly or wrongly; tests/gpu captures."""

from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fusedgpt.gpt.config import ModelConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.train import step as step_module
from fusedgpt.gpt.train.graph import Captured, _Graph
from fusedgpt.gpt.train.interruption import TrainingError
from fusedgpt.gpt.train.step import TrainStep

SHAPE = ModelConfig(30, context_length=16, n_layer=1, n_head=2, n_embd=16, resid_dropout=0.1)
SETTINGS = TrainConfig(steps=20, batch_size=4, micro_batch=2, lr=1e-2, warmup_steps=3, dtype="float32")
Fault = Callable[[TrainStep], None]


class Replayed(NamedTuple):
    """In place of a CUDAGraph."""

    replay: Callable[[], None]
    reset: Callable[[], None]


class StandIn(Captured):
    """Captures nothing: a replay calls the function, and then does what is wrong with it."""

    def __init__(self, step: TrainStep, fault: Fault | None, verify: str) -> None:
        super().__init__("the step", None, verify)  # type: ignore[arg-type]
        self.step, self.fault, self.replays, self.resets = step, fault, 0, 0

    def _run(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        function(*inputs)

    def _capture(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> _Graph:
        static = tuple(t.clone() for t in inputs)

        def replay() -> None:
            function(*static)
            self.replays += 1
            if self.fault:
                self.fault(self.step)

        def reset() -> None:
            self.resets += 1

        return _Graph(static, Replayed(replay, reset))  # type: ignore[arg-type]


def make(fault: Fault | None = None, function: str = "", verify: str = "auto", **changes: Any) -> TrainStep:
    torch.manual_seed(0)
    model, settings = GPT(SHAPE), replace(SETTINGS, **changes)
    tokens = torch.randint(30, (2, 17), generator=torch.Generator().manual_seed(0))
    batches = repeat((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    step = TrainStep(model, build_optimizers(model, settings), batches, settings)
    if function:
        step.graphs[function] = StandIn(step, fault, verify)
    return step


def state(step: TrainStep) -> list[Tensor]:
    changed = [*step.changed(step.micro_step), *step.changed(step.update)]
    return [tensor.detach().clone() for tensor in changed]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def wrong_gradient(step: TrainStep) -> None:
    step.model.h[0].attn.c_attn.weight.grad.mul_(-1.0)  # type: ignore[union-attr]


def lost_gradient(step: TrainStep) -> None:
    step.model.ln_f.bias.grad.zero_()  # type: ignore[union-attr]


def same_seed(step: TrainStep) -> None:
    step.seed -= 1


def wrong_loss(step: TrainStep) -> None:
    step.loss *= 1.5


def not_a_number(step: TrainStep) -> None:
    step.model.wte.weight.grad[3, 3] = float("nan")  # type: ignore[index]


def wrong_weight(step: TrainStep) -> None:
    step.model.wpe.weight.data.add_(0.01)


def wrong_moment(step: TrainStep) -> None:
    step.optimizers.state()[id(step.model.wte.weight)]["exp_avg_sq"].mul_(2.0)


def wrong_norm(step: TrainStep) -> None:
    step.result[1] *= 3.0


def kept_gradient(step: TrainStep) -> None:
    step.gradients.buffer.copy_(torch.linspace(-1.0, 1.0, len(step.gradients.buffer)))


FAULTS = [
    *[
        ("micro_step", fault)
        for fault in (wrong_gradient, lost_gradient, same_seed, wrong_loss, not_a_number)
    ],
    *[("update", fault) for fault in (wrong_weight, wrong_moment, wrong_norm, kept_gradient)],
]
IDS = [fault.__name__ for _, fault in FAULTS]


@pytest.mark.parametrize(("function", "fault"), FAULTS, ids=IDS)
def test_a_wrong_graph_is_not_used(function: str, fault: Fault, capsys: pytest.CaptureFixture[str]) -> None:
    plain, step = make(), make(fault, function)
    for _ in range(4):
        assert equal([*step()], [*plain()])
        assert equal(state(step), state(plain)), "bit for bit an eager step's"
    captured = step.graphs[function]
    assert captured.replays == captured.resets == 1  # type: ignore[attr-defined]
    assert captured.failed
    assert not captured.graphs
    warning = capsys.readouterr().err
    assert warning.count("warning: the CUDA graph of the step is wrong here") == 1
    assert "gpt doctor" in warning
    assert "/issues" in warning


@pytest.mark.parametrize("function", ["micro_step", "update"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_right_graph_is_used_and_its_comparison_changes_no_bit(
    function: str, dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "GROWTH_INTERVAL", 1)  # float16's loss scale moves at every step
    plain, step = make(dtype=dtype), make(None, function, dtype=dtype)
    for _ in range(4):
        assert equal([*step()], [*plain()])
        assert equal(state(step), state(plain))
    captured = step.graphs[function]
    assert len(captured.graphs) == 1
    assert captured.replays == (7 if function == "micro_step" else 3), "all but the first"  # type: ignore[attr-defined]
    assert capsys.readouterr().err == ""


def test_rounding_is_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def rounded(step: TrainStep) -> None:
        step.gradients.buffer *= 1.001

    step = make(rounded, "micro_step")
    step()
    assert len(step.graphs["micro_step"].graphs) == 1
    assert capsys.readouterr().err == ""


def test_strict_ends_the_run_and_off_compares_nothing() -> None:
    with pytest.raises(TrainingError, match=r"the CUDA graph of the step is wrong here.*--verify strict"):
        make(wrong_gradient, "micro_step", "strict")()
    step = make(wrong_gradient, "micro_step", "off")
    step()
    assert len(step.graphs["micro_step"].graphs) == 1
