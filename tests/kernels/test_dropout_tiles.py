"""The mask of an attention tile, computed in a kernel, is bit for bit the one of PyTorch's definition."""

import pytest
import torch
import triton
import triton.language as tl

from fusedgpt.kernels.dropout_mask import (
    attention_keep_mask,
    attention_threshold,
    dropout_key,
    int32_bits,
    keep_scores,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def mask_kernel(
    out, seed, stream, threshold, q_len, k_len, Q: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr
):
    head = tl.program_id(0)
    q = tl.program_id(1) * Q + tl.arange(0, Q)
    k = tl.program_id(2) * K + tl.arange(0, K)
    key = dropout_key(seed, stream)
    at = out + head * q_len * k_len + q[:, None] * k_len + k[None, :]
    inside = (q < q_len)[:, None] & (k < k_len)[None, :]
    if TRANSPOSED:
        keep = tl.trans(keep_scores(key, head, q[None, :], k[:, None], threshold))
    else:
        keep = keep_scores(key, head, q[:, None], k[None, :], threshold)
    tl.store(at, keep.to(tl.int8), mask=inside)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("seed", "stream", "p"), [(3, 0, 0.1), (-(2**45) - 7, 2**31 + 5, 0.5), (2**62, 11, 0.999)]
)
def test_tiles_agree_with_the_definition(
    tile: tuple[int, int], transposed: bool, seed: int, stream: int, p: float
) -> None:
    heads, q_len, k_len = 3, 37, 53
    seeds = torch.tensor([seed], device=DEVICE)
    out = torch.full((heads, q_len, k_len), 2, dtype=torch.int8, device=DEVICE)
    grid = (heads, triton.cdiv(q_len, tile[0]), triton.cdiv(k_len, tile[1]))
    mask_kernel[grid](
        out,
        seeds,
        int32_bits(stream),
        attention_threshold(p),
        q_len,
        k_len,
        Q=tile[0],
        K=tile[1],
        TRANSPOSED=transposed,
    )
    expected = attention_keep_mask(seeds, stream, heads, q_len, k_len, p)
    assert torch.equal(out.bool(), expected)
    assert out.max() <= 1
