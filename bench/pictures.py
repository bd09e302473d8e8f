"""Pictures of the operators' figures, drawn from a record as `record.py` writes it.

Colours are those of Okabe and Ito, told apart by colour-blind readers too, and no curve is told by colour alone: each has a
marker of its own. The background is white, so a picture reads the same on a dark page as on a light one.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from .ops.harness import BOTH

Rows = list[dict[str, Any]]

ACCENT, GREY, PALE = "#0072B2", "#555555", "#A0A0A0"
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # of a text that lines would cross
STYLES = (
    ("#0072B2", "o"),  # ours
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
    ("#6E6E6E", "*"),
    ("#8C510A", "<"),
)


def operators_picture(record: dict[str, Any], path: Path) -> bool:
    """Bars of every operator at its first size, forward and backward together: share of the limit, and time over ours.

    Args:
        record: of `bench ops`.
        path: the PNG.

    Returns:
        Whether there was anything to draw.
    """
    groups: dict[tuple[str, float], Rows] = {}
    for row in record["rows"]:
        if row["direction"] == BOTH and row["milliseconds"]:
            group = groups.setdefault((row["name"], row["sizes"].get("p", 0)), [])
            if not group or group[0]["case"] == row["case"]:  # its first size
                group.append(row)
    if not groups:
        return False
    lines = sum(len(rows) + 1.4 for rows in groups.values())
    figure = Figure(figsize=(10, 1.4 + 0.21 * lines), layout="constrained", facecolor="white")
    share, ratio = figure.subplots(1, 2, sharey=True)
    height = 0.0
    longest = min(3.0, max(1.2, *(row["ratio"] or 0 for rows in groups.values() for row in rows)))
    for (name, _), rows in groups.items():
        sizes = ", ".join(f"{key} {value:g}" for key, value in rows[0]["sizes"].items())
        share.text(0, height, name, weight="bold", fontsize=9, va="center")
        ratio.text(0, height, sizes, color=GREY, fontsize=8, va="center", bbox=BEHIND)
        for row in rows:
            height += 1
            colour = ACCENT if row["side"].startswith("fusedgpt") else PALE
            _bar(share, height, row["share"], 1.0, "{:.0%}", colour)
            if row["ratio"]:
                _bar(ratio, height, row["ratio"], longest, "{:.2f}", colour)
            share.text(-0.015, height, row["side"], ha="right", va="center", fontsize=8)
        height += 1.4
    share.set(xlim=(0, 1.13), ylim=(height - 0.6, -0.8), yticks=[])
    ratio.set(xlim=(0, 1.13 * longest))
    share.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    share.set_xlabel("share of the limit (copy bandwidth or matmul rate)", fontsize=9)
    ratio.set_xlabel("its time over ours (longer: slower than ours)", fontsize=9)
    ratio.axvline(1, color=ACCENT, lw=1, ls=":")
    for axes in (share, ratio):
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
    figure.suptitle(f"Operators, {BOTH}, {_where(record)}", fontsize=10)
    _save(figure, path)
    return True


def _bar(axes: Axes, height: float, value: float, most: float, text: str, colour: str) -> None:
    """A bar with its value; one too long for the axes ends in an arrow."""
    shown = min(value, most * 1.02)
    axes.barh(height, shown, 0.78, color=colour)
    arrow = " ▸" if value > shown else ""
    axes.text(shown + 0.01 * most, height, arrow + text.format(value), va="center", fontsize=8, bbox=BEHIND)


def attention_picture(record: dict[str, Any], path: Path) -> bool:
    """Causal attention over T at equal tokens, without dropout and with: TFLOP/s and milliseconds of every side.

    Args:
        record: of `bench ops`.
        path: the PNG.

    Returns:
        Whether there was anything to draw: more than one T.
    """
    rows = [
        row
        for row in record["rows"]
        if row["name"] == "attention" and row["direction"] == BOTH and row["milliseconds"]
    ]
    rows = [row for row in rows if row["sizes"]["D"] == rows[0]["sizes"]["D"]]
    rates = sorted({row["sizes"]["p"] for row in rows})
    lengths = sorted({row["sizes"]["T"] for row in rows})
    if len(lengths) < 2:
        return False
    sides = list(dict.fromkeys(row["side"] for row in rows))
    fastest = max(row["gflop"] / row["milliseconds"] for row in rows)
    unit, factor = ("TFLOP/s", 1) if fastest > 1 else ("GFLOP/s", 1000)
    styles = {side: STYLES[i % len(STYLES)] for i, side in enumerate(sides)}
    figure = Figure(figsize=(11.5, 1.2 + 3.1 * len(rates)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(rates), 2, squeeze=False, sharex=True)
    curves: dict[str, Line2D] = {}
    for (speed, duration), p in zip(grid, rates, strict=True):
        for side in reversed(sides):  # ours last, on top
            points = sorted(
                (row["sizes"]["T"], factor * row["gflop"] / row["milliseconds"], row["milliseconds"])
                for row in rows
                if (row["side"], row["sizes"]["p"]) == (side, p)
            )
            if not points:
                continue
            colour, marker = styles[side]
            look = {"color": colour, "marker": marker, "ms": 6, "lw": 2.4 if side == sides[0] else 1.4}
            at, rate, milliseconds = zip(*points, strict=True)
            speed.plot(at, rate, **look)
            (curves[side],) = duration.plot(at, milliseconds, **look, label=side)
        speed.set(ylabel=unit, title=f"dropout {p:g}" if p else "no dropout", ylim=(0, None))
        duration.set(ylabel="ms, forward + backward", yscale="log")
        duration.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        duration.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        duration.yaxis.set_minor_locator(NullLocator())
        for axes in (speed, duration):
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    handles = [curves[side] for side in sides]
    figure.legend(handles=handles, loc="outside right center", fontsize=9, frameon=False)
    sizes = rows[0]["sizes"]
    tokens = sizes["B"] * sizes["T"]
    for axes in grid[-1]:
        axes.set_xlabel(f"T, at {tokens:,.0f} tokens")
    title = f"Causal attention, {BOTH}, {sizes['H']:g} heads of {sizes['D']:g}, {_where(record)}"
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
    return True


def _where(record: dict[str, Any]) -> str:
    kinds = {row["dtype"] for row in record["rows"] if row["dtype"]}
    return ", ".join([*sorted(kinds), record["versions"]["device"], f"torch {record['versions']['torch']}"])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
