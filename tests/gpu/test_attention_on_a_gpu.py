"""What only a GPU can show of attention: descriptors, the copy engine's additions, graphs, huge tensors, large heads."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fusedgpt.bench.timing import full_rows
from fusedgpt.kernels import causal_attention, use_backend
from fusedgpt.kernels._triton import INTERPRETED
from fusedgpt.kernels.examples import Example, attention, parity
from fusedgpt.kernels.examples import causal_attention as causal
from fusedgpt.kernels.ops.attention import operator as module
from fusedgpt.kernels.tiles import ATTENTION_ONE_PASS, DESCRIPTORS, hardware

from .test_kernels_on_a_gpu import BF16, GPU, captured, leaf, seed

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU that Triton compiles for"
)


@pytest.fixture(autouse=True)
def kernels_only():
    with use_backend("triton"):
        yield
    torch.cuda.empty_cache()


@pytest.fixture(params=["one pass", "two passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backward of the test this way, where it can go it, whatever the number of heads."""
    choose_passes(request.param, monkeypatch)
    return request.param


def choose_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in ATTENTION_ONE_PASS.get(hardware(GPU).architecture, ()) if row.rows]
    if name == "one pass" and not rows:
        pytest.skip(f"no row of {hardware(GPU).architecture} asks for one pass")

    def chosen(*read: torch.Tensor) -> Any:
        return rows[0] if name == "one pass" and all(map(module._describable, read)) else None

    monkeypatch.setattr(module, "_one_pass_tile", chosen)


def gradients(qkv: torch.Tensor, n_head: int, p: float, dout: torch.Tensor) -> list[torch.Tensor]:
    out = causal_attention(qkv, n_head, p, seed(5), 1)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


def assert_close(ours: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 * b.abs().max().item())


def heads(
    length: int,
    p: float = 0.0,
    factor: float = 1.0,
    head_dim: int = 64,
    first_key: Any = None,
    **options: Any,
) -> Example:
    example = causal(3, length, 4, head_dim, p, **options)

    def call(qkv: torch.Tensor, **seed: torch.Tensor) -> Any:
        return example.call(qkv=factor * qkv, first_key=first_key, **seed)

    return replace(example, call=call)


def apart(q_len: int, k_len: int, head_dim: int, **options: Any) -> Example:
    return attention(3, q_len, k_len, 4, head_dim, **options)


def documents(length: int) -> torch.Tensor:
    starts = torch.arange(length, device=GPU) // 100 * 100
    return torch.stack([starts, starts // 2, torch.full_like(starts, 150)])


EXAMPLES = {
    "one position": lambda: heads(1),
    "uneven": lambda: heads(333, 0.2),
    "encoder": lambda: heads(333, causal=False),
    "documents": lambda: heads(333, 0.1, first_key=documents(333)),
    "large scores": lambda: heads(200, factor=100.0),
    "larger scores": lambda: heads(200, factor=100.0, scale=1.0),
    "narrow": lambda: heads(200, 0.1, head_dim=16),
    "a width by pointer": lambda: heads(200, 0.1, head_dim=60),
    "decoding one": lambda: apart(1, 777, 64),
    "decoding sixteen": lambda: apart(16, 777, 64),
    "cross-attention": lambda: apart(200, 77, 64, causal=False),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_parity(name: str, passes: str) -> None:
    assert parity(EXAMPLES[name](), GPU, BF16).ok


@pytest.mark.parametrize("head_dim", [80, 128])
def test_parity_of_wide_heads(head_dim: int) -> None:
    for example in (heads(333, 0.1, head_dim=head_dim), apart(4, 333, head_dim)):
        assert parity(example, GPU, BF16).ok


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_descriptors_and_pointers_give_the_same(
    p: float, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hardware(GPU).architecture not in DESCRIPTORS:
        pytest.skip(f"{hardware(GPU).architecture} reads by pointer")
    qkv, dout = leaf(3, 333, 3 * 256), leaf(3, 333, 256)
    by_descriptor = gradients(qkv, 4, p, dout)
    choose_passes("two passes", monkeypatch)
    monkeypatch.setattr(module, "DESCRIPTORS", set())
    assert_close(by_descriptor, gradients(qkv, 4, p, dout))


def test_each_replay_of_a_cuda_graph_draws_the_mask_of_its_seed(passes: str) -> None:
    counter = seed(0)
    qkv, dout = leaf(3, 333, 3 * 256), leaf(3, 333, 256)

    def work() -> list[torch.Tensor]:
        out = causal_attention(qkv, 4, 0.3, counter, 3)
        results = [out.detach(), *torch.autograd.grad(out, qkv, dout)]
        counter.add_(1)
        return results

    graph, results = captured(work)
    seen = []
    for start in (40, 41):
        counter.fill_(start)
        graph.replay()
        seen.append([result.clone() for result in results])
        counter.fill_(start)
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], work(), strict=True))
    assert not torch.equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_same_bits_every_time_at_the_size_of_training(p: float, passes: str) -> None:
    """Of one pass this is the proof that what a tile of keys adds to dq is there before the next one's."""
    batch = full_rows(GPU) // 1024
    qkv, dout = leaf(batch, 1024, 3 * 768), leaf(batch, 1024, 768)
    first = gradients(qkv, 12, p, dout)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(qkv, 12, p, dout), strict=True))


def test_more_than_2_to_31_elements(passes: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    qkv, dout = leaf(920, 1024, 3 * 768), leaf(920, 1024, 768).detach()
    last = gradients(qkv.detach()[-1:].clone().requires_grad_(), 12, 0.0, dout[-1:])
    assert_close([t[-1:] for t in gradients(qkv, 12, 0.0, dout)], last)
