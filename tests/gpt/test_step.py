"""The parts of a training step, against torch's own clipping, AdamW and GradScaler. tests/gpu captures them in graphs."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fusedgpt.gpt.config import ModelConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import FlatGradients, build_optimizers, lr_factor
from fusedgpt.gpt.train import step as step_module
from fusedgpt.gpt.train.step import TrainStep

SHAPE = ModelConfig(30, context_length=16, n_layer=2, n_head=2, n_embd=16, bias=True)
SETTINGS = TrainConfig(steps=20, batch_size=4, lr=1e-2, warmup_steps=3, dtype="float32", grad_clip=0.5)


def ids(rows: int = 4, length: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(30, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def make(
    settings: TrainConfig = SETTINGS,
    shape: ModelConfig = SHAPE,
    batches: Iterator[tuple[Tensor, Tensor]] | None = None,
    model: GPT | None = None,
) -> TrainStep:
    if model is None:
        torch.manual_seed(0)
        model = GPT(shape)
    return TrainStep(model, build_optimizers(model, settings), batches or repeat(ids()), settings)


def everything(step: TrainStep) -> list[Tensor]:
    """Copies of all that an update may change: weights and optimizer state."""
    state = step.optimizers.state().values()
    tensors = [*step.model.parameters(), *(tensor for parts in state for tensor in parts.values())]
    return [tensor.detach().clone() for tensor in tensors]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradients_stay_views_of_one_zeroed_buffer() -> None:
    step = make()
    held = {name: p.grad for name, p in step.model.named_parameters()}
    step()
    buffer = step.gradients.buffer
    assert not buffer.any()
    step.micro_step(*ids())
    for name, p in step.model.named_parameters():
        assert p.grad is held[name], f"{name}: autograd has replaced the view"
        assert p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert p.grad.data_ptr() % 16 == 0
        assert p.grad.any(), name
    assert buffer.count_nonzero() == sum(p.grad.count_nonzero() for p in step.model.parameters())


def test_frozen_parameters_stay_out_and_tied_ones_count_once() -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    model.wpe.weight.requires_grad_(False)
    before = model.wpe.weight.clone()
    step = make(model=model)
    step()
    assert model.wpe.weight.grad is None
    assert torch.equal(model.wpe.weight, before)
    trainable = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    assert trainable <= step.gradients.buffer.numel() < trainable + 32 * 26 + 4096
    assert model.lm_head is None, "the tied head is the embedding's own matrix"


def test_the_norm_is_exact_where_one_float32_sum_is_not() -> None:
    parameter = torch.nn.Parameter(torch.empty(12_000_000))
    gradients = FlatGradients([parameter])
    gradients.buffer[:12_000_000].normal_(generator=torch.Generator().manual_seed(0))
    assert gradients.norm().item() == pytest.approx(gradients.buffer.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
def test_an_update_is_torchs_clipping_and_adamw(clip: float) -> None:
    settings = replace(SETTINGS, grad_clip=clip)
    step = make(settings)
    model = copy.deepcopy(step.model)
    for p in model.parameters():
        p.grad = None
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)
    for number in range(3):
        for group in adamw.param_groups:
            group["lr"] = settings.lr * lr_factor(number, settings)
        adamw.zero_grad()
        model(*ids()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9)
        adamw.step()
        assert step()[1].item() == pytest.approx(norm.item(), rel=1e-5)
        for group, theirs in zip(step.optimizers.all[0].param_groups, adamw.param_groups, strict=True):
            assert group["lr"].item() == pytest.approx(theirs["lr"], rel=1e-6)
        for (name, ours), p in zip(step.model.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, p, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(optimizer: str, value: float) -> None:
    step, clean = (make(replace(SETTINGS, optimizer=optimizer)) for _ in range(2))
    for both in (step, clean):
        both()
    before = everything(step)
    step.micro_step(*ids())
    step.gradients.buffer[7] = value
    step.update()
    assert equal(everything(step), before)
    assert step.skipped.item() == 1
    assert not step.gradients.buffer.any()
    assert step.loss.item() == 0.0
    assert equal([*step()], [*clean()]), "and the next step is what it would have been"
    assert equal(everything(step), everything(clean))
    assert step.skipped.item() == 1


def test_float16s_loss_scale_moves_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "GROWTH_INTERVAL", 3)
    step = make(replace(SETTINGS, dtype="float16"))
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([parameter], lr=0.0)
    for overflows in (True, False, False, False, True, False, True, False, False, False, False):
        step.gradients.buffer[0] = float("inf") if overflows else 1.0
        step.update()
        scaler.scale(parameter.sum() * (float("inf") if overflows else 1.0)).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
        assert step.loss_scale.item() == scaler.get_scale()
    assert step.skipped.item() == 3
    other = make(replace(SETTINGS, dtype="float16"))
    other.load_state(step.state())
    assert other.state() == step.state() == {"scale": scaler.get_scale(), "_growth_tracker": 1}
    assert not make().state(), "nothing to save elsewhere"


def test_a_step_without_its_batches_is_abandoned() -> None:
    settings = replace(SETTINGS, micro_batch=1)
    good = [ids(1, seed=n) for n in range(8)]

    class Stopped(Exception):
        pass

    class Stopping:
        """Raises in the middle of the second step, and then gives that step's batches again."""

        def __init__(self) -> None:
            self.rest = iter([*good[:6], None, *good[4:], *good])

        def __iter__(self) -> "Stopping":
            return self

        def __next__(self) -> tuple[Tensor, Tensor]:
            if (batch := next(self.rest)) is None:
                raise Stopped
            return batch

    shape = replace(SHAPE, resid_dropout=0.1)
    whole, cut = make(settings, shape, iter([*good, *good])), make(settings, shape, Stopping())
    assert equal([*whole()], [*cut()])
    with pytest.raises(Stopped):
        cut()
    assert cut.step == 1
    assert equal([cut.seed, cut.loss, cut.gradients.buffer], [whole.seed, whole.loss, whole.gradients.buffer])
    for _ in range(3):
        assert equal([*whole()], [*cut()])
    assert equal(everything(whole), everything(cut))


def test_float16_clips_and_reports_the_norm_without_its_scale() -> None:
    wide, narrow = make(), make(replace(SETTINGS, dtype="float16"))
    narrow.loss_scale.fill_(256.0)
    (loss, norm), (loss16, norm16) = wide(), narrow()
    assert loss16.item() == pytest.approx(loss.item(), rel=1e-3)
    assert norm16.item() == pytest.approx(norm.item(), rel=1e-2)
    assert norm.item() > SETTINGS.grad_clip, "so clipping is part of this"
    moments = [
        both.optimizers.state()[id(both.model.wpe.weight)]["exp_avg"].norm().item() for both in (wide, narrow)
    ]
    assert moments[1] == pytest.approx(moments[0], rel=1e-2), "AdamW's weights alone hide a wrong scale"


def test_micro_batches_of_any_shape_add_up() -> None:
    """Each counts the same: the mean of the means, as for equal ones."""
    parts = [ids(2), ids(2, seed=1), ids(1, 9, seed=2)]
    settings = SimpleNamespace(**vars(SETTINGS) | {"accumulation": 3})
    step = make(settings, batches=iter(parts))  # type: ignore[arg-type]
    model = copy.deepcopy(step.model)
    for p in model.parameters():
        p.grad = None
    expected = sum(model(*part) for part in parts) / 3
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    loss, ours = step()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ours.item() == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rates_follow_the_schedule_in_the_same_tensor(schedule: str) -> None:
    step = make(replace(SETTINGS, schedule=schedule, optimizer="muon"))
    adamw, muon = step.optimizers.all
    rate = adamw.param_groups[0]["lr"]
    for number in range(20):
        step()
        factor = lr_factor(number, step.config)
        assert all(group["lr"] is rate for group in adamw.param_groups)
        assert rate.item() == pytest.approx(SETTINGS.lr * factor, rel=1e-6)
        assert muon.param_groups[0]["lr"] == SETTINGS.muon_lr * factor
