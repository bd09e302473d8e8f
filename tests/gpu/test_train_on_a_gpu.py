"""What only a GPU can show of training: steps as CUDA graphs, no waiting for the device, its memory, its profile."""

import gzip
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedgpt.data.loader import TokenLoader
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.evaluate import mean_loss
from fusedgpt.gpt.metrics import read_metrics
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.train import graph
from fusedgpt.gpt.train.interruption import TrainingError
from fusedgpt.gpt.train.memory import largest_micro_batch
from fusedgpt.gpt.train.precompile import precompile
from fusedgpt.gpt.train.step import TrainStep
from fusedgpt.gpt.train.verify import verify
from fusedgpt.gpt.verdicts import read_verdicts
from fusedgpt.kernels import use_backend
from fusedgpt.kernels._triton import INTERPRETED
from fusedgpt.kernels.backend import replaced

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU that Triton compiles for"
)

GPU = torch.device("cuda")
SHAPE = ModelConfig(
    500,
    context_length=64,
    n_layer=2,
    n_head=2,
    n_embd=128,
    embd_dropout=0.1,
    attn_dropout=0.1,
    resid_dropout=0.1,
)
NO_DROPOUT = replace(SHAPE, embd_dropout=0.0, attn_dropout=0.0, resid_dropout=0.0)
SETTINGS = TrainConfig(
    steps=40, batch_size=8, micro_batch=4, lr=1e-3, warmup_steps=5, dtype="bfloat16", device="cuda"
)
Batch = tuple[Tensor, Tensor]


def batches(*shapes: tuple[int, int]) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    for rows, length in cycle(shapes or [(4, 64)]):
        tokens = torch.randint(500, (rows, length + 1), generator=generator).to(GPU)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make(
    settings: TrainConfig = SETTINGS, shape: ModelConfig = SHAPE, data: Iterator[Batch] | None = None
) -> TrainStep:
    torch.manual_seed(0)
    with torch.device(GPU):
        model = GPT(shape)
    return TrainStep(model, build_optimizers(model, settings), data or batches(), settings)


def run(step: TrainStep, steps: int) -> list[Tensor]:
    """Losses and gradient norms of so many steps, and the weights after them."""
    results = torch.stack([torch.stack(step()) for _ in range(steps)])
    return [results, *(p.detach().clone() for p in step.model.parameters())]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def graphs(step: TrainStep) -> dict[str, int]:
    """How many graphs there are of each function."""
    assert not any(captured.failed for captured in step.graphs.values())
    return {name: len(captured.graphs) for name, captured in step.graphs.items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "muon"}, {"dtype": "float16"}, {"activation_checkpointing": True, "grad_clip": 0.0}],
    ids=["adamw", "muon", "float16", "checkpointing"],
)
def test_a_captured_step_has_the_losses_of_the_uncaptured(changes: dict) -> None:
    captured = make(replace(SETTINGS, **changes))
    plain = make(replace(SETTINGS, **changes, cuda_graph="off"))
    ours, theirs = run(captured, 20), run(plain, 20)
    assert not plain.graphs
    expected = {"micro_step": 1} if changes.get("optimizer") == "muon" else {"micro_step": 1, "update": 1}
    assert graphs(captured) == expected
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)  # the better message
    assert equal(ours, theirs)
    assert torch.equal(captured.seed, plain.seed)
    assert captured.step == plain.step == 20


def test_a_graph_with_other_losses_is_not_used(capfd: pytest.CaptureFixture[str]) -> None:
    class Counting(TrainStep):
        """Its loss takes a number from the host, which a capture keeps for ever."""

        calls = 0

        def micro_step(self, inputs: Tensor, targets: Tensor) -> None:
            super().micro_step(inputs, targets)
            self.calls += 1
            self.loss += 10.0 * self.calls

    torch.manual_seed(0)
    with torch.device(GPU):
        model = GPT(SHAPE)
    step = Counting(model, build_optimizers(model, SETTINGS), batches(), SETTINGS)
    ours, plain = run(step, 4), run(make(replace(SETTINGS, cuda_graph="off")), 4)
    assert step.graphs["micro_step"].failed
    assert len(step.graphs["update"].graphs) == 1
    assert equal(ours[1:], plain[1:]), "the comparison changes no bit of the weights"
    assert "the CUDA graph of forward and backward is wrong here" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_runs_kernels_are_right_here(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path))
    settings = replace(
        SETTINGS, dtype=dtype, micro_batch="auto"
    )  # attention's backward in one pass and in two
    memory = torch.cuda.memory_allocated(GPU)
    with use_backend("auto"):
        verify(RunConfig(SHAPE, settings), GPU)
        assert replaced() == {}
    assert capfd.readouterr().err == ""
    assert {*read_verdicts(GPU).values()} == {""}
    assert torch.cuda.memory_allocated(GPU) <= memory + 2**26, "cuBLAS's workspace at most"


def test_each_replay_draws_new_masks_and_repeats_nothing_else() -> None:
    batch = next(batches())
    still = replace(SETTINGS, batch_size=4, lr=0.0)
    step = make(still, data=repeat(batch))
    first = step.seed.item()
    losses = [step()[0].item() for _ in range(6)]
    assert len(set(losses)) == 6
    assert step.seed.item() == first + 6
    step = make(still, NO_DROPOUT, repeat(batch))
    assert len({step()[0].item() for _ in range(6)}) == 1


def test_nothing_waits_for_the_device_between_log_points() -> None:
    tokens = np.random.default_rng(0).integers(500, size=20_000).astype(np.uint16)
    step = make(data=TokenLoader([tokens], 64, 4, device=GPU))
    run(step, 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [step() for _ in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss, _ in results)
    assert graphs(step) == {"micro_step": 1, "update": 1}


@pytest.mark.parametrize("room", [8, 1])
def test_other_shapes_are_captured_too_as_far_as_there_is_room(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-steps a step and three shapes in turn: shapes change inside steps, with gradients in the buffer."""
    monkeypatch.setattr(graph, "MAX_SHAPES", room)
    shapes = [(4, 64), (3, 64), (4, 32)]
    captured = make(data=batches(*shapes))
    plain = make(replace(SETTINGS, cuda_graph="off"), data=batches(*shapes))
    assert equal(run(captured, 12), run(plain, 12))
    assert graphs(captured)["micro_step"] == min(3, room)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_that_is_not_finite_is_skipped_inside_the_graph(dtype: str) -> None:
    step, clean = (make(replace(SETTINGS, batch_size=4, dtype=dtype), data=batches()) for _ in range(2))
    run(step, 4)
    before = run(clean, 4)
    state = [t.clone() for parts in step.optimizers.state().values() for t in parts.values()]
    scale = step.loss_scale.item()
    held = step.seed.clone()
    step.run(step.micro_step, *next(batches()))
    step.gradients.buffer[5] = float("inf")
    step.run(step.update)
    assert step.skipped.item() == 1
    assert not step.gradients.buffer.any()
    assert equal([*step.model.parameters()], before[1:])
    assert equal([t for parts in step.optimizers.state().values() for t in parts.values()], state)
    assert step.loss_scale.item() == (scale / 2 if dtype == "float16" else 1.0)
    step.seed.copy_(held)  # the skipped step has drawn one
    if dtype == "bfloat16":
        assert equal(run(step, 3), run(clean, 3)), "and training goes on as if it had not been"


@pytest.mark.parametrize("changes", [{}, {"dtype": "float16", "float32_residual": True, "cuda_graph": "off"}])
def test_nothing_is_left_to_compile_for_the_first_step(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]), raising=False
    )
    shape, settings = replace(SHAPE, n_embd=192), replace(SETTINGS, **changes)  # a width of this test alone
    # 32 MiB for each thread that has called cuBLAS, before and after
    torch._C._cuda_clearCublasWorkspaces()
    state, memory = torch.cuda.get_rng_state(GPU), torch.cuda.memory_allocated(GPU)
    precompile(RunConfig(shape, settings), GPU).join()
    torch._C._cuda_clearCublasWorkspaces()
    assert len(compiled) >= 12, "and some that depend on no width, if no test before had them"
    assert torch.equal(torch.cuda.get_rng_state(GPU), state)
    assert torch.cuda.memory_allocated(GPU) <= memory + 2**20, "nothing is kept"
    ahead = len(compiled)
    step = make(settings, shape)
    mean_loss(step.model, [next(batches()), next(batches((1, 30)))], step.dtype)
    run(step, 3)
    assert compiled[ahead:] == []


@pytest.fixture
def train() -> Callable:
    """`gpt train`, which takes more libraries than a step does."""
    for package in ("regex", "safetensors", "msgspec", "rich", "matplotlib"):
        pytest.importorskip(package)
    from fusedgpt.gpt.train.loop import train

    return train


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    settings = replace(
        SETTINGS,
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        schedule="constant",
        steps=12,
        log_interval=1,
        eval_interval=4,
        save_interval=6,
        sample_tokens=8,
    )
    return RunConfig(replace(SHAPE, vocab_size=29), settings)  # what the char tokenizer has


def losses(folder: Path) -> list[float]:
    records = read_metrics(folder / "metrics.jsonl")
    return [record[key] for record in records for key in ("loss", "val_loss") if key in record]


def with_train(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))  # type: ignore[arg-type]


def test_evaluation_samples_checkpoints_and_resuming_go_around_the_graphs(
    config: RunConfig, train: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "whole")
    train(with_train(config, cuda_graph="off"), tmp_path / "plain")
    train(with_train(config, steps=6), tmp_path / "parts")
    train(config, tmp_path / "parts", resume=True)
    whole = losses(tmp_path / "whole")
    assert len(whole) == 12 + 4
    assert losses(tmp_path / "plain") == whole
    resumed = [r for r in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "loss" in r]
    straight = [r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in r]
    assert [r["loss"] for r in resumed] == [r["loss"] for r in straight]
    assert "warning" not in capfd.readouterr().err


def test_a_profile_shows_the_graphs_kernels(config: RunConfig, train: Callable, tmp_path: Path) -> None:
    train(with_train(config, steps=9, profile=True), tmp_path / "run")
    trace = json.loads(gzip.decompress((tmp_path / "run" / "trace.json.gz").read_bytes()))
    events = trace["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert sum("GraphLaunch" in event.get("name", "") for event in events) >= 3 * 3, (
        "two micro-steps and an update"
    )


@pytest.fixture
def one_gibibyte() -> Iterator[None]:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((2**30 + torch.cuda.memory_reserved()) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_the_largest_micro_batch_is_found(config: RunConfig, one_gibibyte: None) -> None:
    large = RunConfig(SHAPE, replace(SETTINGS, batch_size=4096, micro_batch="auto"))
    before = torch.cuda.memory_allocated()
    size = largest_micro_batch(large, GPU)
    assert size in {2**n for n in range(5, 12)}, "262,144 tokens do not fit, 2,048 do"
    assert largest_micro_batch(replace(large, train=replace(large.train, batch_size=24)), GPU) == 24
    assert torch.cuda.memory_allocated() < before + 2**28, "what was tried is gone"


def test_running_out_of_memory_says_what_helps(
    config: RunConfig, train: Callable, tmp_path: Path, one_gibibyte: None
) -> None:
    greedy = with_train(config, batch_size=4096, micro_batch=4096)
    with pytest.raises(
        TrainingError, match=r"out of memory: .* has .* GiB, and .*--micro-batch 2048 .* less"
    ):
        train(greedy, tmp_path / "run")


def test_a_step_that_cannot_be_captured_runs_uncaptured_and_says_so() -> None:
    """In a process of its own: a capture that fails may leave the context in any state."""
    program = """
        import torch
        from tests_gpu import make, run, SETTINGS, replace, TrainStep
        class Waiting(TrainStep):
            def micro_step(self, inputs, targets):
                super().micro_step(inputs, targets)
                self.loss.item()
        import tests_gpu
        plain = run(make(replace(SETTINGS, cuda_graph="off")), 6)
        tests_gpu.TrainStep = Waiting
        step = make()
        results = run(step, 6)
        assert step.graphs["micro_step"].failed
        assert all(torch.equal(a, b) for a, b in zip(plain, results, strict=True))
    """
    load = f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("tests_gpu", {__file__!r})
        module = sys.modules["tests_gpu"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(load) + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: forward and backward runs without a CUDA graph" in done.stderr
