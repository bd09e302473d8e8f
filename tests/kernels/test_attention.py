"""What is particular to attention: which keys a row sees, rows that see none, and scores of any size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import attention, causal_attention

from .cases import Outputs, Tensors, results
from .tolerances import assert_equal_maths, assert_no_less_exact

SEED = torch.tensor(3)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("new", [1, 4, 11])
def test_the_last_queries_alone_get_the_last_rows(new: int, dropout_p: float) -> None:
    """Decoding with a cache: bottom-right alignment. Without dropout; with it the rows count from the first query."""
    q, k, v = (draw(2, 11, 3, 8) for _ in range(3))
    whole = attention(q, k, v, dropout_p, SEED)
    last = attention(q[:, -new:], k, v, dropout_p, SEED)
    same = torch.allclose(last, whole[:, -new:], rtol=1e-12, atol=1e-12)
    assert same == (dropout_p == 0.0 or new == 11)


@pytest.mark.parametrize(
    "first_key", [None, torch.zeros(2, 9, dtype=torch.int32)], ids=["plain", "first_key"]
)
def test_no_row_looks_ahead(first_key: Tensor | None) -> None:
    qkv = draw(2, 9, 72).requires_grad_()
    out = causal_attention(qkv, 3, first_key=first_key)
    (gradient,) = torch.autograd.grad(out[:, :4].sum(), qkv)
    assert gradient[:, :4, 48:].ne(0).all()  # the values that were seen
    assert gradient[:, 4:].eq(0).all()


def test_a_first_key_of_zero_is_none() -> None:
    """Ties torch's own kernel, which runs the plain case, to the written-out one."""
    inputs = {"q": draw(2, 9, 3, 8), "k": draw(2, 9, 3, 8), "v": draw(2, 9, 3, 8)}
    for first in (0, -5):
        first_key = torch.full((2, 9), first)

        def seen(first_key: Tensor = first_key, **qkv: Tensor) -> Tensor:
            return attention(**qkv, first_key=first_key)

        assert_equal_maths(results(seen, inputs), results(attention, inputs))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_rows_that_see_nothing_are_zero_and_give_no_gradient(dropout_p: float) -> None:
    inputs = {"q": draw(2, 7, 3, 8), "k": draw(2, 7, 3, 8), "v": draw(2, 7, 3, 8)}
    blind = torch.zeros(2, 7, dtype=torch.bool)
    blind[0, 2] = blind[1, :3] = True
    first_key = torch.arange(7).expand(2, 7) + blind  # the others see themselves

    def run(**qkv: Tensor) -> Tensor:
        return attention(**qkv, dropout_p=dropout_p, seed=SEED, first_key=first_key)

    incoming = draw(2, 7, 3, 8)
    found = results(run, inputs, [incoming])
    assert found["output 0"][blind].eq(0).all()
    assert found["dq"][blind].eq(0).all()
    assert all(value.isfinite().all() for value in found.values())
    silent = incoming.masked_fill(blind[..., None, None], 0.0)
    assert_equal_maths(found, results(run, inputs, [silent]))


def test_left_padding_changes_nothing_for_what_follows_it() -> None:
    lengths, longest = [9, 4, 1], 9
    prompts = [draw(1, length, 72) for length in lengths]
    padded = torch.full((3, longest, 72), 50.0, dtype=torch.float64)
    for row, prompt in enumerate(prompts):
        padded[row, longest - prompt.shape[1] :] = prompt[0]
    first_key = torch.tensor([[longest - length] * longest for length in lengths], dtype=torch.int32)
    out = causal_attention(padded, 3, first_key=first_key)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        torch.testing.assert_close(out[row, longest - length :], causal_attention(prompt, 3)[0])
        assert out[row, : longest - length].eq(0).all()


def test_documents_side_by_side_do_not_see_each_other() -> None:
    lengths = [3, 5, 1, 2]
    packed = draw(1, sum(lengths), 72)
    starts = torch.tensor([0, 3, 8, 9]).repeat_interleave(torch.tensor(lengths))
    apart = [causal_attention(document, 3) for document in packed.split(lengths, 1)]
    torch.testing.assert_close(causal_attention(packed, 3, first_key=starts[None]), torch.cat(apart, 1))


@pytest.mark.parametrize("keys", [0, 1])
def test_no_key_and_one_key(keys: int) -> None:
    q, k, v = draw(2, 3, 3, 8), draw(2, keys, 3, 8), draw(2, keys, 3, 8)
    torch.testing.assert_close(attention(q, k, v, causal=False), v.sum(1, keepdim=True).expand(q.shape))
    causal = attention(q, k, v)
    assert causal[:, :-1].eq(0).all()
    torch.testing.assert_close(causal[:, -1], v.sum(1))
    assert attention(q[:, :0], k, v).shape == (2, 0, 3, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_written_out_form_is_as_exact_as_a_fused_kernel_at_large_scores(dtype: torch.dtype) -> None:
    """Scores rounded to bfloat16 would have 4 to 7 times the error here, with or without autocast."""
    low = {name: draw(2, 64, 4, 64).mul(factor).to(dtype) for name, factor in (("q", 3), ("k", 3), ("v", 1))}
    incoming = [draw(2, 64, 4, 64).to(dtype)]

    def ours(**qkv: Tensor) -> Tensor:
        return attention(**qkv, first_key=torch.zeros(2, 64, dtype=torch.int32))

    def autocast(**qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return ours(**qkv)

    def torchs(**qkv: Tensor) -> Outputs:
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv.values())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def exact(tensors: Tensors) -> Tensors:
        return {name: tensor.double() for name, tensor in tensors.items()}

    rival, oracle = results(torchs, low, incoming), results(torchs, exact(low), [incoming[0].double()])
    assert_no_less_exact(results(ours, low, incoming), rival, oracle)
    assert_no_less_exact(results(autocast, low, incoming), rival, oracle)


@pytest.mark.parametrize("size", [110.0, 1000.0])
@pytest.mark.parametrize(
    "first_key", [None, torch.zeros(1, 3, dtype=torch.int32)], ids=["plain", "first_key"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scores_beyond_float16_do_not_overflow(
    dtype: torch.dtype, first_key: Tensor | None, size: float
) -> None:
    x = torch.full((1, 3, 1, 64), size, dtype=dtype)
    torch.testing.assert_close(attention(x, x, x, first_key=first_key), x)
