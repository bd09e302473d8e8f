"""One optimizer step: from batches to gradients, clipped, to updated weights.

Nothing here waits for the device: losses and norms are returned as tensors, dropout's seed is one that counts up on
the device.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import TrainConfig
from ..model import GPT
from ..optim import Optimizers, clip_gradients, lr_factor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainStep:
    """Forward, backward, clipping and update of one model on batches from `batches`.

    Args:
        model: on the device to train on, float32 weights.
        optimizers: of its parameters.
        batches: endless (inputs, targets), each (micro-batch, T) int64 on the model's device.
        config: the run's settings, with the dtype resolved.
        rank: of this process; decides which dropout masks it draws.
        step: the number of steps already done.
    """

    def __init__(
        self,
        model: GPT,
        optimizers: Optimizers,
        batches: Iterator[tuple[Tensor, Tensor]],
        config: TrainConfig,
        rank: int = 0,
        step: int = 0,
    ) -> None:
        self.model, self.optimizers, self.batches, self.config = model, optimizers, batches, config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = next(model.parameters()).device
        self.dtype = DTYPES[config.dtype]
        self.residual_dtype = torch.float32 if config.float32_residual else self.dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step = step
        # the run and the rank in the upper half, micro-steps counted in the lower: no generator state to save
        base = int.from_bytes(hashlib.sha256(f"{config.seed}/{rank}".encode()).digest()[:3], "big")
        self.seed = torch.tensor([(base << 32) + step * config.accumulation], device=self.device)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Do one step; returns its loss in nats a token and the gradients' norm before clipping, on the device."""
        self.model.train()
        self.optimizers.set_lr(lr_factor(self.step, self.config))
        loss = torch.zeros((), device=self.device)
        for _ in range(self.config.accumulation):
            loss += self._micro_step()
        for optimizer in self.optimizers.all:
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(self.parameters, self.config.grad_clip)
        for optimizer in self.optimizers.all:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.optimizers.zero_grad()
        self.step += 1
        return loss, norm

    def _micro_step(self) -> Tensor:
        inputs, targets = next(self.batches)
        loss = self.model(
            inputs,
            targets,
            seed=self.seed,
            dtype=self.dtype,
            residual_dtype=self.residual_dtype,
            recompute=self.config.activation_checkpointing,
        )
        loss = loss / self.config.accumulation
        self.scaler.scale(loss).backward()
        self.seed += 1  # only after the backward, which draws the forward's masks again
        return loss.detach()
