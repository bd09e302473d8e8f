"""A run proves its kernels before the first step: what is wrong is replaced, alone, and said; what is right is left alone.

The kernels run in Triton's interpreter and are broken on purpose.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedgpt import kernels
from fusedgpt.gpt import doctor
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.metrics import read_metrics
from fusedgpt.gpt.train import precompile, preparation
from fusedgpt.gpt.train import verify as module
from fusedgpt.gpt.train.interruption import TrainingError
from fusedgpt.gpt.train.loop import train
from fusedgpt.gpt.train.verify import verify
from fusedgpt.gpt.verdicts import read_verdicts
from fusedgpt.kernels import explain, use_backend
from fusedgpt.kernels._triton import INTERPRETED
from fusedgpt.kernels.backend import choose, replaced

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels are broken in the interpreter")

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    29,
    context_length=16,
    n_layer=1,
    n_head=1,
    n_embd=16,
    embd_dropout=0.1,
    attn_dropout=0.1,
    resid_dropout=0.1,
)
SETTINGS = TrainConfig(
    tokenizer="char",
    steps=2,
    batch_size=2,
    micro_batch=1,
    device="cpu",
    dtype="float32",
    backend="triton",
    eval_windows=2,
    sample_tokens=2,
    log_interval=1,
)
CONFIG = RunConfig(SHAPE, SETTINGS)
# the launcher of a forward of each operator of the model: module and name
LAUNCHERS = {
    "embed": (kernels.embed, "_embed"),
    "layer_norm": (kernels.layer_norm, "_layer_norm"),
    "add_layer_norm": (kernels.add_layer_norm, "_add_layer_norm"),
    "linear": (kernels.linear, "_linear"),
    "attention": (kernels.causal_attention, "_packed_attention"),
    "gelu_mlp": (kernels.gelu_mlp, "_gelu_mlp"),
    "linear_cross_entropy": (kernels.linear_cross_entropy, "_loss_with_gradients"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    with use_backend("triton"):
        yield tmp_path / "cache"


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were compared, in turn."""
    found: list[str] = []
    original = module._fault

    def fault(example: Any, *rest: Any) -> str:
        found.append(example.operator)
        return original(example, *rest)

    monkeypatch.setattr(module, "_fault", fault)
    return found


def with_train(config: RunConfig = CONFIG, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


@contextmanager
def broken(operator: str, how: Callable[[Any], Any]) -> Iterator[None]:
    """The operator's kernels give how(what they gave)."""
    function, name = LAUNCHERS[operator]
    home = sys.modules[function.__module__]
    right = getattr(home, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, name, lambda *given: how(right(*given)))
        yield


def off(result: Any) -> Any:
    """A little wrong, in the first output."""
    return (result[0] * 1.001, *result[1:]) if isinstance(result, tuple) else result * 1.001


def fails(result: Any) -> Any:
    raise RuntimeError("no such tile\nand a long trace")


def test_right_kernels_are_left_alone_and_compared_once(
    compared: list[str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    verify(CONFIG, CPU)
    assert set(compared) == set(LAUNCHERS)
    assert replaced() == {}
    assert torch.equal(torch.get_rng_state(), state), "it draws from generators of its own"
    count = len(compared)
    verify(CONFIG, CPU)
    verify(with_train(batch_size=8, lr=1.0), CPU)
    assert len(compared) == count, "kept in the user's cache"
    verify(replace(CONFIG, model=replace(SHAPE, attn_dropout=0.3)), CPU)
    assert compared[count:] == ["attention"], "only what is new"
    verify(replace(CONFIG, model=replace(SHAPE, gelu="exact")), CPU)
    assert compared[count + 1 :] == ["gelu_mlp"] * 2, "trained and evaluated"
    assert len(list((cache / "verified").iterdir())) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("operator", LAUNCHERS)
def test_a_wrong_kernel_is_replaced_alone(operator: str, capsys: pytest.CaptureFixture[str]) -> None:
    with broken(operator, off):
        verify(CONFIG, CPU)
    assert [*replaced()] == [operator]
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1
    assert f"the kernel of {operator} is wrong here" in warning
    assert "relative error 1." in warning
    assert module.REPORT in warning


@pytest.mark.parametrize("operator", ["linear", "attention"])
def test_a_kernel_that_does_not_compile_is_replaced_and_says_why(
    operator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with broken(operator, fails):
        verify(CONFIG, CPU)
    assert [*replaced()] == [operator]
    warning = capsys.readouterr().err
    assert "RuntimeError: no such tile." in warning
    assert "trace" not in warning


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    home = sys.modules[kernels.linear.__module__]
    monkeypatch.setattr(home, "column_sum", lambda rows: rows[:-1].float().sum(0))
    verify(CONFIG, CPU)
    assert [*replaced()] == ["linear"]


def test_every_number_that_is_not_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with broken("layer_norm", lambda result: (result[0] * float("nan"), *result[1:])):
        verify(CONFIG, CPU)
    assert [*replaced()] == ["layer_norm"]


def test_what_failed_once_is_not_launched_again(
    compared: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with broken("attention", off), use_backend("triton"):
        verify(CONFIG, CPU)
        assert "attention" in replaced()
    assert replaced() == {}, "the switch ends with the block of use_backend"
    count = len(compared)
    capsys.readouterr()
    with use_backend("triton"):
        verify(CONFIG, CPU, known=True)
        assert [*replaced()] == ["attention"]
        assert capsys.readouterr().err.count("the kernel of attention is wrong here") == 1
        verify(CONFIG, CPU)
        assert capsys.readouterr().err == "", "said once"
    assert len(compared) == count
    (line,) = [example for example, fault in read_verdicts(CPU).items() if fault]
    assert line.startswith("attention 1 x 15 x 3 x 16")


def test_known_compares_nothing(compared: list[str]) -> None:
    verify(CONFIG, CPU, known=True)
    assert compared == []


def test_other_kernels_or_another_version_are_compared_anew(
    compared: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(CONFIG, CPU)
    count = len(compared)
    monkeypatch.setattr("fusedgpt.gpt.verdicts.__version__", "next")
    verify(CONFIG, CPU)
    assert len(compared) == 2 * count
    changed = tmp_path / "kernels"
    changed.mkdir()
    (changed / "linear.py").write_text("another kernel")
    monkeypatch.setattr(kernels, "__file__", str(changed / "__init__.py"))
    verify(CONFIG, CPU)
    assert len(compared) == 3 * count


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"embed": 3}', '{"embed": null}', "[" * 100_000, "\x00", "1"]
)
def test_a_damaged_file_is_no_verdict(content: str, compared: list[str], cache: Path) -> None:
    verify(CONFIG, CPU)
    count = len(compared)
    (file,) = (cache / "verified").iterdir()
    file.write_text(content)
    verify(CONFIG, CPU)
    assert len(compared) == 2 * count
    assert set(json.loads(file.read_text()).values()) == {""}


def test_strict_ends_the_run_and_off_looks_at_nothing(compared: list[str]) -> None:
    with broken("embed", off):
        verify(with_train(verify="off"), CPU)
        assert compared == []
        for _ in range(2):  # found, and known
            with pytest.raises(
                TrainingError, match=r"the kernel of embed is wrong.*--verify strict ends the run.*/issues"
            ):
                verify(with_train(verify="strict"), CPU)
    assert len(compared) == 1


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_where_no_kernel_runs_nothing_is_compared_or_printed(
    backend: str, compared: list[str], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with use_backend(backend):
        verify(CONFIG, CPU)
    assert compared == []
    assert not cache.exists()
    assert capsys.readouterr() == ("", "")


def test_explain_and_doctor_say_it() -> None:
    with broken("gelu_mlp", off):
        verify(CONFIG, CPU)
    x = torch.zeros(1)
    assert explain("gelu_mlp", x).startswith(
        "gelu_mlp runs in plain PyTorch for float32 on cpu: its kernel was found wrong when this run began: relative error"
    )
    assert explain("linear", x) == "linear runs in its Triton kernel for float32 on cpu: it was asked for."
    assert "gelu_mlp" in dict(doctor.facts(CPU))["WRONG"]


def test_dynamo_takes_a_switch_for_a_constant() -> None:
    taken: list[str] = []

    @torch.compiler.disable
    def note(backend: str) -> None:
        taken.append(backend)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + (1.0 if choose("linear", x).backend == "triton" else 2.0)

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.zeros(3)
    assert compiled(x).tolist() == [1.0] * 3
    with broken("linear", off):
        verify(CONFIG, CPU)
    assert compiled(x).tolist() == [2.0] * 3


def records(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return with_train(data=str(tmp_path / "text.txt"), sample_tokens=0, eval_windows=1, micro_batch=0)


@pytest.mark.parametrize("how", [off, fails])
def test_a_run_with_a_broken_operator_ends_well_and_launches_it_no_more(
    how: Callable[[Any], Any], run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(with_train(run_config, backend="torch"), tmp_path / "plain")
    assert "warning" not in capsys.readouterr().err
    calls: list[int] = []

    def noted(result: Any) -> Any:
        calls.append(len(records(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0)
        return how(result)

    with broken("attention", noted):
        train(run_config, tmp_path / "run")
    assert calls
    assert not any(calls), "before the first line of the log alone"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    out, err = capsys.readouterr()
    assert err.count("warning: ") == 1
    assert "the kernel of attention is wrong here" in err
    assert "attention runs in plain PyTorch for float32 on cpu: its kernel was found wrong" in out
    assert replaced() == {}, "for this run"


def test_strict_ends_a_run_before_its_first_step(run_config: RunConfig, tmp_path: Path) -> None:
    with broken("gelu_mlp", off), pytest.raises(TrainingError, match="the kernel of gelu_mlp is wrong"):
        train(with_train(run_config, verify="strict"), tmp_path / "run")
    assert records(tmp_path / "run") == []


def test_the_largest_micro_batch_is_sought_with_verified_kernels(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def largest(*_: Any) -> int:
        seen.append([*replaced()])
        return 1

    monkeypatch.setattr(preparation, "largest_micro_batch", largest)
    with broken("layer_norm", off):
        train(with_train(run_config, micro_batch="auto"), tmp_path / "run")
    assert seen == [["layer_norm"]]


def test_what_is_known_to_be_wrong_is_not_compiled_ahead(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[set[str]] = []
    original = preparation.precompile

    def noted(config: RunConfig, device: torch.device) -> Any:
        ahead.append({*precompile.operator_calls(config, device)})
        return original(config, device)

    monkeypatch.setattr(preparation, "precompile", noted)
    for run in ("first", "second"):
        with broken("attention", off):
            train(with_train(run_config, steps=1), tmp_path / run)
    first, second = ahead
    assert first - second == {"packed_attention", "packed_attention_backward"}
    assert second - first == {"dropout_words"}  # plain PyTorch's mask
