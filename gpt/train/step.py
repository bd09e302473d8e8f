"""One optimizer step: from batches to gradients, clipped, to updated weights.

Nothing here waits for the device. A step is two functions on tensors that stay where they are, so that a GPU can
replay each as one CUDA graph (`graph.py`) while a CPU calls them:

    micro_step   forward, backward into one flat buffer of gradients; the loss is added up, the dropout seed counted up
    update       the gradients' norm, clipping, AdamW, the loss scale, zeroing: learning rate and all else are tensors

A step whose loss or gradients are not finite changes neither weights nor optimizer; `skips` counts it.

The weights are float32 and have no bfloat16 copy: each operator casts what it reads, once in a micro-step. A copy written
after the update moves as many bytes where a step has one micro-step, 0.74 GB of 184 at GPT-2's size, and would be a second
set of weights for update, checkpoints and fine-tuning to keep in step.

The operators' matmuls add to the buffer themselves (`gradients_in_place`); autograd adds what they leave, biases and
LayerNorms. The update zeroes the buffer, 0.5 GB of the same 184: overwriting it in the first micro-step would leave every
weight wrong that no operator differentiates.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...kernels.matmul import gradients_in_place
from ..config import TrainConfig
from ..device import DTYPES
from ..model import GPT
from ..optim import FlatGradients, Optimizers, lr_factor
from .graph import Captured, Place

# float16's loss scale, as torch's GradScaler moves it: halved by a step that overflows, doubled after so many without
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class TrainStep:
    """Forward, backward, clipping and update of one model on batches from `batches`.

    From then on the parameters' `.grad` are views of one buffer, zero between steps. The optimizers' state and the
    weights must keep their addresses: load a checkpoint before the first step, or into the tensors that are there.

    Args:
        model: on the device to train on, float32 weights; those that do not require gradients stay as they are.
        optimizers: of its parameters.
        batches: endless (inputs, targets), each (micro-batch, T) int64 on the model's device; shapes may vary.
        config: the run's settings, with dtype and micro-batch resolved.
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
        self.before_update: Callable[[], None] = lambda: None  # a copy of the weights may be under way
        self.forward: Callable[..., Tensor] = model  # or the same through torch.compile: `compilation.py`
        self.device = model.wte.weight.device
        self.dtype = DTYPES[config.dtype]
        self.residual_dtype = torch.float32 if config.float32_residual else self.dtype
        self.step = step
        # the run and the rank in the upper half, micro-steps counted in the lower: no generator state to save
        self.base = int.from_bytes(hashlib.sha256(f"{config.seed}/{rank}".encode()).digest()[:3], "big") << 32
        self.seed = torch.tensor([self.base + step * config.accumulation], device=self.device)

        def scalar(value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((), value, dtype=dtype, device=self.device)

        self.gradients = FlatGradients([p for p in model.parameters() if p.requires_grad])
        self.loss = scalar()  # of this step's micro-steps so far
        self.result = torch.zeros(2, device=self.device)  # the last step's loss and gradient norm
        self.skips = torch.zeros(2, device=self.device)  # since a line of the log, and in a row at the end
        self.skipped, self.in_row = self.skips.unbind()
        self.found_inf = scalar()
        self.loss_scale = scalar(FIRST_SCALE if self.dtype == torch.float16 else 1.0)
        self.finite_steps = scalar(dtype=torch.int32)  # since the loss scale last moved
        self.whole = True  # False within the update: weights and optimizer belong to no step
        self.launched: list[torch.cuda.Event] = []  # the ends of a GPU's last micro-steps
        self.graphs: dict[str, Captured] = {}  # by the function's name; a bound method here would be a cycle
        if self.device.type == "cuda" and config.cuda_graph == "auto":
            place = Place(self.device)
            self.graphs["micro_step"] = Captured("forward and backward", place, config.verify)
            if optimizers.capturable:
                self.graphs["update"] = Captured("the update", place, config.verify)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Do one step; returns its loss in nats a token and the gradients' norm before clipping, on the device."""
        self.accumulate()
        return self.apply()

    def accumulate(self) -> None:
        """Add up the gradients of one step.

        Where anything in it raises, the step is abandoned: weights, optimizers and seed are those of the last step.
        """
        self.model.train()
        self.optimizers.set_lr(lr_factor(self.step, self.config))
        try:
            for _ in range(self.config.accumulation):
                self.run(self.micro_step, *next(self.batches))
                self._keep_up()
        except BaseException:
            self.abandon()
            raise

    def apply(self) -> tuple[Tensor, Tensor]:
        """Update the weights with what `accumulate` has added up; returns what a step returns."""
        self.before_update()
        self.whole = False
        self.run(self.update)
        self.step += 1
        self.whole = True
        loss, norm = self.result.clone()
        return loss, norm

    def _keep_up(self) -> None:
        """Let the host be two micro-steps ahead of a GPU at most: whoever waits for it, waits for no more than those."""
        if self.device.type != "cuda":
            return
        if len(self.launched) < 2:
            self.launched.append(torch.cuda.Event(blocking=True))
        else:
            self.launched.append(self.launched.pop(0))
            self.launched[-1].synchronize()  # the micro-step two before this one
        self.launched[-1].record(torch.cuda.current_stream(self.device))

    def run(self, function: Callable[..., None], *inputs: Tensor) -> None:
        """Call `micro_step` or `update`, as a CUDA graph where it has some."""
        if graphs := self.graphs.get(function.__name__):
            graphs(function, *inputs, changed=self.changed)
        else:
            function(*inputs)

    def changed(self, function: Callable[..., None]) -> list[Tensor]:
        """The tensors that `micro_step` or `update` changes."""
        if function.__name__ == "micro_step":
            return [*self.gradients.parts, self.loss, self.seed]
        states = [tensor for state in self.optimizers.state().values() for tensor in state.values()]
        numbers = [self.loss, self.result, self.skips, self.found_inf, self.loss_scale, self.finite_steps]
        return [*self.gradients.parts, *(p.detach() for p in self.model.parameters()), *states, *numbers]

    def micro_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Add the gradients of one batch to the buffer, its loss to the step's."""
        loss = self.forward(
            inputs,
            targets,
            seed=self.seed,
            dtype=self.dtype,
            residual_dtype=self.residual_dtype,
            recompute=self.config.activation_checkpointing,
            label_smoothing=self.config.label_smoothing,
            z_loss=self.config.z_loss,
        )
        with gradients_in_place():
            loss.backward(self.loss_scale / self.config.accumulation)
        self.loss += loss.detach() / self.config.accumulation
        self.seed += 1  # only after the backward, which draws the forward's masks again

    def abandon(self) -> None:
        """Throw away what this step's micro-steps have added up."""
        self.loss.zero_()
        self.gradients.zero()
        self.seed.fill_(self.base + self.step * self.config.accumulation)

    @torch.no_grad()
    def update(self) -> None:
        """Clip the gradients, update the weights unless loss or gradients are not finite, and clear the buffer."""
        norm = self.gradients.norm() / self.loss_scale
        self.found_inf.copy_(~torch.isfinite(norm + self.loss))
        clip, divisor = self.config.grad_clip, self.loss_scale if self.dtype == torch.float16 else None
        if clip > 0.0:  # 1e-6 as in torch's clip_grad_norm_
            divisor = self.loss_scale * ((norm + 1e-6) / clip).clamp(min=1.0)
        self.optimizers.step(divisor, self.found_inf)
        self.skips += self.found_inf
        self.in_row *= self.found_inf
        if self.dtype == torch.float16:
            torch._amp_update_scale_(
                self.loss_scale, self.finite_steps, self.found_inf, GROWTH, BACKOFF, GROWTH_INTERVAL
            )
        self.result.copy_(torch.stack([self.loss, norm]))
        self.loss.zero_()
        self.gradients.zero()

    def state(self) -> dict[str, Any]:
        """What resuming takes beside weights, optimizer and step: float16's loss scale."""
        if self.dtype != torch.float16:
            return {}
        return {"scale": self.loss_scale.item(), "_growth_tracker": int(self.finite_steps.item())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        self.loss_scale.fill_(state["scale"])
        self.finite_steps.fill_(state["_growth_tracker"])
