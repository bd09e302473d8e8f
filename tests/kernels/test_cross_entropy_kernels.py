"""The head's loss in Triton against float64 and torch's own: chunks, options, layouts, and what the backward is promised.

A row wider than 128 takes several blocks in the interpreter; BUDGET and ROWS are cut down so that a few rows make
several chunks.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fusedgpt.kernels import linear_cross_entropy, use_backend
from fusedgpt.kernels.ops import cross_entropy
from fusedgpt.kernels.ops.cross_entropy import chunk_rows

from .tolerances import assert_no_less_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16 = torch.float32, torch.float16
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(autouse=True)
def kernels_only() -> Iterator[None]:
    with use_backend("triton"):
        yield


def small_chunks(patch: pytest.MonkeyPatch, rows: int, row_bytes: int) -> None:
    """Chunks of at most `rows` rows, a multiple of 4."""
    patch.setattr(cross_entropy, "ROWS", 4)
    patch.setattr(cross_entropy, "BUDGET", rows * row_bytes)


def head(rows: int, vocab: int, padding: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight whose padding would win every softmax, and targets, the last but one of each five ignored."""
    generator = torch.Generator().manual_seed(rows + 1000 * vocab + 7 * width)
    x = torch.randn(rows, width, generator=generator).half().double()
    weight = torch.randn(vocab + padding, width, generator=generator).half().double()
    weight[vocab:] *= 50
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[3::5] = -100
    return x.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def torchs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype)[:vocab])
    logits = logits.float() if x.dtype == F16 else logits
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    counts = targets != -100
    loss = loss + z_loss * logits.logsumexp(1) ** 2 * counts
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counts.sum()}[reduction]


def with_gradients(
    function: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab: int, **options: Any
) -> dict[str, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(x, weight, targets, vocab, **options)
    incoming = torch.linspace(0.5, 2.0, loss.numel(), device=DEVICE).to(loss.dtype).view(loss.shape)
    dx, dweight = torch.autograd.grad(loss, (x, weight), incoming)
    return {"loss": loss.detach(), "dx": dx, "dweight": dweight}


# no shrinking: at a second an example, a failure would take minutes to be told
@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    dtype=st.sampled_from([F32, F16]),
    masters=st.booleans(),
    rows=st.integers(1, 19),
    vocab=st.one_of(st.integers(6, 140), st.sampled_from([128, 256, 300])),
    padding=st.sampled_from([0, 0, 3, 64, 150]),
    width=st.integers(4, 40),
    most=st.sampled_from([4, 8, 100]),
    reduction=st.sampled_from(REDUCTIONS),
    label_smoothing=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-2]),
)
def test_any_shape_and_option(
    dtype: torch.dtype,
    masters: bool,
    rows: int,
    vocab: int,
    padding: int,
    width: int,
    most: int,
    **options: Any,
) -> None:
    x, weight, targets = head(rows, vocab, padding, width)
    parameter = F32 if masters else dtype
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, most, 640 * dtype.itemsize)
        ours = with_gradients(
            linear_cross_entropy, x.to(dtype), weight.to(parameter), targets, vocab, **options
        )
    rival = with_gradients(torchs, x.to(dtype), weight.to(dtype), targets, vocab, **options)
    exact = with_gradients(torchs, x, weight, targets, vocab, **options)
    assert (ours["loss"].dtype, ours["dx"].dtype, ours["dweight"].dtype) == (F32, dtype, parameter)
    # the gradient of the logits is rounded to the activations' dtype, so float32 masters make dweight no more exact
    ours["dweight"] = ours["dweight"].to(dtype)
    saved = "log-sum-exp" if dtype == F32 and options["reduction"] == "none" else "rounding"
    assert_no_less_exact(ours, rival, exact, saved)
    assert ours["dweight"][vocab:].eq(0).all()
    assert ours["dx"][3::5].eq(0).all()


@given(rows=st.integers(0, 10**6), row_bytes=st.integers(2, 2**23))
def test_chunks_are_few_even_and_within_the_budget(rows: int, row_bytes: int) -> None:
    step = chunk_rows(rows, row_bytes)
    assert step % 128 == 0
    assert step * row_bytes <= cross_entropy.BUDGET or step == 128
    chunks = math.ceil(rows / step)
    larger = cross_entropy.BUDGET // row_bytes // 128 * 128  # the largest that the budget has room for
    assert chunks <= 1 or chunks == math.ceil(rows / max(larger, 128))
    assert step - (rows - (chunks - 1) * step) < 128 * max(chunks, 1)  # the last lacks less than that


def test_memory_at_the_size_of_training() -> None:
    """On paper: a chunk of logits and the weight in bfloat16; the gradients themselves are inputs' size."""
    rows, vocab, width = 65536, 50304, 768
    step = chunk_rows(rows, 2 * vocab)
    assert (step, math.ceil(rows / step)) == (5120, 13)
    assert 2 * step * vocab + 2 * vocab * width < 0.6 * 2**30


class NoKernel:
    def __getitem__(self, grid: tuple) -> Any:
        return lambda *_, **__: None


@pytest.mark.skipif(DEVICE != "cpu", reason="follows the CPU's allocations")
@pytest.mark.parametrize("gradients", [True, False])
def test_allocations_stay_within_the_budget(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sum of live allocations: outputs, the weight in x's dtype and one chunk's logits, nothing else of note."""
    rows, vocab, width = 2048, 1024, 32
    small_chunks(monkeypatch, 256, 2 * vocab)
    monkeypatch.setattr(cross_entropy, "cross_entropy_kernel", NoKernel())
    # the CPU's own matmul widens operands, which takes memory that a GPU's does not
    monkeypatch.setattr(cross_entropy, "accumulate", lambda *_, **__: None)
    x, weight = torch.zeros(rows, width, dtype=F16), torch.zeros(vocab, width)
    targets = torch.zeros(rows, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        options = cross_entropy.Options(vocab, -100, 0.0, 0.0)
        cross_entropy._chunks(x, weight, targets, options, None, None, gradients, gradients)
    events = watched.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    made = gradients * (2 * rows * width + 4 * vocab * width) + 2 * 4 * rows
    chunk, cast = 256 * 2 * vocab, 2 * vocab * width
    assert made + chunk + cast <= peak < made + 1.1 * (chunk + cast)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_layout_and_nothing_written_to(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 4, 4 * 64)
    x, weight, targets = head(9, 30, 5, 6)
    x, weight = x.float(), weight.float()
    plain = with_gradients(linear_cross_entropy, x, weight, targets, 30, reduction=reduction)
    laid_out = [
        x.T.contiguous().T,
        weight.repeat(1, 2)[:, :6],
        torch.stack([targets, targets], 1)[:, 0].int(),
    ]
    before = [t.clone() for t in laid_out]
    leaves = [t.requires_grad_() for t in laid_out[:2]]
    loss = linear_cross_entropy(*leaves, laid_out[2], 30, reduction=reduction)
    torch.testing.assert_close(loss.detach(), plain["loss"])
    expanded = torch.ones((), device=DEVICE).expand(loss.shape)
    whole = torch.ones(loss.shape, device=DEVICE)
    first, second = (torch.autograd.grad(loss, leaves, g, retain_graph=True) for g in (expanded, whole))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert whole.eq(1).all()
    assert all(torch.equal(a, b) for a, b in zip(laid_out, before, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_scaled_loss_scales_the_gradients_in_float32(reduction: str, dtype: torch.dtype) -> None:
    """2⁻²⁰ of a gradient has its bits: in float16, folded into softmax - onehot, it would have none."""
    x, weight, targets = head(7, 40, 0, 6)
    x, weight = x.to(dtype).requires_grad_(), weight.float().requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    gradients = [
        torch.autograd.grad((loss * factor).sum(), (x, weight), retain_graph=True)
        for factor in (1.0, 2.0**-20, 1.0)
    ]
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))
    assert torch.equal(gradients[1][1], gradients[0][1] * 2.0**-20)
    if dtype == F32:
        assert torch.equal(gradients[1][0], gradients[0][0] * 2.0**-20)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_gradients_wanted_are_made(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = head(5, 20, 3, 6)
    x, weight = x.float(), weight.float()
    both = with_gradients(linear_cross_entropy, x, weight, targets, 20, reduction=reduction)
    incoming = torch.linspace(0.5, 2.0, 5, device=DEVICE) if reduction == "none" else torch.tensor(0.5)
    leaf = weight.clone().requires_grad_()
    loss = linear_cross_entropy(x, leaf, targets, 20, reduction=reduction)
    assert torch.equal(torch.autograd.grad(loss, leaf, incoming.to(DEVICE))[0], both["dweight"])

    def refuse(*_: Any) -> None:
        raise AssertionError("made a gradient that nobody wants")

    monkeypatch.setattr(cross_entropy, "accumulate", refuse)
    leaf = x.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, targets, 20, reduction=reduction)
    assert torch.equal(torch.autograd.grad(loss, leaf, incoming.to(DEVICE))[0], both["dx"])
    monkeypatch.setattr(cross_entropy, "_loss_with_gradients", refuse)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(leaf, weight, targets, 20, reduction=reduction), both["loss"])
    assert torch.equal(linear_cross_entropy(x, weight, targets, 20, reduction=reduction), both["loss"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction: str) -> None:
    x, weight, targets = head(0, 20, 3, 6)
    ours = with_gradients(linear_cross_entropy, x.float(), weight.float(), targets, 20, reduction=reduction)
    plain = with_gradients(torchs, x.float(), weight.float(), targets, 20, reduction=reduction)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, equal_nan=True)
    assert ours["dweight"].eq(0).all()


def test_a_tied_weight_gets_the_sum_of_its_gradients() -> None:
    _, weight, targets = head(8, 20, 0, 6)
    ids = targets.clamp(min=0)

    def loss(function: Any, weight: Tensor) -> Tensor:
        return function(F.embedding(ids, weight), weight, targets, 20)

    leaf = weight.float().requires_grad_()
    ours, plain = (torch.autograd.grad(loss(f, leaf), leaf)[0] for f in (linear_cross_entropy, torchs))
    torch.testing.assert_close(ours, plain)


def test_a_target_out_of_range_makes_nan_of_its_row_and_touches_no_other() -> None:
    """What a GPU does, where nobody looks at the targets first."""
    x, weight, targets = head(6, 20, 3, 6)
    x, weight = x.float(), weight.float()
    targets[:3] = torch.tensor([20, -1, 2**40])
    options = cross_entropy.Options(20, -100, 0.1, 1e-2)
    loss, lse, dx, dweight = cross_entropy._chunks(x, weight, targets, options, None, None, True, True)
    again = cross_entropy._chunks(x, weight, targets, options, lse, None, True, True)[2:]
    assert all(t[:3].isnan().all() and t[3:].isfinite().all() for t in (loss, dx, again[0]))
    assert dweight[:20].isnan().all()
    assert dweight[20:].eq(0).all()


def test_a_gradient_of_a_row_that_does_not_count_is_not_read() -> None:
    x, weight, targets = head(6, 20, 3, 6)
    x, weight = x.float().requires_grad_(), weight.float().requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, 20, reduction="none")
    incoming = torch.ones(6, device=DEVICE)
    expected = torch.autograd.grad(loss, (x, weight), incoming, retain_graph=True)
    incoming[3] = math.nan
    assert all(map(torch.equal, torch.autograd.grad(loss, (x, weight), incoming), expected))


def test_one_class_costs_nothing() -> None:
    x, weight, targets = head(3, 1, 70, 5)
    ours = with_gradients(linear_cross_entropy, x.float(), weight.float(), targets, 1)
    assert all(value.eq(0).all() for value in ours.values())


def test_a_small_loss_beside_large_logits_is_exact() -> None:
    x = torch.tensor([[100.0]], device=DEVICE)
    weight = torch.tensor([[3.0], [2.9]], device=DEVICE)
    loss = linear_cross_entropy(x, weight, torch.tensor([0], device=DEVICE))
    exact = F.cross_entropy((x.double() @ weight.double().T).cpu(), torch.tensor([0]))
    # 1 + 4.5e-5 has float32's precision; the log-sum-exp, near 300, would be off by a third of the loss
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_a_loss_a_row_compiles_without_graph_breaks(dtype: torch.dtype) -> None:
    x, weight, targets = head(5, 20, 3, 6)
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        parts = [
            linear_cross_entropy(x, weight, targets, 20, reduction=r, label_smoothing=0.1, z_loss=1e-2)
            for r in ("none", "mean")
        ]
        return (parts[0] * parts[1]).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight)
    eager = run(x, weight)
    assert torch.equal(compiled, eager)
    ours, expected = (torch.autograd.grad(loss, (x, weight)) for loss in (compiled, eager))
    assert all(map(torch.equal, ours, expected))
