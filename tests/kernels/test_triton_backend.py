"""Which backend runs, what it says of itself, and what it refuses."""

import os
import re
import subprocess
import sys

import pytest
import torch

from fusedgpt.kernels import add_layer_norm, dropout, explain, gelu_mlp, layer_norm, use_backend
from fusedgpt.kernels import backend as dispatch
from fusedgpt.kernels.examples import SMALL
from fusedgpt.kernels.selfcheck import check_all, may_miscompile, ptxas_version

X = torch.zeros(3, 5)
W = torch.ones(5)
SEED = torch.tensor([1])

INTERPRETED = pytest.mark.skipif(not dispatch._triton.INTERPRETED, reason="this process compiles its kernels")


@INTERPRETED
def test_the_interpreter_runs_only_where_it_is_forced() -> None:
    assert dispatch.choose("layer_norm", X).backend == "torch"
    with use_backend("triton"):
        assert dispatch.choose("layer_norm", X).backend == "triton"
        assert (
            explain("layer_norm", X)
            == "layer_norm runs in its Triton kernel for float32 on cpu: it was asked for."
        )


@INTERPRETED
def test_float64_is_refused_where_forced() -> None:
    assert layer_norm(X.double(), W).dtype == torch.float64
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"layer_norm.*float64 exists in plain PyTorch only"),
    ):
        layer_norm(X.double(), W)


def test_a_reason_is_given_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch._triton, "MISSING", "No module named 'triton'")
    assert explain("dropout", X).endswith("Triton cannot be imported (No module named 'triton').")
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"dropout.*cannot run: Triton cannot be imported"),
    ):
        dropout(X, 0.5, SEED)


def test_import_without_triton_and_without_touching_a_gpu() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from fusedgpt.kernels import add_layer_norm, dropout, layer_norm
x, w = torch.randn(2, 3, 5, requires_grad=True), torch.ones(5)
y, h = add_layer_norm(x, layer_norm(x, w), w, dropout_p=0.5, seed=torch.tensor([1]))
dropout(y + h, 0.5, torch.tensor([1])).sum().backward()
assert not torch.cuda.is_initialized()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestProbe:
    """The first look at a GPU, on a machine that has none."""

    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        dispatch._probe.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")

    def test_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert (
            dispatch.unusable(torch.device("cuda:0"))
            == "A GPU has compute capability 7.5; the kernels need 8.0"
        )

    def test_names_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(index: int) -> None:
            raise RuntimeError("no launcher\nand more")

        monkeypatch.setattr(torch.cuda, "device", fail)
        monkeypatch.setattr(dispatch.shutil, "which", lambda _: None)
        monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
        with pytest.warns(RuntimeWarning, match="runs without Triton kernels"):
            found = dispatch.unusable(torch.device("cuda:0"))
        assert found == (
            "a first Triton kernel failed with RuntimeError: no launcher; there is no C compiler (install gcc, or name "
            "one in CC); Python's headers are missing (install python3-dev or the equivalent)"
        )
        assert dispatch.unusable(torch.device("cuda:0")) is found  # once a device, without a second warning


WRONG = [
    (lambda: layer_norm(X.int(), W), TypeError, "x has dtype int32"),
    (lambda: layer_norm([1.0], W), TypeError, "x is of type list"),
    (lambda: layer_norm(X, W[:4]), ValueError, "weight has shape"),
    (lambda: layer_norm(X.to("meta"), W), ValueError, "weight is on cpu but x on meta"),
    (lambda: add_layer_norm(X, X[:2], W), ValueError, "residual has shape"),
    (lambda: add_layer_norm(X, X.half(), W.bool()), TypeError, "weight has dtype bool"),
    (lambda: add_layer_norm(X, X, W, x_bias=W[:2]), ValueError, "x_bias has shape"),
    (lambda: add_layer_norm(X, X, W, dropout_p=0.1), ValueError, "needs a seed"),
    (lambda: add_layer_norm(X, X, W, dropout_p=1.1, seed=SEED), ValueError, "outside"),
    (lambda: gelu_mlp(X, W.expand(4, 5), W, X[:1].expand(2, 5), None), ValueError, "b_fc has shape"),
    (lambda: dropout(X, float("nan"), SEED), ValueError, "outside"),
    (lambda: dropout(X, 0.1, 3), TypeError, "seed is of type int"),
    (lambda: dropout(X, 0.1, SEED.int()), TypeError, "seed is int32"),
    (lambda: dropout(X, 0.1, SEED.to("meta")), ValueError, "seed is on meta"),
]


@INTERPRETED
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_input_is_named(backend: str, call, error: type[Exception], message: str) -> None:
    with use_backend(backend), pytest.raises(error, match=message):
        call()


def test_selfcheck_finds_every_operator_right() -> None:
    checks = check_all("cuda" if torch.cuda.is_available() else "cpu")
    assert {check.operator for check in checks} == set(SMALL)
    assert [check for check in checks if not check.ok] == []


@INTERPRETED
def test_selfcheck_of_the_kernels() -> None:
    with use_backend("triton"):
        checks = check_all("cpu")
    assert {(check.backend, check.ok) for check in checks} == {("triton", True)}


@INTERPRETED
def test_selfcheck_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules[layer_norm.__module__], "_layer_norm", lambda x, w, b, *_: (x * w + b, None)
    )
    monkeypatch.setattr("fusedgpt.kernels.selfcheck.small", lambda *_: [SMALL["layer_norm"]])
    with use_backend("triton"):
        (check,) = check_all("cpu")
    assert not check.ok


@pytest.mark.parametrize(
    ("architecture", "version", "expected"),
    [("sm_90", "12.9", True), ("sm_90", "13.2", True), ("sm_90", "13.3", False), ("sm_80", "12.8", False)],
)
def test_ptxas_that_may_miscompile(architecture: str, version: str, expected: bool) -> None:
    assert may_miscompile(architecture, version) is expected


def test_ptxas_version() -> None:
    assert ptxas_version("gfx942") is None
    pytest.importorskip("triton")
    assert re.fullmatch(r"\d+\.\d+", ptxas_version("sm_90") or "")
