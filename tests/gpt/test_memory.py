"""What a step is said to need, against what autograd keeps; the micro-batch that fits; what an error names."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.train import memory
from fusedgpt.gpt.train.interruption import TrainingError
from fusedgpt.gpt.train.memory import estimate, explained, largest_micro_batch, remedies

CPU = torch.device("cpu")
SHAPE = ModelConfig(1000, context_length=64, n_layer=3, n_head=4, n_embd=64)
SETTINGS = TrainConfig(batch_size=4, dtype="float32")


def kept(shape: ModelConfig, settings: TrainConfig) -> int:
    """Bytes that the forward keeps for the backward, each storage once, weights and ids apart."""
    model = GPT(shape).train()
    ids = torch.zeros(settings.sequences, shape.context_length, dtype=torch.int64)
    own = {t.untyped_storage().data_ptr() for t in (ids, *model.parameters())}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(ids, ids, recompute=settings.activation_checkpointing)
    assert loss.requires_grad, "what is kept is alive while its addresses are counted"
    return sum(sizes.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layers_activations_are_what_autograd_keeps(checkpointing: bool) -> None:
    settings, fewer = replace(SETTINGS, activation_checkpointing=checkpointing), replace(SHAPE, n_layer=2)
    measured = kept(SHAPE, settings) - kept(fewer, settings)
    said = estimate(SHAPE, settings, CPU).activations - estimate(fewer, settings, CPU).activations
    assert said == measured


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_are_what_they_are(tied: bool, optimizer: str) -> None:
    shape, settings = replace(SHAPE, tie_weights=tied), replace(SETTINGS, optimizer=optimizer)
    model = GPT(shape)
    optimizers = build_optimizers(model, settings)
    model(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)).backward()
    optimizers.step(None, torch.zeros(()))
    said = estimate(shape, settings, CPU)
    weights = sum(4 * p.numel() for p in model.parameters())
    assert said.weights == said.gradients == weights
    moments = sum(t.nbytes for parts in optimizers.state().values() for t in parts.values() if t.dim())
    assert said.optimizer == moments


def test_remedies_name_only_what_helps_and_by_how_much() -> None:
    shape, settings = ModelConfig(), TrainConfig(batch_size=64, micro_batch=32, dtype="float32")
    text = remedies(shape, settings, CPU)
    half = estimate(shape, replace(settings, micro_batch=16), CPU).total
    less = estimate(shape, settings, CPU).total - half
    assert f"--micro-batch 16 {less / 2**30:.1f} GiB less" in text
    for flag in (
        "--activation-checkpointing",
        "--dtype bfloat16",
        "--context-length 512",
        "--micro-batch auto",
    ):
        assert flag in text
    small = replace(settings, micro_batch=1, activation_checkpointing=True, dtype="bfloat16")
    text = remedies(shape, small, CPU)
    for flag in ("--micro-batch", "--activation-checkpointing", "--dtype"):
        assert flag not in text
    assert "--micro-batch 7 " in remedies(shape, replace(settings, batch_size=21, micro_batch=21), CPU)


def test_running_out_becomes_an_error_that_helps() -> None:
    with (
        pytest.raises(TrainingError, match=r"out of memory: .*4 x 64 tokens.*--micro-batch 2"),
        explained(SHAPE, SETTINGS, CPU),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("batch", "limit", "expected"),
    [
        (64, 64, 64),
        (64, 63, 32),
        (512, 20, 16),
        (12, 12, 12),
        (12, 11, 4),
        (96, 50, 32),
        (45, 20, 15),
        (7, 6, 1),
    ],
)
def test_the_largest_divisor_that_fits(
    batch: int, limit: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fits(config: RunConfig, size: int, device: torch.device) -> bool:
        tried.append(size)
        return size <= limit

    monkeypatch.setattr(memory, "_fits", fits)
    config = RunConfig(SHAPE, replace(SETTINGS, batch_size=batch, micro_batch="auto"))
    assert largest_micro_batch(config, torch.device("cuda")) == expected
    assert batch % expected == 0
    assert len(tried) <= 4, "bisection"
    assert largest_micro_batch(config, CPU) == batch


def test_not_even_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_fits", lambda *_: False)
    monkeypatch.setattr(
        memory, "remedies", lambda shape, settings, device: f"{settings.micro_batch} needs 9 GiB"
    )
    with pytest.raises(TrainingError, match="out of memory: 1 needs 9 GiB"):
        largest_micro_batch(RunConfig(SHAPE, SETTINGS), torch.device("cuda"))


def test_a_step_beyond_the_memory_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    need = estimate(SHAPE, SETTINGS, CPU).total
    monkeypatch.setattr(memory, "total_memory", lambda _: need)
    memory.require_room(RunConfig(SHAPE, SETTINGS), CPU)
    monkeypatch.setattr(memory, "total_memory", lambda _: need - 1)
    with pytest.raises(
        TrainingError, match=r"^runs/x: this machine has .* GiB, and a step of 4 x 64 .*What helps: --micro"
    ):
        memory.require_room(RunConfig(SHAPE, SETTINGS), CPU, "runs/x: ")
