"""Optimizers and learning-rate schedules: which parameter is updated how, and how fast at which step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from .config import TrainConfig


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of one model; each of its parameters belongs to exactly one of them."""

    all: tuple[Optimizer, ...]
    peak_lrs: tuple[float, ...]

    def set_lr(self, factor: float) -> None:
        """Set every learning rate to this share of its peak."""
        for optimizer, peak in zip(self.all, self.peak_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    def zero_grad(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Each parameter's state by the parameter's id."""
        return {id(p): state for optimizer in self.all for p, state in optimizer.state.items()}

    def load_state(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Put back what `state` returned; parameters that it lacks start afresh."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if id(p) in state:
                        optimizer.state[p] = state[id(p)]


def build_optimizers(model: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW for everything (Loshchilov and Hutter, 2019), or Muon for the blocks' matrices beside it (Jordan, 2024).

    Matrices and embeddings decay, vectors (biases and LayerNorms) do not.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    muon = {name: p for name, p in parameters.items() if p.dim() == 2 and name.startswith("h.")}
    if config.optimizer == "adamw":
        muon = {}
    rest = [p for name, p in parameters.items() if name not in muon]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    optimizers: list[Optimizer] = [AdamW(groups, lr=config.lr, betas=betas, fused=True)]
    peak_lrs = [config.lr]
    if muon:
        optimizers.append(Muon(list(muon.values()), lr=config.muon_lr, weight_decay=config.weight_decay))
        peak_lrs.append(config.muon_lr)
    return Optimizers(tuple(optimizers), tuple(peak_lrs))


def lr_factor(step: int, config: TrainConfig) -> float:
    """The learning rate at a step (from 0), as a share of its peak: linear warm-up, then the schedule.

    cosine: Loshchilov and Hutter (2017); wsd (warm-up, stable, decay): Hu et al. (2024, MiniCPM).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.steps - round(config.cooldown_fraction * config.steps))
    progress = min(max((step - start) / max(config.steps - start, 1), 0.0), 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm together is at most max_norm (0: leave them); returns the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm > 0.0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
