"""The contract of every operator, over the table in cases.py: the same mathematics as torch's own operators, in every
dtype, for any strides and an empty batch, and nothing that was handed in is written to.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedgpt import kernels

from .cases import ACTIVATIONS, CASES, Case, Tensors, as_tuple, embed, layer_norm, results
from .tolerances import TOLERANCES, assert_equal_maths, assert_no_less_exact

LOW_PRECISION = [torch.bfloat16, torch.float16]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
LOSSES = [case for case in CASES if case.name.startswith("linear_cross_entropy")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, f"{name} is {actual[name].dtype}, not {value.dtype}"
        assert torch.equal(actual[name], value), f"{name} differs"


@each_case
def test_same_mathematics_as_torch(case: Case) -> None:
    inputs = case.inputs(torch.float64)
    assert_equal_maths(results(case.ours, inputs), results(case.torchs, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@each_case
def test_no_less_exact_than_torch_in_the_same_dtype(case: Case, dtype: torch.dtype) -> None:
    """Ours has float32 masters beside activations in `dtype`; torch's operators take one dtype for all."""
    ours = results(case.ours, case.inputs(dtype, masters=torch.float32))
    rival, oracle = (results(case.torchs, case.inputs(each)) for each in (dtype, torch.float64))
    assert_no_less_exact(ours, rival, oracle)
    assert ours["output 0"].dtype == (torch.float32 if case in LOSSES else dtype)


@each_case
def test_gradients_agree_with_finite_differences(case: Case) -> None:
    inputs = case.inputs(torch.float64, batch=2)
    names = list(inputs)
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())

    def positional(*tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(case.ours(**dict(zip(names, tensors, strict=True))))

    close = {"atol": TOLERANCES["gradcheck"], "rtol": TOLERANCES["gradcheck"]}
    assert torch.autograd.gradcheck(positional, tuple(inputs.values()), fast_mode=True, **close)


@pytest.mark.parametrize("batch", [0, 1])
@each_case
def test_small_batches(case: Case, batch: int) -> None:
    """With an empty batch every parameter's gradient is 0, except under the mean over no targets: NaN, as torch's."""
    inputs = case.inputs(torch.float64, batch=batch)
    assert_equal_maths(results(case.ours, inputs), results(case.torchs, inputs))


def columns_first_with_gaps(tensor: Tensor) -> Tensor:
    turned = tensor.permute(*reversed(range(tensor.dim())))
    gaps = torch.stack([turned, turned], -1)[..., 0]
    return gaps.permute(*reversed(range(tensor.dim())))


def repeated(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("layout", [columns_first_with_gaps, repeated])
@each_case
def test_any_strides(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    laid_out = {name: layout(tensor) for name, tensor in case.inputs(torch.float64).items()}
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in laid_out.items()}
    assert any(tensor.stride() != whole[name].stride() for name, tensor in laid_out.items())
    assert_equal_maths(results(case.ours, laid_out), results(case.ours, whole))


@each_case
def test_what_comes_in_is_never_written_to(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    incoming = [torch.randn_like(out) for out in as_tuple(case.ours(**inputs))]
    before = [tensor.clone() for tensor in [*inputs.values(), *incoming]]
    results(case.ours, inputs, incoming)
    after = [*inputs.values(), *incoming]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@each_case
def test_incoming_gradients_of_stride_zero(case: Case) -> None:
    """What `out.sum().backward()` sends."""
    inputs = case.inputs(torch.float64)
    outputs = as_tuple(case.ours(**inputs))
    expanded = [torch.full((), 1.5, dtype=out.dtype).expand(out.shape) for out in outputs]
    whole = [gradient.clone(memory_format=torch.contiguous_format) for gradient in expanded]
    assert_equal_maths(results(case.ours, inputs, expanded), results(case.ours, inputs, whole))


@each_case
def test_the_same_bits_every_time_and_under_activation_checkpointing(case: Case) -> None:
    """Seeds are inputs, so a recomputed block finds its masks again."""
    inputs = case.inputs(torch.float32)
    first = results(case.ours, inputs)
    recomputed = partial(checkpoint, case.ours, use_reentrant=False, preserve_rng_state=False)
    assert_same_bits(results(case.ours, inputs), first)
    assert_same_bits(results(recomputed, inputs), first)


@each_case
def test_indices_of_32_bits(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    narrow = {
        name: tensor if name == "seed" or tensor.is_floating_point() else tensor.int()
        for name, tensor in inputs.items()
    }
    assert_same_bits(results(case.ours, narrow), results(case.ours, inputs))


@each_case
def test_autocast_casts_the_branch_and_never_the_residual_stream(case: Case) -> None:
    """Autocast is the same as casting by hand, argument by argument, in every bit of the outputs and the gradients."""
    inputs = case.inputs(torch.float32)

    def by_hand(**tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        if "layer_norm" in case.name and "residual" not in tensors:
            return kernels.layer_norm(**tensors, out_dtype=torch.bfloat16)
        if case.name != "dropout":  # nor embed, whose tables are parameters
            cast = ACTIVATIONS - {"residual", "wte", "wpe"}
            tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if name in cast}
        return case.ours(**tensors)

    def automatic(**tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return case.ours(**tensors)

    assert_same_bits(results(automatic, inputs), results(by_hand, inputs))
    doubles = case.inputs(torch.float64)
    assert_same_bits(results(automatic, doubles), results(case.ours, doubles))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_float32_tables_give_embeddings_in_the_models_dtype(dtype: torch.dtype) -> None:
    """One rounding of the sum, and gradients summed in float32: exact for incoming gradients in low precision."""
    inputs = named("embed").inputs(torch.float32)
    ours = results(partial(kernels.embed, out_dtype=dtype), inputs)
    exact = results(embed, {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()})
    assert torch.equal(ours["output 0"], exact["output 0"].to(dtype))
    for table in ("dwte", "dwpe"):
        torch.testing.assert_close(ours[table], exact[table].float())


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", [case.name for case in CASES if "add_layer_norm" in case.name])
def test_a_float32_residual_stream_beside_low_precision_branches(name: str, dtype: torch.dtype) -> None:
    case = named(name)
    inputs = case.inputs(dtype, masters=torch.float32)
    inputs["residual"] = inputs["residual"].float()
    ours, oracle = (
        results(f, t) for f, t in ((case.ours, inputs), (case.torchs, case.inputs(torch.float64)))
    )
    rival = results(
        case.torchs, case.inputs(torch.float32)
    )  # what reaches the stream is as exact as in float32
    assert ours["output 0"].dtype == dtype
    assert ours["output 1"].dtype == torch.float32
    assert_no_less_exact(*({"output 1": each["output 1"]} for each in (ours, rival, oracle)))
    assert_no_less_exact(ours, results(case.torchs, case.inputs(dtype)), oracle)


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_used(used: int) -> None:
    case = named("add_layer_norm-dropout")
    inputs = case.inputs(torch.float64)
    incoming = [None, None]
    incoming[used] = torch.randn(inputs["x"].shape, dtype=torch.float64)
    ours = results(case.ours, inputs, incoming)
    assert_equal_maths(ours, results(case.torchs, inputs, incoming))
    assert ("dweight" in ours) == (used == 0)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 7)], ids=str)
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(7), torch.randn(7)
    torch.testing.assert_close(kernels.layer_norm(x, weight, bias), layer_norm(x, weight, bias))
    torch.testing.assert_close(
        kernels.add_layer_norm(x, x.flip(-1), weight)[0], layer_norm(x + x.flip(-1), weight)
    )
    fc, proj = torch.randn(9, 7), torch.randn(7, 9)
    torch.testing.assert_close(kernels.linear(x, fc), x @ fc.T)
    mlp = torch.nn.functional.gelu(x @ fc.T, approximate="tanh") @ proj.T
    torch.testing.assert_close(kernels.gelu_mlp(x, fc, None, proj, None), mlp)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm_of_large_numbers_close_together(eps: float) -> None:
    """Statistics in two passes: E[x²] − E[x]² would lose everything here."""
    x = 1e4 + torch.randn(4, 33)
    weight = torch.ones(33)
    exact = torch.nn.functional.layer_norm(x.double(), (33,), eps=eps)
    torch.testing.assert_close(kernels.layer_norm(x, weight, eps=eps).double(), exact, atol=2e-3, rtol=0)
    together, _ = kernels.add_layer_norm(x - 1.0, torch.ones_like(x), weight, eps=eps)
    torch.testing.assert_close(together.double(), exact, atol=4e-3, rtol=0)


@each_case
def test_shapes_without_data(case: Case) -> None:
    """Tensors on the meta device: what a model's shapes are worked out with before its memory is there."""
    inputs = case.inputs(torch.bfloat16)
    there = as_tuple(case.ours(**inputs))
    meta = as_tuple(case.ours(**{name: tensor.to("meta") for name, tensor in inputs.items()}))
    assert [(out.shape, out.dtype) for out in meta] == [(out.shape, out.dtype) for out in there]
