"""Within `gradients_in_place` a backward pass leaves in `.grad` what it always leaves there, and autograd adds nothing itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusedgpt.kernels import embed, gelu_mlp, linear, linear_cross_entropy, use_backend
from fusedgpt.kernels.examples import SMALL, Example, draw, in_place, parity, results
from fusedgpt.kernels.matmul import gradients_in_place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16 = torch.float32, torch.float16
# operator: its weights that matmuls or row sums differentiate
WEIGHTS = {
    "embed": {"wte", "wpe"},
    "linear": {"weight"},
    "gelu_mlp": {"w_fc", "w_proj"},
    "linear_cross_entropy": {"weight"},
}


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def note(weight: Tensor, handed_over: set[str], name: str = "weight") -> None:
    """Add the name when autograd gets a gradient of the weight."""

    def hook(gradient: Tensor | None) -> None:
        if gradient is not None:
            handed_over.add(name)

    weight.register_hook(hook)


def backward(example: Example, tensors: dict[str, Tensor]) -> None:
    example.call(**tensors).float().square().mean().backward()


@pytest.mark.parametrize("operator", WEIGHTS)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_sums_are_as_exact_as_autograds(operator: str, dtype: torch.dtype) -> None:
    found = parity(in_place(SMALL[operator]), DEVICE, dtype, parameters=F32, slack="approximate")
    assert found.ok, found


@pytest.mark.parametrize("operator", WEIGHTS)
def test_autograd_adds_the_others_only(operator: str) -> None:
    tensors = draw(SMALL[operator], DEVICE, F16, F32)
    handed_over: set[str] = set()
    for name, t in tensors.items():
        if t.requires_grad:
            note(t, handed_over, name)
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    backward(SMALL[operator], tensors)
    assert handed_over == {*leaves}, "outside: everything"
    first = {name: t.grad.clone() for name, t in leaves.items()}
    kept = {name: t.grad for name, t in leaves.items()}
    handed_over.clear()
    with gradients_in_place():
        backward(SMALL[operator], tensors)
    assert handed_over == {*leaves} - WEIGHTS[operator]
    for name, t in leaves.items():
        assert t.grad is kept[name]
        torch.testing.assert_close(t.grad, 2 * first[name], rtol=1e-5, atol=1e-7, msg=name)


def ways_without() -> dict[str, Callable[[Tensor], Tensor]]:
    """Weights whose gradient autograd gets as always."""

    def without_a_gradient(w: Tensor) -> Tensor:
        w.grad = None
        return w

    def transposed(w: Tensor) -> Tensor:
        w.grad = torch.zeros(w.T.shape, device=DEVICE).T
        return w

    return {
        "no .grad": without_a_gradient,
        "no leaf": lambda w: w[:],
        "no leaf, transposed": lambda w: w.T.contiguous().T,
        "another layout": transposed,
    }


@pytest.mark.parametrize("way", ways_without())
def test_others_get_their_gradient_from_autograd(way: str) -> None:
    x, w = torch.randn(9, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(x, w).sum(), w)
    w.grad = torch.zeros_like(w)
    given = ways_without()[way](w)
    handed_over: set[str] = set()
    note(w, handed_over)
    with gradients_in_place():
        linear(x, given).sum().backward()
    assert handed_over
    torch.testing.assert_close(w.grad, expected)


def test_bfloat16_weights_and_plain_pytorch_are_left_to_autograd() -> None:
    x, w = torch.randn(9, 8, device=DEVICE).half(), torch.randn(6, 8, device=DEVICE).half().requires_grad_()
    w.grad = torch.zeros_like(w)
    wide = w.detach().float().requires_grad_()
    wide.grad = torch.zeros_like(wide)
    handed_over: set[str] = set()
    note(w, handed_over, "half")
    note(wide, handed_over, "plain")
    with gradients_in_place():
        linear(x, w).sum().backward()
        with use_backend("torch"):
            linear(x, wide).sum().backward()
    assert handed_over == {"half", "plain"}


def model(tensors: dict[str, Tensor], ids: Tensor, recompute: bool) -> Tensor:
    """A tied table, used twice, and a projection and an MLP behind a checkpoint."""

    def block(x: Tensor) -> Tensor:
        x = linear(x, tensors["w"])
        return gelu_mlp(x, tensors["w_fc"], None, tensors["w_proj"], None)

    x = embed(ids, tensors["wte"], tensors["wpe"], out_dtype=F16)
    x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return linear_cross_entropy(x.flatten(0, 1), tensors["wte"], ids.flatten())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_by_every_way(recompute: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    shapes = {"wte": (11, 8), "wpe": (5, 8), "w": (8, 8), "w_fc": (32, 8), "w_proj": (8, 32)}
    tensors = {name: torch.randn(shape, device=DEVICE).requires_grad_() for name, shape in shapes.items()}
    ids = torch.randint(11, (3, 5), device=DEVICE)
    expected = torch.autograd.grad(model(tensors, ids, False), [*tensors.values()])
    for t in tensors.values():
        t.grad = torch.ones_like(t)
    handed_over: set[str] = set()
    for name, t in tensors.items():
        note(t, handed_over, name)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for _ in range(2):
        with gradients_in_place():
            call(tensors, ids, recompute).backward()
    assert handed_over == (tensors.keys() if compiled else set()), (
        "a compiled graph's gradients go to autograd"
    )
    for (name, t), gradient in zip(tensors.items(), expected, strict=True):
        torch.testing.assert_close(t.grad, 1 + 2 * gradient, rtol=2e-3, atol=2e-3, msg=name)


def test_rows_without_a_token_are_left_alone() -> None:
    """Whatever is there, NaN too: nothing is read or written."""
    table, positions = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (9, 4))
    table.grad, positions.grad = torch.full_like(table, float("nan")), torch.zeros_like(positions)
    used = torch.tensor([[1, 7, 1]], device=DEVICE)
    table.grad[used.flatten()] = 1.0
    with gradients_in_place():
        embed(used, table, positions).sum().backward()
    assert torch.equal(table.grad[[1, 7]], torch.tensor([[3.0], [2.0]], device=DEVICE).expand(2, 8))
    assert table.grad.isnan().all(1).sum() == 7
    assert torch.equal(positions.grad[:, 0], torch.tensor([1.0, 1.0, 1.0, 0.0], device=DEVICE))


def test_the_same_bits_twice() -> None:
    for operator in WEIGHTS:
        example = in_place(SMALL[operator])
        runs = [results(example, draw(example, DEVICE, F16, F32)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), operator
