"""What is particular to the head and its loss, on either backend: padding rows, targets that do not count, reductions."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import linear_cross_entropy, use_backend
from fusedgpt.kernels.backend import _triton, requested

REDUCTIONS = ["mean", "sum", "none"]
DEVICES = {"torch": "cpu", "triton": "cpu" if _triton.INTERPRETED else "cuda"}


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and _triton.MISSING is not None:
        pytest.skip("Triton is not installed")
    with use_backend(request.param), torch.device(DEVICES[request.param]):
        yield DEVICES[request.param]


@pytest.fixture
def head(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x (11, 6), a weight with 7 real rows and 5 of padding that would win every softmax, and targets."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(11, 6, generator=generator)
    weight = torch.randn(12, 6, generator=generator)
    weight[7:] = 1e4
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, 7, (11,), generator=generator)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_rows_stay_out_of_the_softmax_and_get_no_gradient(
    head: tuple[Tensor, Tensor, Tensor], reduction: str
) -> None:
    x, weight, targets = head
    loss = linear_cross_entropy(x, weight, targets, vocab_size=7, reduction=reduction)
    expected = F.cross_entropy(x @ weight[:7].T, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    dx, dweight = torch.autograd.grad(loss.sum(), (x, weight))
    assert dweight[7:].eq(0).all()
    assert dweight[:7].ne(0).all()
    torch.testing.assert_close((dx, dweight), torch.autograd.grad(expected.sum(), (x, weight)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (2, 0), ()], ids=str)
def test_any_leading_dimensions(device: str, shape: tuple[int, ...], reduction: str) -> None:
    """A loss for each target in the targets' shape with "none", and strides that no view can flatten."""
    generator = torch.Generator(device).manual_seed(3)
    x = torch.randn(*shape[:-1], 6, *shape[-1:], generator=generator).requires_grad_()
    weight = torch.randn(7, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, 7, (2, *shape), generator=generator).movedim(0, -1)[..., 1]
    leading = x.movedim(len(shape) - 1, -1) if shape else x  # (*shape, 6)
    loss = linear_cross_entropy(leading, weight, targets, reduction=reduction)
    logits = (leading @ weight.T).reshape(-1, 7)
    expected = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    torch.testing.assert_close(loss.flatten(), expected.flatten(), equal_nan=True)
    gradients = [torch.autograd.grad(each.sum(), (x, weight)) for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 99])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_targets(head: tuple[Tensor, Tensor, Tensor], reduction: str, ignore_index: int) -> None:
    x, weight, targets = head
    targets[[0, 4, 5, 10]] = ignore_index
    counts = targets != ignore_index
    loss = linear_cross_entropy(x, weight, targets, 7, ignore_index, reduction)
    dx, dweight = torch.autograd.grad(loss.sum(), (x, weight))
    kept = F.cross_entropy((x @ weight[:7].T)[counts], targets[counts], reduction=reduction)
    torch.testing.assert_close(loss[counts] if reduction == "none" else loss, kept)
    assert reduction != "none" or loss[~counts].eq(0).all()
    assert dx[~counts].eq(0).all()
    torch.testing.assert_close((dx, dweight), torch.autograd.grad(kept.sum(), (x, weight)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counts(head: tuple[Tensor, Tensor, Tensor], reduction: str) -> None:
    """As torch: the mean of no target is NaN, the sum 0."""
    x, weight, targets = head
    ignored = torch.full_like(targets, -100)
    ours = linear_cross_entropy(x, weight, ignored, 7, reduction=reduction)
    torchs = F.cross_entropy(x @ weight[:7].T, ignored, reduction=reduction)
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    assert ours.isnan().all() == (reduction == "mean")
    gradients = [torch.autograd.grad(loss.sum(), (x, weight)) for loss in (ours, torchs)]
    torch.testing.assert_close(*gradients)
    assert all(gradient.eq(0).all() for gradient in gradients[0])


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_neither_overflow_nor_vanish(size: float, sign: int) -> None:
    x = torch.tensor([[size * sign]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(max(size * sign, 0.0)))
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(dx, torch.tensor([[float(sign > 0)]]))
    assert dweight.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
def test_label_smoothing_over_the_real_classes(
    head: tuple[Tensor, Tensor, Tensor], reduction: str, label_smoothing: float
) -> None:
    x, weight, targets = head
    targets[2] = -100
    loss = linear_cross_entropy(x, weight, targets, 7, reduction=reduction, label_smoothing=label_smoothing)
    expected = F.cross_entropy(
        x @ weight[:7].T, targets, reduction=reduction, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each.sum(), (x, weight)) for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_z_loss_of_the_rows_that_count(head: tuple[Tensor, Tensor, Tensor], reduction: str) -> None:
    x, weight, targets = head
    targets[[2, 7]] = -100
    loss = linear_cross_entropy(x, weight, targets, 7, reduction=reduction, z_loss=0.5)
    logits = x @ weight[:7].T
    added = 0.5 * logits.exp().sum(1).log() ** 2 * (targets != -100)
    added = {"none": added, "sum": added.sum(), "mean": added.sum() / 9}[reduction]
    expected = F.cross_entropy(logits, targets, reduction=reduction) + added
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(each.sum(), (x, weight)) for each in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_float32_over_low_precision_activations(dtype: torch.dtype) -> None:
    """A sum of 60 losses of ln 5 would be off by hundredths of a nat in the activations' dtype."""
    if dtype == torch.bfloat16 and requested() == "triton" and _triton.INTERPRETED:
        pytest.skip("Triton's interpreter is refused in bfloat16")
    x, weight = torch.zeros(60, 4, dtype=dtype), torch.zeros(5, 4)
    loss = linear_cross_entropy(x, weight, torch.zeros(60, dtype=torch.long), reduction="sum")
    torch.testing.assert_close(loss, 60 * torch.tensor(5.0).log())
