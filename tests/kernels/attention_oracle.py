"""Attention by torch's operators, and the rule by which the kernels are held against it in float64."""

from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import attention, use_backend
from fusedgpt.kernels.dropout_mask import attention_keep_mask
from fusedgpt.kernels.examples import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([2**41 + 99], device=DEVICE)
F32, F16 = torch.float32, torch.float16


def draw(*shapes: tuple[int, ...], size: float = 1.0) -> list[Tensor]:
    """Float64 tensors of numbers that float16 can hold."""
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [(torch.randn(shape, generator=generator) * size).to(DEVICE, F16).double() for shape in shapes]


def outputs(function: Any, tensors: list[Tensor], dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output of function(*tensors) in dtype and the gradients of the tensors."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    scale: float | None = None,
    causal: bool = True,
    first_key: Tensor | None = None,
) -> Tensor:
    """Attention by torch's operators in the dtype of its inputs."""
    lengths = q.shape[1], k.shape[1]
    visible = torch.ones(lengths, dtype=torch.bool, device=q.device)
    visible = (visible.tril(lengths[1] - lengths[0]) if causal else visible)[None, None]
    if first_key is not None:
        visible = visible & (torch.arange(lengths[1], device=q.device) >= first_key[:, None, :, None])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.mT).float() if q.dtype == F16 else q @ k.mT
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, -1e30).softmax(-1).masked_fill(~visible, 0.0)
    if dropout_p:
        heads = q.shape[0] * q.shape[1]
        keep = attention_keep_mask(seed, stream, heads, *lengths, dropout_p).view(weights.shape)
        dropped = round(128 * dropout_p) / 128
        weights = torch.where(keep, weights / (1 - dropped), 0.0) if dropped < 1 else weights * 0
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def assert_no_less_exact(
    ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor], score: float = 1.0
) -> None:
    """By the rule, with units in the last place of the largest value among all, times the largest score above 1.

    Among all, since gradients of scores may cancel to nothing: what remains is the rounding of what cancelled. Times the
    score, since the backward computes weights again as exp(score - lse), from the transposed matmul: where a BLAS sums
    that in another order than the forward's, weights err by the rounding of a score. OpenBLAS does on some processors,
    torch's own kernel does not.
    """
    largest = max((t.abs().max().item() for t in exact if t.numel()), default=0.0) * max(score, 1.0)
    for index, (a, b, truth) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert a.dtype == b.dtype, f"tensor {index}"
        assert a.shape == truth.shape, f"tensor {index}"
        if truth.numel():
            error, allowed = found = compare(a, b, truth, "score", largest)
            assert found.ok, f"tensor {index}: relative error {error:.2e}, allowed {allowed:.2e}"


def check(tensors: list[Tensor], dout: Tensor, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    with use_backend("triton"):
        ours = outputs(lambda *t: attention(*t, **options), tensors, dout, dtype)
    torchs = outputs(lambda *t: written_out(*t, **options), tensors, dout, dtype)
    exact = outputs(lambda *t: written_out(*t, **options), tensors, dout, torch.float64)
    assert_no_less_exact(ours, torchs, exact)
    return ours
