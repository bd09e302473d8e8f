"""The dropout mask: its definition, its statistics, and what the operators make of it.

Seeds are fixed, so nothing here is left to chance: with an ideal generator one of the statistical tests in a million
would fail, and a mask that repeats, drifts or correlates fails by a wide margin.
"""

import math
from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import add_layer_norm, attention, causal_attention, dropout, embed
from fusedgpt.kernels.dropout_mask import attention_keep_mask, keep_mask

LIMIT = 5.0  # standard deviations
LEVELS = 8
PINNED = "e4e90013c1c09e8fea5799b5bc8db5e4"
PINNED_ATTENTION = "fde3d37ff73b715fbe7b37175bffddb4"
EXTREME_SEEDS = [0, 1, -1, 2**31, 2**32, -(2**32), 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def seed(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def assert_ordinary(deviations: float, what: str = "") -> None:
    assert abs(deviations) < LIMIT, f"{what} {deviations:.1f} standard deviations off"


def chi_square(observed: Tensor, expected: Tensor, degrees: int) -> float:
    """Pearson's statistic in standard deviations (Wilson and Hilferty's transformation, 1931)."""
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def flat(p: float, value: int = 11, stream: int = 0, size: int = 256) -> Tensor:
    return keep_mask(seed(value), stream, size, size, p)


def stacked(p: float, value: int = 11, stream: int = 0, size: int = 128, heads: int = 4) -> Tensor:
    return attention_keep_mask(seed(value), stream, heads, size, size, p)


def levels(keep: Callable[..., Tensor], *where: int, **size: int) -> Tensor:
    """Which eighth of its range every element's random number lies in: 0 to 7, all equally likely.

    What a probability drops every higher one drops too, so the masks of seven probabilities tell.
    """
    return sum(keep(eighth / LEVELS, *where, **size).long() for eighth in range(1, LEVELS))


def dependence(a: Tensor, b: Tensor, count: int = LEVELS) -> float:
    """How far the joint distribution of two arrays of levels is from independence, in standard deviations."""
    joint = torch.bincount((a * count + b).flatten(), minlength=count**2).view(count, count).double()
    expected = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True) / joint.sum()
    return chi_square(joint, expected, (count - 1) ** 2)


both = pytest.mark.parametrize("keep", [flat, stacked])

# The definition


def written_out(value: int, stream: int, head: int, row: int, column: int) -> int:
    """The word of one position in Python's integers, after the docstring of kernels/dropout.py."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0xD35A2D97 & 0xFFFFFFFF
        return x ^ x >> 15

    golden = 0x9E3779B9
    key = mix(mix(mix((stream + golden) & 0xFFFFFFFF) ^ (value >> 32 & 0xFFFFFFFF)) ^ (value & 0xFFFFFFFF))
    r = mix(mix(head ^ key) ^ row) | 1
    c = mix(column ^ mix((key + golden) & 0xFFFFFFFF))
    product = r * (c ^ r)
    return (product >> 32) ^ (product & 0xFFFFFFFF)


@pytest.mark.parametrize("stream", [0, 1, 37, 2**31, 2**32 - 1, -1])
@pytest.mark.parametrize("value", EXTREME_SEEDS)
def test_the_definition_in_exact_integers(value: int, stream: int) -> None:
    threshold = round(0.3 * 2**32)
    expected = [[written_out(value, stream, 0, r, c) >= threshold for c in range(19)] for r in range(11)]
    assert keep_mask(seed(value), stream, 11, 19, 0.3).tolist() == expected


@pytest.mark.parametrize("value", EXTREME_SEEDS)
def test_the_definition_of_attentions_shared_words(value: int) -> None:
    """0.1 is 13 / 128; four elements share a word, a byte each, of which the low seven bits count."""

    def kept(head: int, q: int, k: int) -> bool:
        byte = 2 * (q >> 3 & 1) + (k >> 3 & 1)
        return (written_out(value, 4, head, q & ~8, k & ~8) >> 8 * byte & 127) >= 13

    expected = [[[kept(h, q, k) for k in range(35)] for q in range(18)] for h in range(3)]
    assert attention_keep_mask(seed(value), 4, 3, 18, 35, 0.1).tolist() == expected


def packed(mask: Tensor) -> str:
    bits = "".join("01"[bit] for bit in mask.flatten().tolist())
    return f"{int(bits, 2):0{len(bits) // 4}x}"


def test_masks_never_change() -> None:
    """Pinned, so that a run resumed by a later version continues with the masks it was begun with."""
    assert packed(keep_mask(seed(42), 7, 4, 32, 0.5)) == PINNED
    assert packed(attention_keep_mask(seed(42), 7, 2, 4, 16, 0.25)) == PINNED_ATTENTION


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_seed_of_any_shape_with_one_element(shape: tuple[int, ...]) -> None:
    shaped = seed(-5).view(shape)
    assert torch.equal(keep_mask(shaped, 2, 7, 9, 0.5), keep_mask(seed(-5), 2, 7, 9, 0.5))
    assert torch.equal(
        attention_keep_mask(shaped, 2, 3, 7, 9, 0.5), attention_keep_mask(seed(-5), 2, 3, 7, 9, 0.5)
    )


def test_the_mask_is_a_function_of_position_alone() -> None:
    """Never of the shape, so neither of tile sizes nor of how long the sequence is."""
    whole = keep_mask(seed(9), 1, 70, 90, 0.4)
    assert all(
        torch.equal(keep_mask(seed(9), 1, r, c, 0.4), whole[:r, :c]) for r, c in [(1, 1), (7, 90), (70, 13)]
    )
    whole = attention_keep_mask(seed(9), 1, 5, 40, 50, 0.4)
    for h, q, k in [(1, 1, 1), (5, 9, 50), (2, 40, 17)]:
        assert torch.equal(attention_keep_mask(seed(9), 1, h, q, k, 0.4), whole[:h, :q, :k])


@both
def test_a_higher_probability_drops_more_of_the_same_elements(keep: Callable[..., Tensor]) -> None:
    probabilities = [0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0]
    for lower, higher in pairwise(probabilities):
        assert (keep(higher) <= keep(lower)).all()
        assert keep(higher).sum() < keep(lower).sum()
    assert keep(0.0).all()
    assert not keep(1.0).any()


# Statistics


@pytest.mark.parametrize("p", [1e-4, 0.01, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_keep_rate_over_the_whole_along_rows_and_along_columns(p: float) -> None:
    size = 1024
    dropped = (~keep_mask(seed(2), 3, size, size, p)).double()
    variance = p * (1 - p)
    assert_ordinary((dropped.sum().item() - p * size**2) / math.sqrt(variance * size**2), "the whole is")
    if p < 0.01:
        return  # too few of them in a row
    for dim, name in ((1, "rows"), (0, "columns")):
        totals = dropped.sum(dim)
        statistic = ((totals - totals.mean()) ** 2).sum().item() / (variance * size)
        assert_ordinary((statistic - (size - 1)) / math.sqrt(2 * (size - 1)), f"the spread over {name} is")


def test_every_threshold_of_the_elements_that_share_a_word() -> None:
    """All 127 probabilities that attention can have: fair for each of the four elements, independent between them."""
    numbers = sum(stacked(level / 128, heads=16).long() for level in range(1, 128))
    fields = numbers.view(16, 8, 2, 8, 8, 2, 8)  # bit 3 of q and bit 3 of k are the dimensions of 2
    four = [fields[:, :, q, :, :, k] for q in range(2) for k in range(2)]
    for field in four:
        counts = torch.bincount(field.flatten(), minlength=128).double()
        assert_ordinary(chi_square(counts, torch.full_like(counts, field.numel() / 128), 127))
    for a, b in combinations(range(4), 2):
        assert_ordinary(dependence(four[a], four[b], 128), f"fields {a} and {b} are")
    parity = sum(field // 64 for field in four) % 2  # all four together, in their most significant bits
    assert_ordinary((parity.sum().item() - parity.numel() / 2) / math.sqrt(parity.numel() / 4))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.5, 0.999])
def test_attentions_keep_rate(p: float) -> None:
    """0.1 is 13 / 128; what is neither 0 nor 1 stays so."""
    drop = min(max(round(128 * p), 1), 127) / 128
    dropped = ~attention_keep_mask(seed(2), 3, 8, 256, 256, p)
    count = dropped.numel()
    assert_ordinary((dropped.sum().item() - drop * count) / math.sqrt(drop * (1 - drop) * count))
    for dims in ((1, 2), (0, 2), (0, 1)):
        totals = dropped.double().sum(dims)
        statistic = ((totals - totals.mean()) ** 2).sum().item() / (
            drop * (1 - drop) * count / totals.numel()
        )
        degrees = totals.numel() - 1
        if degrees > 50:
            assert_ordinary((statistic - degrees) / math.sqrt(2 * degrees), f"the spread outside {dims} is")


OFFSETS = [
    (0, 1),
    (1, 0),
    (1, 1),
    (1, -1),
    (0, 2),
    (2, 0),
    (0, 8),
    (8, 0),
    (8, 8),
    (16, 0),
    (0, 16),
    (64, 0),
    (0, 64),
]


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@both
def test_elements_near_each_other_are_independent(
    keep: Callable[..., Tensor], offset: tuple[int, int]
) -> None:
    drawn = levels(keep)
    down, right = offset
    size = drawn.shape[-1]
    here = drawn[..., : size - down, max(-right, 0) : size - max(right, 0)]
    there = drawn[..., down:, max(right, 0) : size + min(right, 0)]
    assert_ordinary(dependence(here, there))


@both
def test_a_mask_and_its_transpose_are_independent(keep: Callable[..., Tensor]) -> None:
    drawn = levels(keep)
    row, column = torch.triu_indices(drawn.shape[-1], drawn.shape[-1], 1)
    assert_ordinary(dependence(drawn[..., row, column], drawn[..., column, row]))


@both
def test_seeds_and_streams_are_independent(keep: Callable[..., Tensor]) -> None:
    """Neighbours of every kind: consecutive ones, ones that differ in their high half alone, and exchanged ones."""
    keys = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2)]
    keys += [(2**32, 0), (2**32 + 1, 0), (2 * 2**32, 0), (-1, 0), (0, -1), (2**63 - 1, 0)]
    drawn = {key: levels(keep, *key) for key in keys}
    for a, b in combinations(keys, 2):
        assert_ordinary(dependence(drawn[a], drawn[b]), f"(seed, stream) {a} and {b} are")
        for dim in (-1, -2):
            assert_ordinary(dependence(drawn[a], drawn[b].roll(1, dim)), f"{a} and {b}, shifted, are")


def test_heads_are_independent() -> None:
    """Also of the neighbouring rows of each other: head h, row q is not head h + 1, row q - 1."""
    drawn = levels(stacked, heads=8)
    for a, b in combinations(range(8), 2):
        assert_ordinary(dependence(drawn[a], drawn[b]), f"heads {a} and {b} are")
        assert_ordinary(dependence(drawn[a, 1:], drawn[b, :-1]), f"heads {a} and {b}, a row apart, are")
        assert_ordinary(
            dependence(drawn[a, :, 1:], drawn[b, :, :-1]), f"heads {a} and {b}, a column apart, are"
        )


@both
def test_the_corners_of_a_rectangle_are_independent(keep: Callable[..., Tensor]) -> None:
    """A word is made of one number a row and one a column: the product over four corners would show it."""
    sign = levels(keep) // (LEVELS // 2) * 2.0 - 1
    for down in (1, 2, 8, 32):
        for right in (1, 2, 8, 32):
            top, bottom = sign[..., :-down, :], sign[..., down:, :]
            corners = top[..., :-right] * top[..., right:] * bottom[..., :-right] * bottom[..., right:]
            assert_ordinary(corners.sum().item() / math.sqrt(corners.numel()), f"{down} x {right} is")


@pytest.mark.parametrize("value", [11, 12])
@pytest.mark.parametrize("stream", [0, 1])
def test_no_direction_stands_out(value: int, stream: int) -> None:
    """Rows and columns span as much as random ones do: the largest singular value of a random n x n matrix of unit
    variance is 2 √n within a few times n^(-1/6) (Tracy and Widom; Johnstone, 2001)."""
    for drawn in (levels(flat, value, stream, size=512), *levels(stacked, value, stream, size=512, heads=2)):
        centred = (drawn - (LEVELS - 1) / 2) / math.sqrt((LEVELS**2 - 1) / 12)
        largest = torch.linalg.matrix_norm(centred.float(), 2).item()
        assert 0.97 < largest / (2 * math.sqrt(512)) < 1.02


@both
def test_every_two_rows_and_every_two_columns_are_independent(keep: Callable[..., Tensor]) -> None:
    """However far apart, and in attention whatever their heads: half a million pairs each, no two of them alike."""
    sign = keep(0.5, size=1024).view(-1, 1024, 1024)[0].float() * 2 - 1
    rows_of_heads = stacked(0.5, size=128, heads=8).flatten(0, 1).float() * 2 - 1
    for matrix in (sign, sign.T, rows_of_heads):
        count, length = matrix.shape
        pairs = (matrix @ matrix.T / math.sqrt(length))[tuple(torch.triu_indices(count, count, 1))]
        statistic = pairs.square().sum().item()
        assert_ordinary(
            (statistic - pairs.numel()) / math.sqrt(2 * pairs.numel()), "the spread of the pairs is"
        )
        assert pairs.abs().max() < 6.5


def test_no_row_column_or_head_repeats() -> None:
    drawn = keep_mask(seed(5), 0, 16384, 128, 0.5)
    assert len(drawn.unique(dim=0)) == 16384
    assert len(drawn.T[:, :1024].contiguous().unique(dim=0)) == 128
    wide = attention_keep_mask(seed(5), 0, 64, 64, 64, 0.5)
    assert len(wide.flatten(0, 1).unique(dim=0)) == 64 * 64
    assert len(wide.flatten(1).unique(dim=0)) == 64


@pytest.mark.parametrize("step", ["seed", "stream"])
def test_consecutive_steps_draw_afresh_at_every_position(step: str) -> None:
    """A position is fair and independent of the others over 2,000 steps in turn, not only within one mask."""
    steps = range(2000)
    masks = [
        keep_mask(seed(s), 0, 6, 6, 0.5) if step == "seed" else keep_mask(seed(0), s, 6, 6, 0.5)
        for s in steps
    ]
    sign = torch.stack(masks).flatten(1).double() * 2 - 1  # (steps, positions)
    count, positions = sign.shape
    pairs = (sign.T @ sign / math.sqrt(count))[tuple(torch.triu_indices(positions, positions, 1))]
    following = (
        sign[1:].T @ sign[:-1] / math.sqrt(count - 1)
    )  # every position with every position a step later
    means = sign.sum(0) / math.sqrt(count)
    for name, normal in (("means", means), ("pairs", pairs), ("steps", following)):
        statistic = normal.square().sum().item()
        assert_ordinary(
            (statistic - normal.numel()) / math.sqrt(2 * normal.numel()), f"the spread of {name} is"
        )
        assert normal.abs().max() < LIMIT


# What the operators make of it


@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.9])
def test_kept_elements_are_scaled_by_the_exact_probability(p: float) -> None:
    ones = torch.ones(40, 50, dtype=torch.float64)
    out = dropout(ones, p, seed(8), 6)
    keep = keep_mask(seed(8), 6, 40, 50, p)
    assert torch.equal(out.ne(0), keep)
    torch.testing.assert_close(out[keep], torch.full_like(out[keep], 1 / (1 - p)), rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.995, 0.999])
def test_attention_scales_by_the_probability_it_really_has(p: float) -> None:
    """Equal scores and the identity for values, so the output is the dropped weights themselves."""
    drop = min(max(round(128 * p), 1), 127) / 128
    q = k = torch.zeros(2, 40, 3, 40, dtype=torch.float64)
    v = torch.eye(40, dtype=torch.float64)[None, :, None].expand(2, 40, 3, 40)
    out = attention(q, k, v, p, seed(8), 6, causal=False).transpose(1, 2)  # (B, H, Tq, Tk)
    keep = attention_keep_mask(seed(8), 6, 6, 40, 40, p).view(2, 3, 40, 40)
    torch.testing.assert_close(out, keep.double() / 40 / (1 - drop), rtol=1e-13, atol=0)


def test_the_mean_over_many_seeds_is_no_dropout() -> None:
    """The expectation that the quantised probability must keep, over 400 seeds."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 12, 48, generator=generator, dtype=torch.float64)
    drawn = torch.stack([causal_attention(qkv, 2, 0.1, seed(s)) for s in range(400)])
    standard_error = drawn.std(0) / math.sqrt(400)
    deviations = (drawn.mean(0) - causal_attention(qkv, 2)) / standard_error
    assert deviations.abs().max() < LIMIT
    assert_ordinary((deviations**2).mean().item() - 1, "the spread is")


def test_dropping_everything_and_nothing() -> None:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(12)
    ids, tables = torch.zeros(2, 5, dtype=torch.long), torch.ones(7, 12)
    assert dropout(x, 1.0, seed(0)).eq(0).all()
    assert causal_attention(x, 2, 1.0, seed(0)).eq(0).all()
    assert embed(ids, tables, tables, 1.0, seed(0)).eq(0).all()
    assert torch.equal(add_layer_norm(x, x, weight, dropout_p=1.0, seed=seed(0))[1], x)
    assert torch.equal(dropout(x, 0.0, seed(0)), x)
    assert torch.equal(causal_attention(x, 2, 0.0, seed(0)), causal_attention(x, 2))


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (3, 0), (2, 3, 4, 5)], ids=str)
def test_the_last_dimension_gives_the_columns(shape: tuple[int, ...]) -> None:
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1]) if columns else 0
    x = torch.ones(shape)
    assert torch.equal(
        dropout(x, 0.5, seed(1), 2).view(rows, columns), 2.0 * keep_mask(seed(1), 2, rows, columns, 0.5)
    )
