"""What is particular to the feed-forward sub-layer: GELU over its whole range, and what recomputing saves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fusedgpt.kernels import gelu_mlp

from .cases import results
from .tolerances import assert_no_less_exact

ONE = torch.ones(1, 1)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """The operator with both projections the identity: x (N, 1) -> (N, 1)."""
    one = ONE.to(x.dtype)
    return gelu_mlp(x, one, None, one, None, approximate)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_and_its_slope_over_the_whole_range(dtype: torch.dtype, approximate: str) -> None:
    def ours(x: Tensor) -> Tensor:
        return gelu(x, approximate)

    def torchs(x: Tensor) -> Tensor:
        return F.gelu(x, approximate=approximate)

    near = torch.linspace(-12, 12, 2401).to(dtype)[:, None]
    assert_no_less_exact(
        *(results(ours, {"x": near}), results(torchs, {"x": near}), results(torchs, {"x": near.double()})),
        slack="slope",
    )
    far = torch.tensor([[-6e4], [-300.0], [-50.0], [50.0], [300.0], [6e4]]).to(dtype)
    found = results(ours, {"x": far}, [torch.ones_like(far)])
    assert torch.equal(found["output 0"], far.relu())
    assert torch.equal(found["dx"], far.sign().relu())


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_the_two_forms_are_not_the_same(approximate: str) -> None:
    x = torch.tensor([[-2.0]], dtype=torch.float64)
    other = {"tanh": "none", "none": "tanh"}[approximate]
    assert (gelu(x, approximate) - F.gelu(x, approximate=other)).abs() > 1e-5
    torch.testing.assert_close(gelu(x, approximate), F.gelu(x, approximate=approximate))


def test_the_slope_of_the_slope_is_refused_where_it_would_be_wrong() -> None:
    """The tanh form saves an intermediate value, so differentiating its backward would leave terms out."""
    x = torch.ones(3, 1, requires_grad=True)
    (slope,) = torch.autograd.grad(gelu(x, "tanh").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


class Held(TorchDispatchMode):
    """How many bytes of what was allocated inside the block, views of `known` apart, are still held by anyone."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storage = out.untyped_storage()
        if storage._cdata not in self.known:
            self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_recomputing_holds_nothing_but_the_output(approximate: str) -> None:
    x, w_fc, w_proj = torch.randn(50, 8), torch.randn(32, 8), torch.randn(8, 32)
    for tensor in (x, w_fc, w_proj):
        tensor.requires_grad_()

    def held(recompute: bool) -> tuple[int, Callable[[], tuple[Tensor, ...]]]:
        with Held(x, w_fc, w_proj) as memory:
            out = gelu_mlp(x, w_fc, None, w_proj, None, approximate, recompute)
        return memory.bytes() - out.nbytes, lambda: torch.autograd.grad(out.sum(), (x, w_fc, w_proj))

    kept, gradients = held(recompute=False)
    recomputed, same_gradients = held(recompute=True)
    hidden = 50 * 32 * 4
    assert kept >= 2 * hidden  # the pre-activation and the activation, at least
    assert recomputed == 0
    assert all(torch.equal(a, b) for a, b in zip(gradients(), same_gradients(), strict=True))
