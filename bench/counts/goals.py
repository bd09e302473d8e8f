"""The goals that our kernels are held to by count, on sm_90 at GPT-2's shapes, each with its figure.

Least bytes are those that the operators' docstrings count: every input read once, every output and what the backward needs written once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .. import table
from ..ops.harness import BACKWARD, BOTH, FORWARD
from .known import ARCHITECTURE, GPU
from .report import Row, conflicts, groups, is_ours, useful

BF16 = 2  # bytes
MEMORY = ("dram",)
ARITHMETIC = ("tensor", "special")
COLUMNS: tuple[table.Column, ...] = (
    ("", "<32", "operator", "    {}"),
    ("", "<19", "direction", "{}"),
    ("", "<24", "what", "{}"),
    ("", ">9", "figure", "{}"),
    ("", "<38", "limit", "  {}"),
    ("", "", "verdict", "{}"),
)


class Goal(NamedTuple):
    operator: str
    direction: str
    what: str
    figure: str
    limit: str
    met: bool | None  # None: there was nothing to compare with

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not compared"}[self.met]


def goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """Every goal whose operator was counted."""
    counted = [group for group in groups(_counted(rows)) if is_ours(group[0])]
    found = {(group[0]["name"], group[0]["direction"]): group for group in counted}
    for name in ("layer_norm", "add_layer_norm", "add_layer_norm, dropout 0.1"):
        for direction in (FORWARD, BACKWARD):
            if group := found.get((name, direction)):
                if "dropout" not in name:
                    yield _instructions(group, "liger", 0.8)
                yield _least_bytes(group, 1.03)
                yield _binding(group, MEMORY)
    for direction, factor in ((FORWARD, 1.0), (BACKWARD, 0.8)):
        if group := found.get(("attention", direction)):
            yield _instructions(group, "flex", factor)
            yield _least_bytes(group, 1.10)
            yield _binding(group, ARITHMETIC)
            if dropped := found.get(("attention, dropout 0.1", direction)):
                yield _limited(dropped, "instructions", group[0]["instructions"], 1.35, "its own without")
                yield _least_bytes(dropped, 1.10)
                yield _binding(dropped, ARITHMETIC)
    for direction in (FORWARD, BACKWARD):
        if group := found.get(("gelu_mlp", direction)):
            yield _instructions(group, "inductor", 0.7)
            yield _least_bytes(group, 1.03)
            yield _binding(group, MEMORY)
    if group := found.get(("linear_cross_entropy", BOTH)):
        yield _instructions(group, "liger", 1.0)
        yield _least_bytes(group, 1.03)
    ours = [group[0] for group in found.values()]
    yield from _clean(ours, "bank conflicts", conflicts, 0.05)
    yield from _clean(ours, "bytes moved for nothing", useless, 0.03)


def lines(found: Sequence[Goal]) -> Iterator[str]:
    """The goals as a table."""
    if found:
        met = sum(goal.met is True for goal in found)
        yield f"{met} of {len(found)} goals are met (on {ARCHITECTURE}, bounds on {GPU})"
        yield from (table.line(COLUMNS, goal._asdict() | {"verdict": goal.verdict}) for goal in found)


def _counted(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["architecture"] == ARCHITECTURE and GPU in row.get("bounds", ())]


def _limited(group: Sequence[Row], figure: str, base: float, factor: float, whose: str) -> Goal:
    ours = group[0]
    times = f"{factor:g} x " if factor != 1 else ""
    ratio = ours[figure] / base
    limit = f"≤ {times}{whose}"
    return Goal(ours["name"], ours["direction"], figure, f"{ratio:.2f} x", limit, ratio <= factor)


def _instructions(group: Sequence[Row], word: str, factor: float) -> Goal:
    """Against the peer whose name contains a word."""
    peer = next((row for row in group if not is_ours(row) and word in row["side"].lower()), None)
    if peer:
        return _limited(group, "instructions", peer["instructions"], factor, peer["side"])
    ours = group[0]
    text = f"{ours['instructions'] / 1e6:,.0f} M"
    return Goal(ours["name"], ours["direction"], "instructions", text, f"≤ {factor:g} x {word}", None)


def _binding(group: Sequence[Row], units: Sequence[str]) -> Goal:
    ours = group[0]
    unit, what = ours["bounds"][GPU]["unit"], f"binding unit, {GPU}"
    return Goal(ours["name"], ours["direction"], what, unit, " or ".join(units), unit in units)


def _least_bytes(group: Sequence[Row], factor: float) -> Goal:
    ours = group[0]
    least = least_bytes(ours["name"], ours["direction"], ours["sizes"])
    moved = sum(one["times"] * (one["dram_read"] + one["dram_written"]) for one in ours["launches"])
    ratio, limit = moved / least, f"≤ {factor:g} x the least"
    what = "its kernels' DRAM bytes"
    return Goal(ours["name"], ours["direction"], what, f"{ratio:.3f} x", limit, ratio <= factor)


def useless(row: Row) -> float | None:
    """The share of the bytes in the sectors moved that nobody asked for."""
    share = useful(row)
    return share if share is None else max(1 - share, 0.0)


def least_bytes(name: str, direction: str, sizes: dict[str, float]) -> float:
    """What an operator's kernels must move, as its docstring counts; what it leaves to the library stands apart.

    Args:
        name: of the case.
        direction: forward, backward or both.
        sizes: of the case.
    """
    operator, _, drop = name.partition(", ")
    if operator == "attention":
        elements = math.prod(sizes[n] for n in "BTHD")
        statistics = 4 * math.prod(sizes[n] for n in "BTH")  # log-sum-exp
        # q, k, v in and o out; q, k, v, o, do in and dq, dk, dv out
        return BF16 * elements * {FORWARD: 4, BACKWARD: 8}[direction] + statistics
    if operator == "linear_cross_entropy":
        # the logits of every chunk, and their gradients over them
        return BF16 * 2 * sizes["N"] * sizes["V"]
    if operator == "gelu_mlp":
        # rows of 4 C; the bias gradient of the second matmul reads dy, rows of C
        return BF16 * sizes["M"] * sizes["C"] * {FORWARD: 8, BACKWARD: 17}[direction]
    tensors = {
        "layer_norm": {FORWARD: 2, BACKWARD: 3},
        "add_layer_norm": {FORWARD: 4, BACKWARD: 5 if drop else 4},
    }
    return sizes["M"] * (BF16 * sizes["C"] * tensors[operator][direction] + 8)  # mean and rstd


def _clean(
    rows: Sequence[Row], what: str, figure: Callable[[Row], float | None], limit: float
) -> Iterator[Goal]:
    """What is above a limit; where nothing is, the worst in one line."""
    found = {(row["name"], row["direction"]): value for row in rows if (value := figure(row)) is not None}
    missed = {key: value for key, value in found.items() if value > limit}
    worst = sorted(found.items(), key=lambda item: -item[1])[:1]
    for (name, direction), value in missed.items() or worst:
        yield Goal(name, direction, what, f"{value:.1%}", f"≤ {limit:.0%}", value <= limit)
