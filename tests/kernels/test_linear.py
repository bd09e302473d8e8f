"""The projection under the Triton backend: torch's own gradients, its dtype rules, layouts and what it saves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedgpt.kernels import linear, use_backend
from fusedgpt.kernels.ops.column_sum import column_sum
from fusedgpt.kernels.ops.linear import _backward

from .tolerances import assert_no_less_exact, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
drawn = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with use_backend("triton"):
        return linear(x, weight, bias)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def results(function, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    found = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    assert [g.dtype for g in gradients] == [t.dtype for t in tensors.values()]
    return {"y": y.detach()} | found


@drawn
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    wide=st.integers(1, 40),
    out=st.integers(1, 70),
    dtypes=st.sampled_from([(F32, F32), (F16, F32), (F16, F16), (F32, F16), (F16, BF16)]),
    biased=st.booleans(),
    transposed=st.booleans(),
    strided=st.booleans(),
)
def test_both_directions(
    leading: list[int],
    wide: int,
    out: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    biased: bool,
    transposed: bool,
    strided: bool,
) -> None:
    generator = torch.Generator().manual_seed(wide * out)
    dtype, weight_dtype = dtypes

    def draw(*shape: int) -> Tensor:  # numbers that every dtype holds
        return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)

    x = draw(*leading, 2 * wide)[..., ::2] if strided else draw(*leading, wide)
    values = {"x": x, "weight": draw(wide, out).T if transposed else draw(out, wide)}
    if biased:
        values["bias"] = draw(out)
    dy = draw(*leading, out)
    tensors = {name: t.to(dtype if name == "x" else weight_dtype) for name, t in values.items()}
    assert_no_less_exact(
        results(fused, tensors, dy),
        results(plain, tensors, dy),
        results(F.linear, {name: t.double() for name, t in values.items()}, dy),
    )


def test_float32_masters_have_gradients_that_no_lower_precision_has_seen() -> None:
    tensors = {"x": torch.randn(90, 24), "weight": torch.randn(31, 24), "bias": torch.randn(31)}
    tensors = {name: t.half().float().to(DEVICE) for name, t in tensors.items()}
    dy = torch.randn(90, 31).half().to(DEVICE)
    exact = results(F.linear, {name: t.double() for name, t in tensors.items()}, dy)
    ours = results(fused, tensors | {"x": tensors["x"].half()}, dy)
    for name in ("dweight", "dbias"):
        assert relative_error(ours[name], exact[name]) < 10 * torch.finfo(F32).eps


def test_a_weight_stored_in_out_has_its_gradient_in_that_layout() -> None:
    """As transformers' Conv1D holds it; a gradient in the other layout would cost autograd a copy."""
    dy, x, cast = torch.randn(8, 7), torch.randn(8, 5), torch.randn(5, 7).T
    dy, x, cast = (t.to(DEVICE) for t in (dy, x, cast))
    for by_column, stride in ((True, (1, 7)), (False, (5, 1))):
        _, dweight, _ = _backward(dy, x, cast, F32, by_column, False)
        assert dweight.stride() == stride
        torch.testing.assert_close(dweight, dy.T @ x)
    conv = torch.randn(5, 7, device=DEVICE, requires_grad=True)
    seen = []
    hook = conv.T
    hook.register_hook(lambda grad: seen.append(grad.stride()))
    fused(x, hook).sum().backward()
    assert seen == [(1, 7)]


@pytest.mark.parametrize(
    ("wanted", "saved"),
    [("x weight bias", {"x", "cast"}), ("x", {"cast"}), ("weight bias", {"x"}), ("bias", set())],
)
def test_only_what_a_gradient_needs_is_saved_and_computed(wanted: str, saved: set[str]) -> None:
    tensors = {"x": torch.randn(4, 5).half(), "weight": torch.randn(7, 5), "bias": torch.randn(7)}
    tensors = {name: t.to(DEVICE).requires_grad_(name in wanted.split()) for name, t in tensors.items()}
    kept = []

    def pack(t: Tensor) -> Tensor:
        kept.append((t.dtype, *t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = fused(**tensors)
    assert set(kept) == {{"x": (F16, 4, 5), "cast": (F16, 7, 5)}[name] for name in saved}
    dy = torch.randn_like(y)
    inputs = [tensors[name] for name in wanted.split()]
    ours = torch.autograd.grad(y, inputs, dy)
    for a, b in zip(ours, torch.autograd.grad(plain(**tensors), inputs, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_gradients_of_stride_zero_and_bits_that_stay() -> None:
    x, weight, bias = (
        torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((3, 20, 5), (40, 5), (40,))
    )
    before = [t.detach().clone() for t in (x, weight, bias)]
    y = fused(x, weight, bias)
    first = torch.autograd.grad(y.sum(), [x, weight, bias], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias), before, strict=True))
    torch.testing.assert_close(first[0], weight.sum(0).expand_as(x))
    assert torch.equal(first[2], torch.full((40,), 60.0, device=DEVICE))
    with torch.no_grad():
        assert torch.equal(fused(x, weight, bias), y)


@drawn
@given(
    rows=st.integers(0, 100),
    columns=st.integers(0, 100),
    dtype=st.sampled_from([F32, F16]),
    layout=st.sampled_from(["rows", "columns", "every second", "expanded"]),
)
def test_column_sum(rows: int, columns: int, dtype: torch.dtype, layout: str) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(rows * columns)).to(DEVICE, dtype)

    x = {
        "rows": lambda: draw(rows, columns),
        "columns": lambda: draw(columns, rows).T,
        "every second": lambda: draw(rows, 2 * columns)[:, ::2],
        "expanded": lambda: draw(1, columns).expand(rows, columns),
    }[layout]()
    total = column_sum(x)
    assert total.dtype == F32
    torch.testing.assert_close(total, x.double().sum(0).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, column_sum(x))
