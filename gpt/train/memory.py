"""Memory of a training step, by part; the largest micro-batch that fits; and what reduces it."""

import gc
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import repeat

import torch

from ...kernels.backend import choose
from ..config import ModelConfig, RunConfig, TrainConfig
from ..device import DTYPES, gib, total_memory
from ..model import GPT
from ..optim import build_optimizers
from .interruption import TrainingError
from .step import TrainStep

_CHUNK = 5120  # approximate rows of logits that the fused head holds at a time
_SPARE = 0.04  # fraction of a GPU left for evaluation, samples and fragmentation


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate(shape: ModelConfig, settings: TrainConfig, device: torch.device) -> Memory:
    """Estimate the peak memory of a step from the shape alone; dtype and micro-batch must be resolved.

    With P parameters, N = B T tokens per micro-batch, width C, L layers, H heads, V rows of vocabulary, a bytes per
    activation and r bytes per element of the residual stream:

        weights      4 P
        gradients    4 P
        optimizer    8 P for AdamW; 4 P for the matrices that Muon takes
        activations  N L (10 a C + 2 r C + 4 H + 16): each layer keeps y, q, k, v, attention's output, the MLP's input and
                     its pre-activation (1 + 3 + 1 + 1 + 4 times C), two states of the stream, log-sum-exps and LayerNorm's
                     statistics. Plain PyTorch keeps one more of 4 C, GELU's output, and in place of the
                     pre-activation GELU's slope in float32, unless GELU is exact.
                     Recomputed: N L (a + r) C and one layer's. Either way as much as one layer's for the backward's
                     gradients.
        head         fused: 5120 rows of logits, a V C for the weight's cast and 4 V C for its gradient;
                     in plain PyTorch 3 · 4 N V: log-softmax, its gradient and the logits'
    """
    n, c, layers = settings.sequences * shape.context_length, shape.n_embd, shape.n_layer
    a = DTYPES[settings.dtype].itemsize
    r = 4 if settings.float32_residual else a
    probe = torch.empty(0, dtype=DTYPES[settings.dtype], device=device)
    blocks = 12 * layers * c**2
    rows = shape.padded_vocab_size
    parameters = shape.parameters
    layer = n * (10 * a * c + 2 * r * c + 4 * shape.n_head + 16)
    if choose("gelu_mlp", probe).backend == "torch":
        layer += n * 4 * c * (4 if shape.gelu == "tanh" else a)
    kept = layers * layer
    if settings.activation_checkpointing:
        kept = layers * n * (a + r) * c + layer
    head = 12 * n * rows
    if choose("linear_cross_entropy", probe).backend == "triton":
        head = min(n, _CHUNK) * rows * a + (a + 4) * rows * c
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=8 * parameters - (4 * blocks if settings.optimizer == "muon" else 0),
        activations=kept + layer,
        head=head,
    )


def remedies(shape: ModelConfig, settings: TrainConfig, device: torch.device) -> str:
    """Describe the memory of a step, and how much less it takes with each setting that reduces it."""
    need = estimate(shape, settings, device)
    parts = ", ".join(f"{part} {gib(size)}" for part, size in asdict(need).items())
    options: list[tuple[str, tuple[ModelConfig, TrainConfig]]] = []
    if settings.sequences > 1:
        divisor = next(d for d in range(settings.sequences // 2, 0, -1) if settings.batch_size % d == 0)
        options.append((f"--micro-batch {divisor}", (shape, replace(settings, micro_batch=divisor))))
    if not settings.activation_checkpointing:
        flag = "--activation-checkpointing"
        options.append((flag, (shape, replace(settings, activation_checkpointing=True))))
    if settings.dtype == "float32":
        options.append(("--dtype bfloat16", (shape, replace(settings, dtype="bfloat16"))))
    if shape.context_length > 1:
        half = shape.context_length // 2
        shorter = replace(shape, context_length=half)
        options.append((f"--context-length {half} in a new run", (shorter, settings)))
    saved = [(flag, need.total - estimate(*option, device).total) for flag, option in options]
    helps = ", ".join(f"{flag} {gib(less)} less" for flag, less in saved if less > 0)
    return (
        f"a step of {settings.sequences} x {shape.context_length} tokens in {settings.dtype} needs about "
        f"{gib(need.total)} ({parts}). What helps: {helps or 'a smaller model'}"
        + (", --micro-batch auto (what fits)" if settings.sequences > 1 else "")
    )


def require_room(config: RunConfig, device: torch.device, where: str = "") -> None:
    """Refuse a run before anything of it is allocated.

    Args:
        config: with vocabulary, dtype and micro-batch resolved.
        device: of the run.
        where: begins the message.

    Raises:
        TrainingError: by `estimate`, a step needs more than all of the device's memory.
    """
    if estimate(config.model, config.train, device).total > (total := total_memory(device)):
        has = f"{where}{_named(device)} has {gib(total)}, and "
        raise TrainingError(f"{has}{remedies(config.model, config.train, device)}")


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"


@contextmanager
def explained(shape: ModelConfig, settings: TrainConfig, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error of a GPU or a CPU into one that names what helps.

    Raises:
        TrainingError: in place of torch.OutOfMemoryError, MemoryError and what torch raises for a CPU.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        has = f"{_named(device)} has {gib(total_memory(device))}, and "
        raise TrainingError(f"out of memory: {has}{remedies(shape, settings, device)}") from None


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "memory: you tried to allocate" in str(
        error
    )


def largest_micro_batch(config: RunConfig, device: torch.device) -> int:
    """The largest divisor of batch_size whose steps fit on the device; a power of two if one is not much smaller.

    On a GPU whole steps are tried, including their capture, on a model that is then discarded. On a CPU it is batch_size.

    Args:
        config: with vocabulary and dtype resolved.

    Raises:
        TrainingError: not even one sequence fits.
    """
    batch = config.train.batch_size
    if device.type != "cuda":
        return batch
    sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    fitting = bisect_left(sizes, True, key=lambda size: not _fits(config, size, device))
    if fitting == 0:
        raise TrainingError(
            f"out of memory: {remedies(config.model, replace(config.train, micro_batch=1), device)}"
        )
    largest = sizes[fitting - 1]
    power = max(size for size in sizes[:fitting] if size & (size - 1) == 0)
    return power if largest < batch and 2 * power > largest else largest


def _fits(config: RunConfig, size: int, device: torch.device) -> bool:
    """Whether steps of `size` sequences run and leave some memory free."""
    settings = replace(config.train, batch_size=size, micro_batch=size, verify="off")
    try:
        with torch.device(device):
            model = GPT(config.model)
            ids = torch.randint(config.model.vocab_size, (size, config.model.context_length))
        step = TrainStep(model, build_optimizers(model, settings), repeat((ids, ids)), settings)
        for _ in range(2):  # the second is captured
            step()
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return free >= _SPARE * total
    except torch.OutOfMemoryError:
        return False
    finally:
        model = step = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
