"""Gradients, optimizers and learning-rate schedules."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from .config import TrainConfig

_ROW = 4096  # elements of the buffer whose squares are summed first


class FlatGradients:
    """The gradients of float32 parameters in one buffer, so that one call processes them all.

    Every `.grad` is a view of the buffer: zero it with `zero`, never set it to None.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        sizes = [-(-p.numel() // 32) * 32 for p in parameters]  # views start at multiples of 128 bytes
        device = parameters[0].device
        padding = -sum(sizes) % _ROW
        self.buffer = torch.zeros(sum(sizes) + padding, device=device)
        self.parts = self.buffer.split([*sizes, padding])  # by parameter; nothing but zeros in the last
        for p, part in zip(parameters, self.parts[:-1], strict=True):
            p.grad = part[: p.numel()].view_as(p)

    def norm(self) -> Tensor:
        """The global norm, by rows first: a CPU's single sum is off by 3e-3 at 40 M elements."""
        return torch.linalg.vector_norm(torch.linalg.vector_norm(self.buffer.view(-1, _ROW), dim=1))

    def zero(self) -> None:
        self.buffer.zero_()


@dataclass(frozen=True)
class Optimizers:
    """The optimizers of one model; each parameter belongs to exactly one."""

    all: tuple[Optimizer, ...]
    peak_lrs: tuple[float, ...]

    @property
    def capturable(self) -> bool:
        """Whether `step` can be captured in a CUDA graph: Muon's learning rate is a number on the host."""
        return all(isinstance(optimizer, AdamW) for optimizer in self.all)

    def set_lr(self, factor: float) -> None:
        """Set every learning rate to this fraction of its peak."""
        for optimizer, peak in zip(self.all, self.peak_lrs, strict=True):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(peak * factor)  # in place: a graph reads it
                else:
                    group["lr"] = peak * factor

    def step(self, divisor: Tensor | None, found_inf: Tensor) -> None:
        """Update the weights with the gradients divided by `divisor` (None: undivided); skip if found_inf is 1.

        Both are float32 scalars on the parameters' device. AdamW's kernel reads them there; Muon synchronises to read found_inf.
        """
        for optimizer in self.all:
            if isinstance(optimizer, AdamW):  # torch's fused kernel takes these as attributes, see GradScaler
                optimizer.grad_scale, optimizer.found_inf = divisor, found_inf  # type: ignore[attr-defined]
            elif found_inf.item():
                continue
            elif divisor is not None:
                grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
                torch._foreach_div_(grads, divisor)
            optimizer.step()

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Each parameter's state by the parameter's id."""
        return {id(p): state for optimizer in self.all for p, state in optimizer.state.items()}

    def load_state(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Restore what `state` returned; parameters missing from it start afresh. Call it before the first step: a graph keeps
        the addresses of the state it was captured with."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if id(p) in state:
                        optimizer.state[p] = state[id(p)]


def build_optimizers(model: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW for everything (Loshchilov and Hutter, 2019), or with Muon for the blocks' matrices (Jordan, 2024).

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
    device = next(iter(parameters.values())).device
    lr = torch.tensor(config.lr, device=device)
    adamw = AdamW(groups, lr=lr, betas=betas, fused=True, capturable=device.type == "cuda")
    optimizers: list[Optimizer] = [adamw]
    peak_lrs = [config.lr]
    if muon:
        optimizers.append(Muon(list(muon.values()), lr=config.muon_lr, weight_decay=config.weight_decay))
        peak_lrs.append(config.muon_lr)
    return Optimizers(tuple(optimizers), tuple(peak_lrs))


def lr_factor(step: int, config: TrainConfig) -> float:
    """The learning rate at a step (from 0) as a fraction of its peak: linear warm-up, then the schedule.

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
