"""Which implementation runs: forcing one, asking which, and what happens where the forced one cannot run."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedgpt import kernels
from fusedgpt.kernels import backend, explain, use_backend
from fusedgpt.kernels._triton import INTERPRETED
from fusedgpt.kernels.backend import requested

X = torch.ones(2, 8)
QKV = torch.ones(1, 2, 24)
SEED = torch.tensor(0)
CALLS: dict[str, Callable[[], object]] = {
    "embed": lambda: kernels.embed(torch.zeros(1, 2, dtype=torch.long), X, X),
    "layer_norm": lambda: kernels.layer_norm(X, X[0]),
    "add_layer_norm": lambda: kernels.add_layer_norm(X, X, X[0]),
    "linear": lambda: kernels.linear(X, X),
    "causal_attention": lambda: kernels.causal_attention(QKV, 2),
    "attention": lambda: kernels.attention(QKV[None], QKV[None], QKV[None]),
    "gelu_mlp": lambda: kernels.gelu_mlp(X, X, None, X.T, None),
    "linear_cross_entropy": lambda: kernels.linear_cross_entropy(X, X, torch.zeros(2, dtype=torch.long)),
    "dropout": lambda: kernels.dropout(X, 0.5, SEED),
}
each_operator = pytest.mark.parametrize("operator", CALLS)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSEDGPT_BACKEND", raising=False)


def test_every_public_operator_is_here() -> None:
    assert CALLS.keys() == set(kernels.__all__) - {"explain", "use_backend"}


@each_operator
def test_auto_and_torch_run_on_a_cpu(operator: str) -> None:
    CALLS[operator]()
    for name in ("auto", "torch"):
        with use_backend(name):
            CALLS[operator]()


@each_operator
def test_a_forced_backend_that_cannot_run_says_which_operator_and_why(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend._triton, "INTERPRETED", False)  # which would run on a CPU
    name = operator.removeprefix("causal_")
    message = rf"^{name}: the triton backend was asked for but cannot run: \w.*"
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=message):
            CALLS[operator]()
        with pytest.raises(RuntimeError, match=message):
            explain(operator, X)
    monkeypatch.setenv("FUSEDGPT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=message):
        CALLS[operator]()


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels take bfloat16")
@each_operator
def test_the_interpreter_takes_no_bfloat16(operator: str) -> None:
    """Its matmuls there are off by nine orders of magnitude."""
    with use_backend("triton"):
        assert "its Triton kernel for float16" in explain(operator, X.half())
        with pytest.raises(RuntimeError, match="cannot run: Triton's interpreter is wrong in bfloat16"):
            explain(operator, X.bfloat16())
        with pytest.raises(RuntimeError, match="cannot run: Triton's interpreter is wrong in bfloat16"):
            kernels.causal_attention(QKV.bfloat16(), 2)
    assert kernels.causal_attention(QKV.bfloat16(), 2).dtype == torch.bfloat16


@each_operator
def test_explain_says_which_and_why(operator: str) -> None:
    sentence = explain(operator, X.bfloat16())
    assert sentence.startswith(
        operator.removeprefix("causal_") + " runs in plain PyTorch for bfloat16 on cpu: "
    )
    assert "Triton" in sentence.partition(": ")[2]
    with use_backend("torch"):
        assert explain(operator, X).endswith("for float32 on cpu: it was asked for.")


def test_explain_changes_nothing_and_knows_meta_tensors() -> None:
    assert "on meta" in explain("linear", torch.empty(2, device="meta"))
    assert requested() == "auto"


def test_the_environment_chooses_and_use_backend_wins_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested() == "auto"
    monkeypatch.setenv("FUSEDGPT_BACKEND", "torch")
    assert requested() == "torch"
    with use_backend("triton"):
        assert requested() == "triton"
        with use_backend("auto"):
            assert requested() == "auto"
    assert requested() == "torch"
    monkeypatch.setenv("FUSEDGPT_BACKEND", "")
    assert requested() == "auto"


def test_use_backend_nests_and_is_undone_by_an_exception() -> None:
    def fail_inside() -> None:
        with use_backend("torch"):
            with use_backend("triton"):
                assert requested() == "triton"
            assert requested() == "torch"
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert requested() == "auto"


def test_autograds_threads_see_the_forced_backend() -> None:
    """A checkpointed block is recomputed in a thread of autograd's own on a GPU, and must take the same path."""
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["torch"]


@pytest.mark.parametrize("name", ["cuda", "Triton", "", "torch "])
def test_unknown_backends_are_named_with_the_known_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "it is one of auto, triton, torch"
    with (
        pytest.raises(ValueError, match=f"^use_backend: unknown backend '{name}'; {known}$"),
        use_backend(name),
    ):
        pass
    assert requested() == "auto"
    if name:  # an empty variable is none
        monkeypatch.setenv("FUSEDGPT_BACKEND", name)
        with pytest.raises(ValueError, match=f"^FUSEDGPT_BACKEND: unknown backend '{name}'; {known}$"):
            CALLS["linear"]()
        with use_backend("torch"):
            CALLS["linear"]()


@pytest.mark.parametrize("operator", ["rms_norm", "Attention", ""])
def test_explain_names_the_operators_there_are(operator: str) -> None:
    with pytest.raises(
        ValueError, match=f"^explain: unknown operator '{operator}'; it is one of embed, .*dropout$"
    ):
        explain(operator, X)


def test_dynamo_traces_the_operators_without_a_break() -> None:
    """The choice runs in front of every operator, so a break in it would break every compiled model's graph."""

    def sub_layers(qkv: Tensor) -> Tensor:
        x = kernels.causal_attention(qkv, 2, dropout_p=0.5, seed=SEED)
        return kernels.gelu_mlp(kernels.layer_norm(x, X[0]), X, None, X.T, None)

    compiled = torch.compile(sub_layers, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(QKV), sub_layers(QKV))
    with use_backend("torch"):
        torch.testing.assert_close(compiled(QKV), sub_layers(QKV))
