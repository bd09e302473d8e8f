"""What is compiled ahead is what a run launches: every kernel's specialisation is noted, as Triton would tell them apart.

No kernel runs here: of a launch only the arguments count, and bfloat16 can be looked at too.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.device import DTYPES
from fusedgpt.gpt.evaluate import mean_loss
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.train import precompile as precompile_module
from fusedgpt.gpt.train.precompile import operator_calls, run
from fusedgpt.gpt.train.step import TrainStep
from fusedgpt.kernels import use_backend
from fusedgpt.kernels._triton import INTERPRETED, TensorDescriptor, tl

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can be watched")

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    300,
    context_length=24,
    n_layer=3,
    n_head=2,
    n_embd=32,
    bias=True,
    embd_dropout=0.1,
    attn_dropout=0.1,
    resid_dropout=0.1,
)
NO_DROPOUT = replace(SHAPE, embd_dropout=0.0, attn_dropout=0.0, resid_dropout=0.0)
SETTINGS = TrainConfig(steps=4, batch_size=4, micro_batch=2, dtype="bfloat16", warmup_steps=0)
RUNS = {
    "gpt2": (SHAPE, SETTINGS),
    "without dropout": (NO_DROPOUT, SETTINGS),
    "float32 residual": (SHAPE, replace(SETTINGS, float32_residual=True)),
    "float32": (SHAPE, replace(SETTINGS, dtype="float32")),
    "float16, recomputed": (SHAPE, replace(SETTINGS, dtype="float16", activation_checkpointing=True)),
    "no biases, untied": (replace(SHAPE, bias=False, tie_weights=False), SETTINGS),
    "smoothed": (SHAPE, replace(SETTINGS, label_smoothing=0.1, z_loss=1e-4)),
    "no query biases": (replace(SHAPE, qkv_bias=False), SETTINGS),
    "post-norm": (replace(SHAPE, norm="post"), SETTINGS),
    "wide rows, few tokens": (replace(SHAPE, n_embd=144, context_length=3), replace(SETTINGS, micro_batch=1)),
    "odd sizes": (replace(SHAPE, n_embd=54, context_length=23), SETTINGS),
    "many rows": (
        replace(SHAPE, n_embd=64, context_length=64),
        replace(SETTINGS, batch_size=8, micro_batch=8),
    ),
}
Launch = tuple[Any, ...]


def kind(value: Any, constant: bool, specialised: bool) -> Any:
    """What of an argument Triton compiles for."""
    if constant or value is None:
        return value
    if isinstance(value, tl.constexpr):
        return value.value
    if isinstance(value, tuple):  # Triton specialises every member, whatever do_not_specialize says
        return tuple(kind(member, False, True) for member in value)
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    if isinstance(value, Tensor):
        return value.dtype, specialised and value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return float
    wide = not -(2**31) <= value < 2**31
    return (wide, specialised and value == 1, specialised and value % 16 == 0)


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Launch]]:
    from triton.runtime.interpreter import InterpretedFunction

    found: set[Launch] = set()

    def watched(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        unspecialised = self.kwargs.get("do_not_specialize") or []
        signature = inspect.signature(self.fn)
        given = {name: options.pop(name) for name in [*options] if name in signature.parameters}
        bound = signature.bind(*args, **given).arguments
        kinds = tuple(
            (
                name,
                kind(
                    value,
                    signature.parameters[name].annotation != inspect.Parameter.empty,
                    name not in unspecialised,
                ),
            )
            for name, value in bound.items()
        )
        found.add((f"{self.fn.__module__}.{self.fn.__name__}", kinds, tuple(sorted(options.items()))))

    with monkeypatch.context() as patch, use_backend("triton"):
        patch.setattr(InterpretedFunction, "run", watched)
        yield found


def ids(rows: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(300, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_launches_nothing_that_was_not_compiled_ahead(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, settings = RUNS[name]
    monkeypatch.setattr(precompile_module, "TOKENS", 128)  # below "many rows"
    before = torch.get_rng_state()
    with launches(monkeypatch) as ahead:
        precompile_module._compile(RunConfig(shape, settings), CPU)  # in its threads
    assert torch.equal(torch.get_rng_state(), before)
    model = GPT(shape)
    batch = ids(settings.sequences, shape.context_length)
    with launches(monkeypatch) as evaluated:
        mean_loss(model, [batch, ids(1, shape.context_length)], DTYPES[settings.dtype])
    with launches(monkeypatch) as trained:
        step = TrainStep(model, build_optimizers(model, settings), repeat(batch), settings)
        for _ in range(2):
            step()
    assert evaluated
    assert trained - evaluated
    for launch in (trained | evaluated) - ahead:
        same = [kinds for kernel, kinds, _ in ahead if kernel == launch[0]]
        pytest.fail(
            f"{launch[0]} is compiled late:\n{launch[1:]}\nahead there were\n" + "\n".join(map(str, same))
        )
    assert ahead <= trained | evaluated, "compiled for nothing"


@pytest.mark.parametrize("name", RUNS)
def test_two_threads_never_compile_one_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    with use_backend("triton"):
        threads = operator_calls(RunConfig(*RUNS[name]), CPU)
    for thread, calls in threads.items():
        with launches(monkeypatch) as launched:
            run(calls)
        for kernel in {launch[0] for launch in launched}:
            assert found.setdefault(kernel, thread) == thread, kernel
    assert len(set(found.values())) >= 7, "side by side"


def test_what_cannot_be_compiled_ahead_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(calls: list[Any]) -> None:
        if "attention" in str(calls[0][0]):
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(precompile_module, "run", fail)
    caplog.set_level("DEBUG", "fusedgpt")
    with use_backend("triton"):
        precompile_module._compile(RunConfig(SHAPE, SETTINGS), CPU)
    assert caplog.messages
    assert all(re.fullmatch(r"\w*attention\w* could not be compiled ahead", text) for text in caplog.messages)
    assert "RuntimeError: no such instruction" in caplog.text

    caplog.clear()
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(precompile_module, "_compile", lambda *_: 1 / 0)
    precompile_module._precompile(RunConfig(SHAPE, SETTINGS), torch.device("cuda"))
    assert caplog.messages == ["the step could not be compiled ahead"]
    assert "ZeroDivisionError" in caplog.text


def test_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(precompile_module, "_compile", lambda *given: called.append(given))
    precompile_module._precompile(RunConfig(SHAPE, SETTINGS), CPU)
    assert not called


def test_plain_pytorch_needs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with launches(monkeypatch) as launched, use_backend("torch"):
        precompile_module._compile(RunConfig(SHAPE, SETTINGS), CPU)
    assert not launched
