"""The bytes a kernel moves are those its docstring counts: every load and store of the interpreter is weighed."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fusedgpt.kernels import (
    add_layer_norm,
    causal_attention,
    dropout,
    embed,
    gelu_mlp,
    layer_norm,
    linear_cross_entropy,
    use_backend,
)
from fusedgpt.kernels.backend import _triton
from fusedgpt.kernels.ops.column_sum import column_sum

pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="only the interpreter can be watched")

ROWS, COLUMNS, PROGRAMS = 96, 80, 2
TENSOR = ROWS * COLUMNS  # elements
STATS = 2 * ROWS * 4  # bytes: mean and reciprocal standard deviation
PARAMETER = PROGRAMS * COLUMNS * 4  # bytes: each program reads it, or writes its partial sum, once
SEED = PROGRAMS * 8


@contextmanager
def moved(monkeypatch: pytest.MonkeyPatch, distinct: bool = False) -> Iterator[list[int]]:
    """Bytes of each load and store. distinct: an address that elements of a tile share, such as a parameter's, counts once."""
    from triton.runtime.interpreter import InterpreterBuilder

    weights: list[int] = []

    def watch(name: str, mask_at: int) -> None:
        original = getattr(InterpreterBuilder, name)

        def watched(self, pointers, *rest, **options):
            mask = np.asarray(rest[mask_at].data).astype(bool)
            elements = len(np.unique(pointers.data[mask])) if distinct else int(mask.sum())
            weights.append(elements * pointers.get_element_ty().primitive_bitwidth // 8)
            return original(self, pointers, *rest, **options)

        patch.setattr(InterpreterBuilder, name, watched)

    with monkeypatch.context() as patch, use_backend("triton"):
        watch("create_masked_load", 0)  # (pointers, mask, other, ...)
        watch("create_masked_store", 1)  # (pointers, value, mask, ...)
        yield weights


def leaf(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("p", "residual_dtype"), [(0.0, torch.float16), (0.1, torch.float16), (0.0, torch.float32)]
)
def test_add_layer_norm(p: float, residual_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = leaf(ROWS, COLUMNS), leaf(ROWS, COLUMNS, dtype=residual_dtype)
    weight, bias, x_bias = (leaf(COLUMNS, dtype=torch.float32) for _ in range(3))
    seed = torch.tensor([1])
    wide = residual_dtype.itemsize
    drawn = SEED if p else 0
    with moved(monkeypatch, distinct=True) as forward:
        y, residual_out = add_layer_norm(x, residual, weight, bias, 1e-5, p, seed, 0, x_bias)
    assert sum(forward) == TENSOR * (2 * 2 + 2 * wide) + STATS + 3 * PARAMETER + drawn
    with moved(monkeypatch, distinct=True) as backward:
        torch.autograd.backward([y, residual_out], [torch.ones_like(y), torch.ones_like(residual_out)])
    separate_dx = 2 if p or wide == 4 else 0
    assert sum(backward) == TENSOR * (2 + 3 * wide + separate_dx) + STATS + (1 + 3) * PARAMETER + drawn


def test_layer_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (
        leaf(ROWS, COLUMNS),
        leaf(COLUMNS, dtype=torch.float32),
        leaf(COLUMNS, dtype=torch.float32),
    )
    with moved(monkeypatch, distinct=True) as forward:
        y = layer_norm(x, weight, bias)
    assert sum(forward) == 2 * TENSOR * 2 + STATS + 2 * PARAMETER
    with moved(monkeypatch, distinct=True) as backward:
        y.backward(torch.ones_like(y))
    assert sum(backward) == 3 * TENSOR * 2 + STATS + (1 + 2) * PARAMETER


def test_an_output_that_nobody_used_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual, weight = leaf(ROWS, COLUMNS), leaf(ROWS, COLUMNS), leaf(COLUMNS, dtype=torch.float32)
    with use_backend("triton"):
        y, _ = add_layer_norm(x, residual, weight)
    with moved(monkeypatch, distinct=True) as backward:
        y.backward(torch.ones_like(y))
    assert sum(backward) == 3 * TENSOR * 2 + STATS + (1 + 1) * PARAMETER


def test_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    x = leaf(ROWS, COLUMNS)
    with moved(monkeypatch) as forward:
        dropout(x, 0.1, torch.tensor([1]))
    programs = ROWS * 128 // 4096  # tiles of 128 columns
    assert sum(forward) == 2 * TENSOR * 2 + programs * 8


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, length, head_dim = 2, 3, 96, 16
    tensor = batch * heads * length * head_dim * 2  # bytes of q, k, v, the output or a gradient
    kept = batch * heads * length * 4  # of the log-sum-exp
    # three tiles of 32 queries or keys see one, two and three thirds of the other side: nothing beyond the diagonal
    walked = 2
    qkv = leaf(batch, length, 3 * heads * head_dim)
    with moved(monkeypatch) as forward:
        out = causal_attention(qkv, heads)
    assert sum(forward) == (1 + 2 * walked + 1) * tensor + kept
    with moved(monkeypatch) as backward:
        out.backward(torch.ones_like(out))
    # in tiles of 16: twice as many walk as far; the log-sum-exp in, it and the sums of rows out
    queries = (3 + 2 * 2 * walked + 1) * tensor + 3 * kept
    keys = (2 + 2 * walked + 2) * tensor + 2 * walked * kept
    assert sum(backward) == queries + keys


def test_column_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    splits, columns = 2, 70  # three blocks of columns share four programs
    with moved(monkeypatch) as summed:
        column_sum(torch.randn(ROWS, columns).half())
    assert sum(summed) == ROWS * columns * 2 + splits * columns * 4


def test_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, vocabulary = 8, 6, 5
    rows = batch * length
    tables = [torch.randn(n, COLUMNS, requires_grad=True) for n in (vocabulary, length)]
    ids = torch.tensor([3, 0, 3, 3, 3, 4]).repeat_interleave(batch).view(batch, length)
    with moved(monkeypatch) as forward:
        x = embed(ids, *tables, out_dtype=torch.float16)
    assert sum(forward) == rows * (8 + COLUMNS * (4 + 4 + 2))
    with moved(monkeypatch) as backward:
        x.backward(torch.ones_like(x))
    ends = 2 * (3 * 4 * 2 + (vocabulary + length) * 4)  # of three chunks, and of every table row's segment
    partial = (
        2 * COLUMNS * 4
    )  # sorted, the rows 8 to 39 are token 3's: of the chunks of 16, the second lies inside
    assert (
        sum(backward) == rows * 2 * (COLUMNS * 2 + 8) + (vocabulary + length) * COLUMNS * 4 + partial + ends
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_gelu_mlp_beside_the_librarys_matmuls(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    width, hidden = COLUMNS + 60, 2 * COLUMNS  # too wide for the interpreter's row of our own matmuls
    x, w_fc, w_proj = leaf(ROWS, width), leaf(hidden, width), leaf(width, hidden)
    b_fc = leaf(hidden, dtype=torch.float32)
    tensor = ROWS * hidden * 2  # bytes
    with moved(monkeypatch) as forward:
        y = gelu_mlp(x, w_fc, b_fc, w_proj, None, recompute=recompute)
    # a program for each block of 64 columns, which reads its bias and writes its sums once
    assert sum(forward) == 2 * tensor + 4 * hidden
    with moved(monkeypatch) as backward:
        y.backward(torch.ones_like(y))
    assert sum(backward) == 4 * tensor + 4 * hidden + 4 * hidden


def test_gelu_mlp_within_our_own_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    width, hidden, rows = 64, 128, 128  # whole tiles of 64 x 64: what the edges cut off would be weighed too
    x, w_fc, w_proj = leaf(rows, width), leaf(hidden, width), leaf(width, hidden)
    b_fc = leaf(hidden, dtype=torch.float32)
    tensor, across, along = rows * hidden * 2, hidden // 64, rows // 64
    operands = (
        across * rows * width * 2 + along * hidden * width * 2
    )  # each is read once for every tile of the other
    bias = along * hidden * 4
    with moved(monkeypatch) as forward:
        y = gelu_mlp(x, w_fc, b_fc, w_proj, None)
    assert sum(forward) == operands + bias + 2 * tensor
    with moved(monkeypatch) as backward:
        y.backward(torch.ones_like(y))
    assert sum(backward) == operands + 2 * bias + 3 * tensor


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes read a row and one writes it; a row that does not count is not read, and given zeros."""
    counted, ignored, columns = 4, 2, 250
    x, weight = leaf(6, 8), leaf(columns, 8)
    targets = torch.tensor([0, -100, 249, 128, -100, 7])
    row, target, kept = 256 * 2, 8, 2 * 4  # bytes: rows begin at multiples of 128; loss and log-sum-exp
    with moved(monkeypatch) as forward:
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    everywhere = 6 * (target + kept) + counted * 2  # and the target's logit
    gradient = counted * (row + row + 2) + ignored * row
    assert sum(forward) == everywhere + counted * row + (gradient if reduction == "mean" else 0)
    with moved(monkeypatch) as backward:
        loss.sum().backward()
    again = 6 * target + counted * (2 + 4) + gradient
    assert sum(backward) == (again if reduction == "none" else 0)
