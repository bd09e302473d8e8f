"""The training step that is measured: the model's shape, the batch and the dtype, by the name of a size."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...gpt.config import DROPOUTS, PRESETS, ModelConfig, nearest, preset
from ...gpt.device import pick_device, pick_dtype
from ..timing import memory

# (batch, configuration): sizes that two CPU cores step through in a fraction of a second
SMALL: dict[str, tuple[int, ModelConfig]] = {
    "tiny": (12, ModelConfig(65, context_length=64, n_layer=4, n_head=4, n_embd=128)),
    "small": (8, ModelConfig(4096, context_length=256, n_layer=4, n_head=4, n_embd=192)),
}
SIZES = (*SMALL, *(name for name in PRESETS if name.startswith("gpt2")))


@dataclass(frozen=True)
class Workload:
    """One training step: all that its implementations have in common."""

    size: str
    batch: int  # sequences
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype  # of the activations
    recompute: bool = False  # activation checkpointing

    @property
    def tokens(self) -> int:
        return self.batch * self.config.context_length

    @property
    def case(self) -> str:
        """The row's name for it: `gpt2, 64 x 1024, bfloat16`."""
        text = f"{self.size}, {self.batch} x {self.config.context_length}, {str(self.dtype)[6:]}"
        return text + (f", dropout {self.config.attn_dropout}" if self.config.attn_dropout else "")

    def batches(self, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Random tokens and the ones that follow them, without end, each (batch, T) on the device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.config.context_length + 1)
        while True:
            tokens = torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def full_workload(size: str | None = None, batch: int | None = None, dropout: float = 0.0) -> Workload:
    """The training step of a GPT-2 size as a large GPU does it, on CPU tensors that nobody computes with.

    Args:
        size: one of GPT-2's, gpt2 by default.
        batch: sequences of 1,024 tokens, the preset's micro-batch by default.
        dropout: all three rates.

    Raises:
        ValueError: an unknown size (the nearest is named), or an invalid batch or rate.
    """
    size, sizes = size or "gpt2", [name for name in SIZES if name not in SMALL]
    if size not in sizes:
        raise ValueError(
            f"size {size!r} is not GPT-2's{nearest(size, sizes) or '; it takes ' + ', '.join(sizes)}"
        )
    run = preset(size)
    config = replace(run.model, **dict.fromkeys(DROPOUTS, dropout))  # type: ignore[arg-type]
    own = int(run.train.micro_batch)
    return Workload(
        size, batch or own, config, torch.device("cpu"), torch.bfloat16, run.train.activation_checkpointing
    )


def workload(
    size: str | None = None, device_name: str = "auto", batch: int | None = None, dropout: float = 0.0
) -> Workload:
    """The training step of a size on this machine.

    On a GPU the gpt2 sizes have their preset's micro-batch of 1,024 tokens each, half of it below 100 GiB of memory and an
    eighth below 70; on a CPU one sequence of 256 tokens.

    Args:
        size: one of SIZES; by default gpt2 on a GPU and tiny on a CPU.
        device_name: auto, cpu, cuda, cuda:N.
        batch: sequences, instead of the size's own number.
        dropout: all three rates.

    Raises:
        ValueError: an unknown size (the nearest is named), no such device, or an invalid batch or rate.
    """
    device = pick_device(device_name)
    size = size or ("gpt2" if device.type == "cuda" else "tiny")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}{nearest(size, SIZES) or '; there are ' + ', '.join(SIZES)}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch = {batch} is not allowed; it takes a whole number from 1 up")
    recompute = False
    if size in SMALL:
        own, config = SMALL[size]
    elif device.type == "cuda":
        run = preset(size)
        own, config, recompute = int(run.train.micro_batch), run.model, run.train.activation_checkpointing
        # not an eighth at 80 GiB: 96 heads would take another backward of attention than a training run's 768
        shares = ((1, 100), (2, 70), (8, 0))
        own = max(own // next(share for share, least in shares if memory(device) >= least * 2**30), 1)
    else:
        own, config = 1, replace(preset(size).model, context_length=256)
    config = replace(config, **dict.fromkeys(DROPOUTS, dropout))  # type: ignore[arg-type]
    return Workload(size, batch or own, config, device, pick_dtype("auto", device), recompute)
