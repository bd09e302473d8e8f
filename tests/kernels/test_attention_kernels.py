"""The attention kernels against float64, over drawn lengths, options and layouts; in Triton's interpreter without a GPU.

There a tile has 16 or 32 rows and columns, so that a few dozen positions have whole, masked and ragged tiles.
"""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusedgpt.kernels import attention, causal_attention, use_backend
from fusedgpt.kernels.dropout_mask import attention_keep_mask
from fusedgpt.kernels.ops.attention.operator import _launch_forward

from .attention_oracle import DEVICE, F16, F32, SEED, assert_no_less_exact, check, draw, outputs, written_out

# no shrinking: at a second an example, a failure would take minutes to be told
drawn = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])

lengths = st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 48, 64]))


@drawn
@given(
    kind=st.sampled_from(
        [
            (F32, 1),
            (F32, 5),
            (F32, 16),
            (F32, 24),
            (F32, 64),
            (F16, 3),
            (F16, 16),
            (F16, 32),
            (F16, 64),
            (F16, 80),
            (F16, 128),
        ]
    ),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    q_len=lengths,
    k_len=st.one_of(st.none(), lengths),
    causal=st.sampled_from([True, True, False]),
    p=st.sampled_from([0.0, 0.0, 0.1, 0.6, 1.0]),
    scale=st.sampled_from([None, None, 0.7]),
    padded=st.booleans(),
)
def test_any_shape_and_option(
    kind: tuple[torch.dtype, int],
    batch: int,
    heads: int,
    q_len: int,
    k_len: int | None,
    causal: bool,
    p: float,
    scale: float | None,
    padded: bool,
) -> None:
    dtype, head_dim = kind
    k_len = k_len or q_len
    key = (batch, k_len, heads, head_dim)
    *tensors, dout = draw((batch, q_len, heads, head_dim), key, key, (batch, q_len, heads, head_dim))
    generator = torch.Generator().manual_seed(q_len)
    first_key = torch.randint(-3, k_len + 3, (batch, q_len), generator=generator).to(DEVICE)
    options = {"dropout_p": p, "seed": SEED, "stream": 4, "scale": scale, "causal": causal}
    check(tensors, dout, dtype, first_key=first_key if padded else None, **options)


@pytest.mark.parametrize("tile", [(37, 37), (33, 64), (64, 33), (5, 70), (70, 5), (1, 40), (48, 48)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_way_a_diagonal_crosses_tiles(tile: tuple[int, int], causal: bool) -> None:
    q_len, k_len = tile
    *tensors, dout = draw((1, q_len, 1, 16), (1, k_len, 1, 16), (1, k_len, 1, 16), (1, q_len, 1, 16))
    check(tensors, dout, F32, causal=causal)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_packed(dtype: torch.dtype, p: float) -> None:
    qkv, dout = draw((2, 35, 3 * 60), (2, 35, 60))

    def separate(qkv: Tensor, run: Any) -> Tensor:
        q, k, v = (t.unflatten(2, (3, 20)) for t in qkv.chunk(3, 2))
        return run(q, k, v, dropout_p=p, seed=SEED, stream=1).flatten(2)

    with use_backend("triton"):
        ours = outputs(lambda t: causal_attention(t, 3, p, SEED, 1), [qkv], dout, dtype)
        apart = outputs(lambda t: separate(t, attention), [qkv], dout, dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, apart, strict=True))
    torchs, exact = (
        outputs(lambda t: separate(t, written_out), [qkv], dout, kind) for kind in (dtype, torch.float64)
    )
    assert_no_less_exact(ours, torchs, exact)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("p", [0.004, 0.5, 0.999])
def test_masks_are_those_of_pytorch_bit_for_bit(p: float, transposed: bool) -> None:
    """With equal scores and unit values or gradients, one entry of the output tells of one bit of the mask."""
    length, heads = 64, 2
    zeros = torch.zeros(1, length, heads, length, device=DEVICE)
    unit = torch.eye(length, device=DEVICE)[None, :, None].expand(1, length, heads, length)
    v = (zeros if transposed else unit).detach().requires_grad_()
    options = {"dropout_p": p, "seed": SEED, "stream": 7, "causal": False}
    with use_backend("triton"):
        out = attention(zeros, zeros, v, **options)
        (dv,) = torch.autograd.grad(out, v, unit)
    kept = dv.permute(0, 2, 3, 1) if transposed else out.transpose(1, 2)  # (1, H, q, k)
    expected = attention_keep_mask(SEED, 7, heads, length, length, p)
    assert torch.equal(kept[0] > 0, expected)


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("padded", [False, True])
def test_large_scores(size: float, padded: bool) -> None:
    """Scores up to about 1, 1e3 and 1e5, beside a kernel that keeps no more than the log-sum-exp either: torch's own."""
    *tensors, dout = draw(*[(1, 40, 2, 16)] * 4, size=size)
    first_key = torch.arange(40, device=DEVICE)[None] // 2 if padded else None

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if first_key is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        key = torch.arange(40, device=DEVICE)
        seen = (key <= key[:, None]) & (key >= first_key[0, :, None])
        return F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)

    with use_backend("triton"):
        ours = outputs(lambda *t: attention(*t, first_key=first_key), tensors, dout, F32)
    q, k, _ = (t.transpose(1, 2) for t in tensors)
    largest_score = (q @ k.mT).abs().max().item() / 4
    torchs, exact = (outputs(fused, tensors, dout, dtype) for dtype in (F32, torch.float64))
    assert_no_less_exact(ours, torchs, exact, largest_score)


def test_a_score_of_minus_infinity_has_no_weight() -> None:
    q, k, v = (t.float() for t in draw(*[(1, 40, 2, 16)] * 3))
    q[..., 0] = 1.0
    k[:, ::3, :, 0] = -math.inf
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    with use_backend("triton"):
        out = attention(q, k, v, causal=False)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_rows_that_see_nothing(p: float) -> None:
    *tensors, dout = draw(*[(2, 40, 2, 16)] * 4)
    blind = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    blind[0, :33] = blind[1, ::3] = True
    first_key = torch.where(blind, 2**40, 0)
    out, dq, dk, dv = check(tensors, dout, F32, dropout_p=p, seed=SEED, first_key=first_key)
    assert out[blind].eq(0).all()
    assert dq[blind].eq(0).all()
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))


@pytest.mark.parametrize(("batch", "q_len", "k_len"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_do(batch: int, q_len: int, k_len: int) -> None:
    key = (batch, k_len, 2, 16)
    *tensors, dout = draw((batch, q_len, 2, 16), key, key, (batch, q_len, 2, 16))
    assert all(t.eq(0).all() for t in check(tensors, dout, F32))


def test_any_strides_and_expanded_gradients() -> None:
    storage = torch.randn(16, 2, 35, 3, device=DEVICE)
    apart = storage.permute(3, 2, 1, 0)  # (B, T, H, D) with the elements of a head far apart
    shared = torch.randn(1, 35, 1, 16, device=DEVICE).expand(3, 35, 2, 16)
    rows = torch.randn(3, 70, 2, 16, device=DEVICE)[:, ::2]
    leaves = [t.detach().requires_grad_() for t in (apart, shared, rows)]
    results = []
    for run in (attention, written_out):
        with use_backend("triton"):
            out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])  # a gradient of stride 0
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    qkv = torch.randn(3, 96, 35, device=DEVICE).mT  # packed, but transposed
    with use_backend("triton"):
        assert torch.equal(causal_attention(qkv, 2), causal_attention(qkv.contiguous(), 2))


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((2, 3, 2), (2**31 + 64, 32, 16)),
        ((2, 3, 2), (128, 32, 2**31)),
        ((2, 3, 2), (64, 2**29, 16)),  # too far apart for a tile: a copy
        ((1, 600, 1), (16, 2**22, 16)),  # not too far
    ],
    ids=str,
)
def test_offsets_beyond_32_bits(sizes: tuple[int, int, int], strides: tuple[int, int, int]) -> None:
    """Of a batch, a position or a head; of the memory between them no page is ever touched."""
    values, query, dout = draw((*sizes, 16), (sizes[0], 1, sizes[2], 16), (sizes[0], 1, sizes[2], 16))
    span = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 16
    storage = torch.empty(span, dtype=F16, device=DEVICE)
    far = storage.as_strided((*sizes, 16), (*strides, 1)).copy_(values)
    with use_backend("triton"):
        near = outputs(lambda q, x: attention(q, x, x), [query, values], dout, F16)
        q, x = query.half().requires_grad_(), far.detach().requires_grad_()
        out = attention(q, x, x)
        gradients = torch.autograd.grad(out, (q, x), dout.half())
        rows = x.detach()[:, -1:]  # as queries: one tile, or rows that are copied
        assert torch.equal(attention(rows, x, x), attention(rows.contiguous(), x, x))
    assert all(torch.equal(a, b) for a, b in zip([out, *gradients], near, strict=True))


def test_the_same_bits_twice() -> None:
    *tensors, dout = draw(*[(2, 40, 2, 16)] * 4)
    with use_backend("triton"):
        first, second = (
            outputs(lambda *t: attention(*t, dropout_p=0.2, seed=SEED), tensors, dout, F16) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="the choice of tiles is the interpreter's")
def test_heads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which heads are visited changes nothing, whether a group holds one, some or all of them."""
    *tensors, dout = draw(*[(1, 40, 5, 16)] * 4)
    one = 2 * 40 * 16 * 4  # bytes of a head's keys and values
    results = []
    for cached in (one, 2 * one, 100 * one):
        monkeypatch.setattr(sys.modules[attention.__module__], "_CACHED", cached)
        with use_backend("triton"):
            results.append(outputs(attention, tensors, dout, F32))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_log_sum_exp() -> None:
    """What is kept for the backward: of the scores as float32 in units of log2, +inf where a row sees nothing."""
    q, k, v = (t.float() for t in draw(*[(2, 35, 2, 16)] * 3))
    first_key = torch.zeros(2, 35, dtype=torch.int32, device=DEVICE)
    first_key[0, 3] = 35
    with use_backend("triton"):
        _, lse = _launch_forward(q, k, v, first_key, 0.0, None, 0, 0.25, True)
    scores = (
        torch.einsum("bihd,bjhd->bhij", q, k)
        .mul(0.25)
        .masked_fill(torch.ones(35, 35, dtype=torch.bool, device=DEVICE).triu(1), -math.inf)
    )
    expected = scores.logsumexp(-1) / math.log(2)
    expected[0, :, 3] = math.inf
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize(("dtype", "head_dim", "widest"), [(F32, 65, 64), (F16, 129, 128)])
def test_wide_heads_run_in_pytorch(dtype: torch.dtype, head_dim: int, widest: int) -> None:
    q, k, v = (t.to(dtype) for t in draw(*[(1, 3, 1, head_dim)] * 3))
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=f"attention.*heads are {head_dim} wide.* up to {widest}"),
    ):
        attention(q, k, v)
    assert attention(q, k, v).shape == (1, 3, 1, head_dim)
