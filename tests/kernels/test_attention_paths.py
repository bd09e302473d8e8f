"""Every way through attention gives the same: tiles by pointer or by descriptor, a backward in one pass or in two."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import attention, causal_attention, use_backend
from fusedgpt.kernels._triton import INTERPRETED, TensorDescriptor
from fusedgpt.kernels.tiles import (
    ATTENTION_KEY,
    ATTENTION_ONE_PASS,
    ATTENTION_QUERY,
    Hardware,
    Tile,
    attention_tile,
)

from .attention_oracle import F16, F32, SEED, check, draw, outputs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the paths and tiles are the interpreter's")

module: Any = import_module("fusedgpt.kernels.ops.attention.operator")
PATHS = [(True, False), (False, True), (True, True)]
NAMES = ["descriptors", "one pass", "one pass, descriptors"]


@contextmanager
def way(descriptors: bool, one_pass: bool) -> Iterator[list[Tensor]]:
    """Attention by this path; yields what it made descriptors of."""
    described: list[Tensor] = []

    def make(x: Tensor, rows: int) -> Any:
        described.append(x)
        return original(x, rows)

    original = module._descriptor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_descriptor", make)
        patch.setattr(module, "DESCRIPTORS", {"interpreter"} if descriptors else set())
        tile = Tile(128, 32, 16, 1, 1, 1, "")
        patch.setattr(module, "_one_pass_tile", lambda *_: tile if one_pass else None)
        yield described


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
@pytest.mark.parametrize(
    ("lengths", "dtype", "head_dim", "options"),
    [
        ((37, 37), F16, 64, {"dropout_p": 0.3}),
        ((37, 37), F32, 16, {"first_key": True}),
        ((5, 40), F16, 80, {"dropout_p": 0.1, "first_key": True}),
        ((40, 5), F32, 24, {}),
        ((33, 48), F16, 128, {"causal": False}),
        ((1, 40), F32, 16, {}),
        ((1, 1), F16, 16, {}),
    ],
    ids=str,
)
def test_parity(
    path: tuple[bool, bool],
    lengths: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    options: dict[str, Any],
) -> None:
    q_len, k_len = lengths
    query, key = (2, q_len, 1, head_dim), (2, k_len, 1, head_dim)
    *tensors, dout = draw(query, key, key, query)
    if "first_key" in options:
        generator = torch.Generator().manual_seed(q_len)
        options = options | {"first_key": torch.randint(-3, k_len + 3, (2, q_len), generator=generator)}
    with way(*path) as described:
        check(tensors, dout, dtype, seed=SEED, stream=4, **options)
    assert bool(described) == path[0]


@pytest.mark.parametrize("one_pass", [False, True])
def test_descriptors_change_no_bit_of_packed_attention(one_pass: bool) -> None:
    qkv, dout = draw((2, 19, 3 * 32), (2, 19, 32))
    results = []
    for descriptors in (False, True):
        with way(descriptors, one_pass) as described, use_backend("triton"):
            results.append(outputs(lambda t: causal_attention(t, 2, 0.2, SEED, 1), [qkv], dout, F16))
        assert any(x.shape == (2, 19, 2, 16) for x in described) == descriptors
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_pass_is_the_same_within_rounding_and_the_same_bits_twice() -> None:
    *tensors, dout = draw(*[(1, 71, 1, 16)] * 4)

    def run(one_pass: bool) -> list[Tensor]:
        with way(False, one_pass), use_backend("triton"):
            return outputs(lambda *t: attention(*t, dropout_p=0.2, seed=SEED), tensors, dout, F32)

    once, again, apart = run(True), run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for a, b in zip(once, apart, strict=True):
        torch.testing.assert_close(a, b)


def test_what_descriptors_cannot_hold_is_read_by_pointer() -> None:
    x = torch.zeros(2, 40, 3, 20, dtype=F16)
    even = x[..., :16]
    assert not module._describable(x), "heads are 40 bytes apart"
    assert not module._describable(x[..., 1:17]), "and begin anywhere"
    assert not module._describable(x[:, :0])
    assert not module._describable(even.contiguous()[:, :1].expand(2, 40, 3, 16)), "a step of nothing"
    assert not module._describable(even), "of a wider tensor"
    assert module._describable(even.contiguous())
    assert module._describable(torch.zeros(2, 40, 3, 32, dtype=F16)[..., 8:24])
    with way(True, False) as described, use_backend("triton"):
        attention(even, even.contiguous(), even.contiguous())
    assert not described, "all or none"


def test_a_descriptor_ends_with_its_sequence_and_its_head() -> None:
    x = torch.zeros(2, 40, 3, 24, dtype=F16)
    made = module._descriptor(x, 64)
    assert isinstance(made, TensorDescriptor)
    assert tuple(made.shape) == (2, 3, 40, 24)
    assert tuple(made.strides) == (40 * 72, 24, 72, 1)
    assert made.block_shape == [1, 1, 64, 32]


@pytest.mark.parametrize("one_pass", [False, True])
def test_documents_do_not_touch_each_others_tiles(one_pass: bool) -> None:
    """Tiles that no row sees are not multiplied: not even NaN comes out of them."""
    first_key = torch.tensor([[0] * 64 + [64] * 64])
    for sick in (slice(0, 64), slice(64, 128)):
        q, k, v, dout = (t.float() for t in draw(*[(1, 128, 1, 16)] * 4))
        for t in (q, k, v, dout):
            t[:, sick] = torch.nan
        with way(False, one_pass), use_backend("triton"):
            found = outputs(lambda *t: attention(*t, first_key=first_key), [q, k, v], dout, F32)
        healthy = torch.ones(128, dtype=torch.bool)
        healthy[sick] = False
        assert all(t[:, healthy].isfinite().all() for t in found)


@pytest.mark.parametrize(
    ("heads", "length", "wins"),
    [(768, 1024, True), (132, 1024, True), (140, 1024, False), (40, 1024, False), (768, 4096, False)],
)
def test_one_pass_where_heads_fill_the_gpu_and_sums_fit_in_its_cache(
    heads: int, length: int, wins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hardware", lambda _: Hardware("sm_90", 132))
    q = torch.empty(1, length, heads, 64, dtype=torch.bfloat16, device="meta")
    assert (module._one_pass_tile(q) is not None) == wins
    assert module._one_pass_tile(q.float()) is None
    assert module._one_pass_tile(q.new_empty(1, length, heads, 128)) is None
    monkeypatch.setattr(module, "hardware", lambda _: Hardware("sm_80", 108))
    assert module._one_pass_tile(q) is None


def test_tiles_of_queries_fill_those_that_keys_read_by() -> None:
    """query_kernel writes the numbers of every row that key_kernel reads, those beyond the last query included."""
    for name in {*ATTENTION_QUERY, *ATTENTION_KEY}:
        for head_dim in (64, 64 if name == "float32" else 128):
            query = attention_tile(ATTENTION_QUERY, name, head_dim)
            assert query.rows % attention_tile(ATTENTION_KEY, name, head_dim).rows == 0, name
    assert all(row.rows % 4 == 0 for rows in ATTENTION_ONE_PASS.values() for row in rows)
