"""float32 linear layers through oneDNN: as exact as PyTorch's, any strides, only the gradients that are asked for."""

from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import linear, onednn
from fusedgpt.kernels.examples import compare, worst

ROWS, IN, OUT = 300, 96, 131


@pytest.fixture(autouse=True)
def available() -> None:
    if not onednn._AVAILABLE:
        pytest.skip("this build of torch has no oneDNN")


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """x (4, ROWS, IN), weight and bias, with numbers of float32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (4, ROWS, IN), "weight": (OUT, IN), "bias": (OUT,)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def results(function, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    y = function(x, weight, bias)
    leaves = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    return [
        y.detach(),
        *torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=generator).to(y.dtype)),
    ]


def test_outputs_and_gradients_are_as_exact_as_pytorchs() -> None:
    assert onednn.takes(*list(inputs().values())[:2])
    ours, torchs = (results(function, **inputs()) for function in (onednn.Linear.apply, F.linear))
    exact = results(F.linear, **inputs(torch.float64))
    assert worst(map(compare, ours, torchs, exact, repeat("chain"))).ok


def test_any_strides_and_no_bias() -> None:
    given = {name: t.detach().double() for name, t in inputs().items()}
    x, weight = given["x"].float().transpose(0, 1), given["weight"].float().T.contiguous().T
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = results(linear, *leaves, None)
    expected = results(F.linear, *(t.detach().double().requires_grad_() for t in leaves), None)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("weight", "bias")])
def test_only_what_requires_a_gradient_gets_one(wanted: tuple[str, ...]) -> None:
    given = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs().items()}
    every = dict(zip(("y", *given), results(onednn.Linear.apply, **inputs()), strict=True))
    for name, gradient in zip(wanted, results(onednn.Linear.apply, **given)[1:], strict=True):
        assert torch.equal(gradient, every[name])


def test_it_takes_large_float32_matrices_of_a_cpu_only() -> None:
    x, weight = torch.empty(1024, 32), torch.empty(32, 32)
    assert onednn.takes(x, weight)
    assert not onednn.takes(x[:-1], weight)
    for dtype in (torch.float64, torch.bfloat16):
        assert not onednn.takes(x.to(dtype), weight.to(dtype))
    assert not onednn.takes(x.to("meta"), weight.to("meta"))


def test_it_compiles_into_one_graph() -> None:
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(results(compiled, **inputs()), results(linear, **inputs()), strict=True):
        torch.testing.assert_close(ours, eager)


def test_opcheck() -> None:
    arguments = (torch.randn(2, 9, 5), torch.randn(5, 7).T, torch.randn(7))
    torch.library.opcheck(torch.ops.fusedgpt.onednn_linear.default, arguments)
