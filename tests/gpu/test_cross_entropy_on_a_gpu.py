"""What only a GPU can show of the head's loss: memory at full size, no synchronisation, CUDA graphs, huge chunks."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fusedgpt.bench.timing import full_rows
from fusedgpt.kernels import linear_cross_entropy, use_backend
from fusedgpt.kernels._triton import INTERPRETED

from .test_kernels_on_a_gpu import BF16, GPU, captured, leaf

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU that Triton compiles for"
)
REDUCTIONS = ["mean", "none"]
VOCAB, PADDED = 50257, 50304


@pytest.fixture(autouse=True)
def kernels_only() -> Iterator[None]:
    with use_backend("triton"):
        yield
    torch.cuda.empty_cache()


def targets(rows: int) -> torch.Tensor:
    drawn = torch.randint(VOCAB, (rows,), device=GPU)
    drawn[::9] = -100
    return drawn


def loss_and_gradients(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, reduction: str) -> list:
    loss = linear_cross_entropy(x, weight, ids, VOCAB, reduction=reduction)
    return [loss, *torch.autograd.grad(loss, (x, weight), torch.ones_like(loss))]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, BF16], ids=str)
def test_memory_beside_inputs_and_gradients(reduction: str, weight_dtype: torch.dtype) -> None:
    rows = full_rows(GPU)
    x, weight, ids = leaf(rows, 768), leaf(PADDED, 768, dtype=weight_dtype), targets(rows)
    loss_and_gradients(x[:256], weight, ids[:256], reduction)  # the library's workspaces, once and for all
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = loss_and_gradients(x, weight, ids, reduction)
    held = sum(t.numel() * t.itemsize for t in results)
    assert torch.cuda.max_memory_allocated() - before - held <= 0.6 * 2**30


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_waits_for_the_device(reduction: str) -> None:
    x, weight, ids = leaf(300, 64), leaf(PADDED, 64, dtype=torch.float32), targets(300)
    loss_and_gradients(x, weight, ids, reduction)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(x, weight, ids, reduction)
        with torch.no_grad():
            linear_cross_entropy(x, weight, ids, VOCAB, reduction=reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_in_a_cuda_graph_it_is_that_outside(reduction: str) -> None:
    x, weight, ids = leaf(5000, 64), leaf(PADDED, 64, dtype=torch.float32), targets(5000)  # two chunks
    graph, results = captured(lambda: loss_and_gradients(x, weight, ids, reduction))
    for _ in range(2):
        ids.copy_(targets(5000))
        graph.replay()
        replayed = [result.detach().clone() for result in results]
        eager = loss_and_gradients(x, weight, ids, reduction)
        assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


@pytest.mark.parametrize("wrong", [VOCAB, PADDED, -1, 2**40])
def test_a_target_out_of_range_makes_nan_of_its_loss_and_no_fault(wrong: int) -> None:
    x, weight, ids = leaf(10, 64), leaf(PADDED, 64), targets(10)
    ids[4] = wrong
    loss, dx, _ = loss_and_gradients(x, weight, ids, "none")
    torch.cuda.synchronize()
    rows = torch.arange(10, device=GPU) == 4
    assert torch.equal(loss.isnan(), rows)
    assert torch.equal(dx.isnan().all(1), rows)
    assert loss_and_gradients(x, weight, ids, "mean")[0].isnan()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_chunk_of_more_than_2_to_the_31_logits(reduction: str) -> None:
    """A chunk has at least 128 rows; the last of them lie beyond what 32 bits can address."""
    free, _ = torch.cuda.mem_get_info()
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    columns, last = 2**24 + 64, slice(125, 128)
    x, weight = leaf(128, 8), leaf(columns, 8)
    ids = torch.randint(columns, (128,), device=GPU)
    loss = linear_cross_entropy(x, weight, ids, reduction=reduction)
    (dx,) = torch.autograd.grad(loss.sum() * (128 if reduction == "mean" else 1), x)
    few = x.detach()[last].clone().requires_grad_()
    expected = F.cross_entropy((few @ weight.detach().T).float(), ids[last], reduction="none")
    if reduction == "none":
        torch.testing.assert_close(loss[last], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dx[last], torch.autograd.grad(expected.sum(), few)[0], rtol=2e-2, atol=2e-2)
