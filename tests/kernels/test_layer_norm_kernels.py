"""The kernels of LayerNorm and dropout against float64.

Runs in Triton's interpreter where there is no GPU; there a row wider than 128 is a wide one, so both kinds are drawn.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedgpt.kernels import add_layer_norm, dropout, layer_norm, use_backend
from fusedgpt.kernels.dropout_mask import keep_mask, keep_scale

from .tolerances import assert_no_less_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
SEED = torch.tensor([-(2**40) - 12345], device=DEVICE)

# no shrinking: at up to a second an example, a failure would take minutes to be told
drawn = settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
shapes = {"rows": st.integers(1, 40), "columns": st.one_of(st.integers(1, 128), st.integers(129, 200))}


def assert_within(ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    assert [t.dtype for t in ours] == [t.dtype for t in torchs]
    assert_no_less_exact(*(dict(enumerate(tensors)) for tensors in (ours, torchs, exact)))


def leaves(rounded: torch.dtype, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Leaf tensors of random values that `rounded` can hold, as `dtype`."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    values = (torch.randn(shape, generator=generator).to(rounded).to(DEVICE, dtype) for shape in shapes)
    return [value.requires_grad_() for value in values]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs and the inputs' gradients, for incoming gradients that depend on the shapes alone."""
    incoming = [
        g.detach().to(y.dtype) for y, (g,) in ((y, leaves(torch.float16, y.dtype, y.shape)) for y in outputs)
    ]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, incoming)]


@drawn
@given(dtype=st.sampled_from(DTYPES), biased=st.booleans(), masters=st.booleans(), **shapes)
def test_layer_norm(rows: int, columns: int, dtype: torch.dtype, biased: bool, masters: bool) -> None:
    def run(norm, dtype: torch.dtype, parameter_dtype: torch.dtype) -> list[Tensor]:
        (x,) = leaves(torch.float16, dtype, (rows, columns))
        parameters = leaves(torch.float16, parameter_dtype, *([(columns,)] * (1 + biased)))
        return gradients([norm(x, *parameters)], [x, *parameters])

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    parameter_dtype = torch.float32 if masters else dtype
    with use_backend("triton"):
        ours = run(layer_norm, dtype, parameter_dtype)
    assert_within(ours, run(plain, dtype, parameter_dtype), run(plain, torch.float64, torch.float64))


@drawn
@given(
    dtype=st.sampled_from(DTYPES),
    wide_residual=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    x_biased=st.booleans(),
    biased=st.booleans(),
    used=st.sampled_from(["both", "y", "residual_out"]),
    **shapes,
)
def test_add_layer_norm(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    wide_residual: bool,
    p: float,
    x_biased: bool,
    biased: bool,
    used: str,
) -> None:
    def run(
        operator, dtype: torch.dtype, residual_dtype: torch.dtype, parameter_dtype: torch.dtype
    ) -> list[Tensor]:
        (x,) = leaves(torch.float16, dtype, (rows, columns))
        (residual,) = leaves(torch.float16, residual_dtype, (1, rows, columns))
        names = ("weight", "bias", "x_bias")
        values = leaves(torch.float16, parameter_dtype, *[(columns,)] * 3)
        parameters = dict(zip(names, values, strict=True))
        if not biased:
            del parameters["bias"]
        if not x_biased:
            del parameters["x_bias"]
        y, residual_out = operator(x, residual[0], **parameters, dropout_p=p, seed=SEED, stream=5)
        outputs = {"both": [y, residual_out], "y": [y], "residual_out": [residual_out]}[used]
        inputs = [x, residual, *parameters.values()]
        if used == "residual_out":  # the LayerNorm's parameters have no part in it
            inputs = [
                t
                for name, t in [("x", x), ("residual", residual), *parameters.items()]
                if name not in ("weight", "bias")
            ]
        return gradients(outputs, inputs)

    def plain(x, residual, weight, bias=None, x_bias=None, dropout_p=0.0, seed=None, stream=0):
        branch = x if x_bias is None else x + x_bias.to(x.dtype)
        if dropout_p:
            branch = branch * keep_mask(seed, stream, rows, columns, dropout_p) * keep_scale(dropout_p)
        h = residual + branch
        parameters = (None if t is None else t.to(h.dtype) for t in (weight, bias))
        return F.layer_norm(h, h.shape[-1:], *parameters).to(x.dtype), h

    residual_dtype = torch.float32 if wide_residual else dtype
    with use_backend("triton"):
        ours = run(add_layer_norm, dtype, residual_dtype, torch.float32)
    double = torch.float64
    assert_within(ours, run(plain, dtype, residual_dtype, torch.float32), run(plain, double, double, double))


@pytest.mark.parametrize("columns", [40, 150])
def test_nothing_is_trained_that_is_frozen(columns: int) -> None:
    x, weight, bias = leaves(torch.float32, torch.float32, (5, columns), (columns,), (columns,))
    weight.requires_grad_(False)
    with use_backend("triton"):
        y = layer_norm(x, weight, bias)
        dx, dbias = torch.autograd.grad(y.square().sum(), [x, bias])
    expected = F.layer_norm(x, (columns,), weight, bias)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.square().sum(), x, retain_graph=True)[0])
    torch.testing.assert_close(dbias, torch.autograd.grad(expected.square().sum(), bias)[0])


@pytest.mark.parametrize("columns", [40, 150])
def test_the_same_bits_twice(columns: int) -> None:
    def run() -> list[Tensor]:
        x, residual, weight, bias = leaves(
            torch.float32, torch.float32, *[(33, columns)] * 2, *[(columns,)] * 2
        )
        with use_backend("triton"):
            return gradients(
                list(add_layer_norm(x, residual, weight, bias, 1e-5, 0.2, SEED)), [x, residual, weight, bias]
            )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("columns", [40, 150])
def test_any_strides_empty_batches_and_expanded_gradients(columns: int) -> None:
    weight = torch.randn(columns, 2, device=DEVICE)[:, 0]  # every second number
    x = torch.randn(columns, 3, 2, device=DEVICE).permute(2, 1, 0).requires_grad_()
    with use_backend("triton"):
        y = layer_norm(x, weight)
        (dx,) = torch.autograd.grad(y.sum(), x)  # an incoming gradient of stride 0
        empty = x.detach()[:0].requires_grad_()
        y_empty, _ = add_layer_norm(empty, empty, weight.clone().requires_grad_())
        y_empty.sum().backward()
    expected = F.layer_norm(x, (columns,), weight)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-4, atol=1e-4)
    assert y_empty.shape == (0, 3, columns)
    assert empty.grad is not None


@drawn
@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stream=st.integers(-5, 2**33),
)
def test_dropout_masks_are_those_of_pytorch_bit_for_bit(
    shape: list[int], p: float, seed: int, stream: int
) -> None:
    seeds = torch.tensor([seed], device=DEVICE)
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            y = dropout(x, p, seeds, stream)
        results += [y, torch.autograd.grad(y.sum(), x)[0]]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_mask_depends_on_seed_and_stream() -> None:
    x = torch.ones(50, 50, device=DEVICE)
    with use_backend("triton"):
        masks = [dropout(x, 0.5, SEED + i, j) for i in range(2) for j in range(2)]
    agreement = [(a == b).float().mean() for i, a in enumerate(masks) for b in masks[:i]]
    assert all(0.4 < share < 0.6 for share in agreement)


def test_a_small_stack_trains_alike_on_either_backend() -> None:
    """Twenty steps with dropout: the same masks, so the same losses but for rounding."""

    def losses(backend: str) -> list[float]:
        torch.manual_seed(0)
        width = 24
        layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3)).to(DEVICE)
        norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(3)).to(DEVICE)
        optimizer = torch.optim.AdamW([*layers.parameters(), *norms.parameters()], lr=3e-3)
        x, target = torch.randn(2, 10, width, device=DEVICE)
        history = []
        for step in range(20):
            seed = torch.tensor([step], device=DEVICE)
            residual = x
            y = layer_norm(x, norms[0].weight, norms[0].bias)
            for stream, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
                branch = torch.tanh(y @ layer.weight.T)
                y, residual = add_layer_norm(
                    branch, residual, norm.weight, norm.bias, 1e-5, 0.1, seed, stream, layer.bias
                )
            loss = F.mse_loss(y + residual, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    with use_backend("triton"):
        ours = losses("triton")
    with use_backend("torch"):
        plain = losses("torch")
    assert plain[-1] < 0.8 * plain[0]
    assert ours == pytest.approx(plain, rel=1e-4)
