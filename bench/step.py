"""The whole training step (forward, backward, clipping, AdamW) beside other GPT-2 implementations, in one run.

The sides take turns, step by step, on the same random batches, so a machine whose speed drifts favours none; what is
reported is the median of each side and the median of the ratios of neighbouring steps. Before any time is printed the
first losses are compared.
"""

import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..gpt.config import ModelConfig
from ..gpt.model import GPT
from ..gpt.train.metrics import Speedometer
from ..kernels import use_backend
from .peers import Peer, build_model, fusedgpt, nanogpt, transformers_gpt2
from .timing import memory

# (batch, configuration): sizes that two CPU cores step through in a fraction of a second
SIZES: dict[str, tuple[int, ModelConfig]] = {
    "tiny": (12, ModelConfig(65, context_length=64, n_layer=4, n_head=4, n_embd=128)),
    "small": (8, ModelConfig(4096, context_length=256, n_layer=4, n_head=4, n_embd=192)),
    "gpt2": (1, ModelConfig(50257, context_length=256)),
}
LOSS_TOLERANCE = 2e-3  # relative; nanoGPT's exact GELU differs by less, and so does bfloat16


@dataclass
class Row:
    """One side of a comparison."""

    name: str
    milliseconds: float
    tokens_per_second: float
    ratio: float  # its time over ours
    loss: float
    mfu: float | None = None  # on a GPU whose peak is known
    gigabytes: float | None = (
        None  # on a GPU: the most that the step needs beside weights and optimizer state
    )


def run_step(
    size: str = "tiny", rounds: int = 60, nanogpt_folder: Path | None = None, out: Path | None = None
) -> list[Row]:
    """Time a training step of every side and print a table.

    Args:
        size: tiny, small or gpt2.
        rounds: steps of each side; the first tenth are warm-up.
        nanogpt_folder: a clone of nanoGPT, to compare with it too (without biases, as it trains by default).
        out: write the figures there as JSON.

    Raises:
        ValueError: an unknown size.
        RuntimeError: a side computes another loss than ours.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
    batch, config = SIZES[size]
    console = Console(highlight=False)
    ours = build_model(config)
    sides = [fusedgpt(ours)]
    try:
        sides.append(transformers_gpt2(ours))
    except ImportError:
        console.print("transformers is not installed and left out: pip install 'fusedgpt[bench]'")
    rows = _compare(sides, batch, config, rounds)
    if nanogpt_folder is not None:
        unbiased = ModelConfig(**{**vars(config), "bias": False})
        ours = build_model(unbiased)
        pair = _compare([fusedgpt(ours), nanogpt(ours, nanogpt_folder)], batch, unbiased, rounds)
        pair[0].name += ", no biases"
        rows += pair
    console.print(_table(rows, size, batch, config))
    if out:
        record = {"size": size, "machine": _machine(), "rows": [vars(row) for row in rows]}
        out.write_text(json.dumps(record, indent=1) + "\n")
    return rows


def gpu_sides(device: torch.device) -> Iterator[Row]:
    """GPT-2 124M in bfloat16 on a GPU: ours with and without kernels, and transformers' GPT-2 with and without compile."""
    config = ModelConfig()
    batch = 32 if memory(device) >= 100 * 2**30 else 8
    dtype = torch.bfloat16

    def build() -> GPT:
        return build_model(config).to(device)

    def plain(inputs: Tensor, targets: Tensor) -> Tensor:
        with use_backend("torch"):
            return without(inputs, targets, dtype=dtype)

    ours, without = build(), build()
    sides = [fusedgpt(ours, dtype), Peer("fusedgpt, plain PyTorch", without, plain)]
    yield from _compare(sides, batch, config, 20)
    try:
        sides = [sides[0], transformers_gpt2(ours, dtype)]
        yield from _compare(sides, batch, config, 20)[1:]
        sides[1] = transformers_gpt2(ours, dtype, compiled=True)
    except ImportError:
        print("transformers is not installed and left out")
        return
    yield from _compare(sides, batch, config, 20)[1:]


def _compare(sides: list[Peer], batch: int, config: ModelConfig, rounds: int) -> list[Row]:
    """Rows of sides that start from the same weights; the first side is ours."""
    device = next(sides[0].model.parameters()).device
    optimizers = [torch.optim.AdamW(side.model.parameters(), lr=1e-4, fused=True) for side in sides]
    times: list[list[float]] = [[] for _ in sides]
    losses: list[list[float]] = [[] for _ in sides]
    peaks = [0] * len(sides)
    generator = torch.Generator().manual_seed(1)
    for _ in range(rounds):
        tokens = torch.randint(config.vocab_size, (batch, config.context_length + 1), generator=generator)
        tokens = tokens.to(device)
        for i, side in enumerate(sides):
            held = _begin(device)
            start = time.perf_counter()
            loss = side.loss(tokens[:, :-1], tokens[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
            optimizers[i].step()
            optimizers[i].zero_grad(set_to_none=True)
            losses[i].append(loss.item())  # waits for the device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peaks[i] = max(peaks[i], torch.cuda.max_memory_allocated(device) - held)
            times[i].append(time.perf_counter() - start)
    for i, side in enumerate(sides):
        if abs(losses[i][0] - losses[0][0]) > LOSS_TOLERANCE * losses[0][0]:
            raise RuntimeError(
                f"{side.name} computes a loss of {losses[i][0]}, ours is {losses[0][0]}: not comparable"
            )
    model = sides[0].model
    parameters = model.num_params(position_embeddings=False) if isinstance(model, GPT) else 0
    meter = Speedometer(config, parameters, device)
    warm = max(rounds // 10, 1)
    rows = []
    for i, side in enumerate(sides):
        seconds = statistics.median(times[i][warm:])
        tokens_per_second = batch * config.context_length / seconds
        ratio = statistics.median(a / b for a, b in zip(times[i][warm:], times[0][warm:], strict=True))
        mfu = meter.flops_per_token * tokens_per_second / meter.peak if meter.peak else None
        gigabytes = peaks[i] / 1e9 if peaks[i] else None
        rows.append(Row(side.name, 1e3 * seconds, tokens_per_second, ratio, losses[i][0], mfu, gigabytes))
    return rows


def _begin(device: torch.device) -> int:
    """Start a measurement of memory; returns the bytes in use before it."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _table(rows: list[Row], size: str, batch: int, config: ModelConfig) -> Table:
    table = Table(
        title=f"training step, {size}: {batch} x {config.context_length} tokens, {config.n_layer} layers of "
        f"{config.n_embd}, vocabulary {config.vocab_size:,}; {_machine()}",
        title_justify="left",
    )
    for heading in ("side", "ms", "tokens/s", "its time over ours", "first loss"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.milliseconds:.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.ratio:.2f}",
            f"{row.loss:.4f}",
        )
    return table


def _machine() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
