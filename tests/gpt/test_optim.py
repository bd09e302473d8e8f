"""Parameter groups and schedules, against torch's own schedulers and closed forms. Clipping is in test_step.py."""

from dataclasses import replace

import pytest
import torch

from fusedgpt.gpt.config import ModelConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers, lr_factor

SHAPE = ModelConfig(50, context_length=8, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_updated_by_one_optimizer_and_only_matrices_decay(optimizer):
    model = GPT(SHAPE)
    optimizers = build_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.3))
    groups = [group for o in optimizers.all for group in o.param_groups]
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] == 0.3) == (p.dim() == 2)


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    model = GPT(SHAPE)
    _, muon = build_optimizers(model, TrainConfig(optimizer="muon")).all
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    assert taken == {id(p) for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("h.")}
    assert len(taken) == 4 * SHAPE.n_layer


def test_cosine_is_torchs_cosine_after_warmup():
    config = TrainConfig(steps=100, warmup_steps=10, min_lr_ratio=0.1, lr=1.0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    for step in range(10, 101):
        assert lr_factor(step, config) == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 100, 0.2),
        ("linear", 55, 0.6),
        ("linear", 100, 0.2),
        ("constant", 99, 1.0),
        ("wsd", 74, 1.0),
        ("wsd", 75, 1.0),
        ("wsd", 80, 1 - 0.8 * 5 / 25),
        ("wsd", 100, 0.2),
    ],
)
def test_schedules_at_their_corners(schedule, step, factor):
    config = TrainConfig(
        steps=100, warmup_steps=10, min_lr_ratio=0.2, schedule=schedule, cooldown_fraction=0.25
    )
    assert lr_factor(step, config) == pytest.approx(factor)


def test_no_warmup_starts_at_the_peak():
    assert lr_factor(0, TrainConfig(warmup_steps=0)) == 1.0


def test_set_lr_scales_each_optimizer_by_its_own_peak():
    optimizers = build_optimizers(GPT(SHAPE), TrainConfig(optimizer="muon", lr=0.5, muon_lr=0.25))
    optimizers.set_lr(0.1)
    adamw, muon = optimizers.all
    assert [float(group["lr"]) for group in adamw.param_groups] == pytest.approx([0.05, 0.05])
    assert [group["lr"] for group in muon.param_groups] == [0.025]


def test_adamw_takes_the_step_of_the_paper():
    model = GPT(replace(SHAPE, n_layer=1))
    config = TrainConfig(lr=0.01, beta1=0.8, beta2=0.9, weight_decay=0.1)
    optimizers = build_optimizers(model, config)
    before = model.wte.weight.detach().clone()
    model.wte.weight.grad = torch.ones_like(before)
    optimizers.set_lr(1.0)
    for optimizer in optimizers.all:
        optimizer.step()
    expected = before * (1 - 0.01 * 0.1) - 0.01 * 1.0 / (
        1.0 + 1e-8
    )  # the first step's bias-corrected moments are 1
    torch.testing.assert_close(model.wte.weight.detach(), expected)
