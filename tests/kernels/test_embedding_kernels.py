"""The embedding's kernels against torch's own operators in float64, over drawn shapes and skewed tokens.

In Triton's interpreter without a GPU. A chunk has 16 rows there, a tile 4 rows and 128 columns.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedgpt.kernels import embed, use_backend
from fusedgpt.kernels._triton import INTERPRETED
from fusedgpt.kernels.dropout_mask import keep_mask, keep_scale
from fusedgpt.kernels.ops.embedding import _row_sums, embed_kernel
from fusedgpt.kernels.tiles import Tile

from .tolerances import assert_no_less_exact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([2**40 + 7], device=DEVICE)
F32, F16 = torch.float32, torch.float16

# no shrinking: at up to a second an example, a failure would take minutes to be told
drawn = settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])

# so many tokens out of so large a vocabulary
SKEWS: dict[str, Callable[[int, int], Tensor]] = {
    "equal": lambda count, vocabulary: torch.full((count,), vocabulary - 1),
    "different": lambda count, vocabulary: torch.randperm(max(count, vocabulary))[:count] % vocabulary,
    "half are one": lambda count, vocabulary: torch.where(
        torch.rand(count) < 0.5, 0, torch.randint(vocabulary, (count,))
    ),
    "ends of the table": lambda count, vocabulary: torch.randint(2, (count,)) * (vocabulary - 1),
}


def written_out(
    ids: Tensor, wte: Tensor, wpe: Tensor, p: float, stream: int, out_dtype: torch.dtype
) -> Tensor:
    x = F.embedding(ids, wte) + F.embedding(torch.arange(ids.shape[1], device=ids.device), wpe)
    if p:
        rows = ids.numel()
        x = x * (keep_mask(SEED, stream, rows, x.shape[2], p) * keep_scale(p)).view(x.shape)
    return x.to(out_dtype)


def fused(ids: Tensor, wte: Tensor, wpe: Tensor, p: float, stream: int, out_dtype: torch.dtype) -> Tensor:
    with use_backend("triton"):
        return embed(ids, wte, wpe, p, SEED, stream, out_dtype)


def results(
    function: Callable[..., Tensor],
    ids: Tensor,
    tables: list[Tensor],
    dx: Tensor,
    p: float,
    out_dtype: torch.dtype,
) -> dict[str, Tensor]:
    leaves = [table.clone().requires_grad_() for table in tables]
    x = function(ids, *leaves, p, 3, out_dtype)
    gradients = torch.autograd.grad(x, leaves, dx.to(x.dtype))
    assert [g.dtype for g in gradients] == [t.dtype for t in tables]
    return {"x": x.detach(), "dwte": gradients[0], "dwpe": gradients[1]}


@drawn
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 40),
    vocabulary=st.integers(1, 30),
    columns=st.one_of(st.integers(1, 60), st.integers(129, 150)),
    skew=st.sampled_from(sorted(SKEWS)),
    kind=st.sampled_from([(F32, F32), (F32, F16), (F16, F16)]),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]),
    p=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_both_directions(
    batch: int,
    length: int,
    vocabulary: int,
    columns: int,
    skew: str,
    kind: tuple[torch.dtype, torch.dtype],
    ids_dtype: torch.dtype,
    p: float,
) -> None:
    torch.manual_seed(batch * length + columns)
    ids = SKEWS[skew](batch * length, vocabulary).view(batch, length).to(DEVICE, ids_dtype)
    tables = [torch.randn(rows, columns).half().to(DEVICE) for rows in (vocabulary, length + 3)]
    dx = torch.randn(batch, length, columns).half().to(DEVICE)
    table_dtype, out_dtype = kind
    low = [t.to(table_dtype) for t in tables]
    double = [t.double() for t in tables]
    assert_no_less_exact(
        results(fused, ids, low, dx, p, out_dtype),
        results(written_out, ids, low, dx, p, out_dtype),
        results(written_out, ids, double, dx, p, torch.float64),
    )


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 8), (20, 8)])
@pytest.mark.parametrize("skew", SKEWS)
def test_every_row_is_summed_once_whatever_the_skew(skew: str, batch: int, length: int) -> None:
    """Whole numbers, so that every order of additions gives the same."""
    torch.manual_seed(batch)
    ids = SKEWS[skew](batch * length, 7).view(batch, length).to(DEVICE)
    wte, wpe = (torch.zeros(n, 130, device=DEVICE, requires_grad=True) for n in (7, length))
    dx = torch.randint(-9, 9, (batch, length, 130), device=DEVICE).float()
    dwte, dwpe = torch.autograd.grad(fused(ids, wte, wpe, 0.0, 0, F32), [wte, wpe], dx)
    assert torch.equal(dwte, torch.zeros_like(wte).index_add(0, ids.flatten(), dx.flatten(0, 1)))
    assert torch.equal(dwpe, dx.sum(0))


def test_the_mask_is_that_of_pytorch_bit_for_bit() -> None:
    ids = torch.randint(5, (3, 21), device=DEVICE)
    wte, wpe = torch.ones(5, 133, device=DEVICE), torch.zeros(40, 133, device=DEVICE)
    expected = keep_mask(SEED, 9, 63, 133, 0.3) * keep_scale(0.3)
    assert torch.equal(fused(ids, wte, wpe, 0.3, 9, F32), expected.view(3, 21, 133))


def test_the_same_bits_twice_and_nothing_written_over() -> None:
    torch.manual_seed(1)
    ids = SKEWS["half are one"](60, 9).view(5, 12).to(DEVICE)
    wte, wpe = (torch.randn(n, 20, device=DEVICE, requires_grad=True) for n in (9, 12))
    dx = torch.randn(5, 12, 20, device=DEVICE)
    before = [t.detach().clone() for t in (ids, wte, wpe, dx)]
    x = fused(ids, wte, wpe, 0.2, 1, F32)
    first = torch.autograd.grad(x, [wte, wpe], dx, retain_graph=True)
    second = torch.autograd.grad(x, [wte, wpe], dx)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((ids, wte, wpe, dx), before, strict=True))


def test_any_strides_empty_batches_expanded_gradients_and_frozen_tables() -> None:
    ids = torch.randint(6, (13, 2), device=DEVICE).T
    wte = torch.randn(9, 6, device=DEVICE).T.requires_grad_()
    wpe = torch.randn(26, 18, device=DEVICE)[::2, ::2]
    x = fused(ids, wte, wpe, 0.0, 0, F32)
    (dwte,) = torch.autograd.grad(x.sum(), wte)  # an incoming gradient of stride 0, and wpe wants none
    torch.testing.assert_close(x, written_out(ids, wte, wpe, 0.0, 0, F32))
    counts = torch.bincount(ids.flatten(), minlength=6).float()
    assert torch.equal(dwte, counts[:, None].expand(6, 9))
    for empty in (ids[:0], ids[:, :0]):
        x = fused(empty, wte, wpe, 0.1, 0, F32)
        assert x.shape == (*empty.shape, 9)
        assert torch.equal(torch.autograd.grad(x.sum(), wte)[0], torch.zeros(6, 9, device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does not raise")
@pytest.mark.parametrize("wrong", [-1, 7, 2**32 + 1])
def test_ids_out_of_range_are_named_on_a_cpu(wrong: int) -> None:
    ids = torch.tensor([[0, wrong, 6]])
    with pytest.raises(ValueError, match=rf"^embed: ids range from {min(0, wrong)} to .*the rows 0 to 6$"):
        fused(ids, torch.ones(7, 4), torch.ones(3, 4), 0.0, 0, F32)


@pytest.mark.parametrize("wrong", [-1, 7, 2**32 + 1, -(2**62)])
def test_ids_out_of_range_give_nan_on_a_gpu_and_no_gradient(wrong: int) -> None:
    ids = torch.tensor([0, wrong, 6, wrong], device=DEVICE)
    wte, wpe = torch.ones(7, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE)
    out = torch.empty(4, 4, device=DEVICE)
    embed_kernel[(1,)](ids, wte, wpe, out, None, 0, 0, 1.0, 4, 2, 7, C=4, tile=Tile(4, 4, 4, 1, 1, 0, ""))
    assert torch.equal(out.isnan()[:, 0], torch.tensor([False, True, False, True], device=DEVICE))
    assert torch.equal(out[::2], torch.full((2, 4), 2.0, device=DEVICE))
    keys, order = ids.clamp(-1, 7).int().sort(stable=True)
    dwte = _row_sums(torch.ones(4, 4, device=DEVICE), keys, order, 7, F32, 0.0, None, 0)
    assert torch.equal(dwte[:, 0], torch.tensor([1.0, 0, 0, 0, 0, 0, 1], device=DEVICE))
