"""The picture of counts: for each operator and direction, how much work each unit has, ours beside the peers."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .known import ARCHITECTURE, GPU
from .report import groups, is_ours, own_matmuls

# What a piece of a bar stands for, the units in it, and a colour that colour-blind readers can tell from the others (Okabe and Ito).
# Of the pipes, which share the instructions, the busiest.
PIECES = (
    ("memory", ("dram",), "#0072B2"),
    ("L2", ("l2",), "#56B4E9"),
    ("tensor cores", ("tensor",), "#D55E00"),
    ("special functions", ("special",), "#E69F00"),
    ("shared memory", ("shared",), "#009E73"),
    ("issue of instructions", ("issue",), "#6E6E6E"),
    ("busiest pipe", ("float", "integer", "convert"), "#C4C4C4"),
    ("copies in flight", ("latency",), "#CC79A7"),
)
LONGEST = 8.0  # of a bar, in our bounds; a longer one is cut there


def counts_picture(record: dict[str, Any]) -> Figure | None:
    """A stacked bar for each implementation: for how long each unit is busy at its full rate, over our bound.

    Units work at the same time: a bar's length is work, not time. The black line is the bound.
    """
    rows = [
        row for row in record["rows"] if row["architecture"] == ARCHITECTURE and GPU in row.get("bounds", {})
    ]
    found = [group for group in groups(rows) if is_ours(group[0]) and group[0]["launches"]]
    if not found:
        return None
    lines = sum(len(group) + 1.5 for group in found)
    figure = Figure(figsize=(11, 1.5 + 0.2 * lines), layout="constrained", facecolor="white")
    axes = figure.subplots()
    height = 0.0
    for group in found:
        ours = group[0]["bounds"][GPU]["microseconds"]
        title = f"{group[0]['name']}, {group[0]['direction']}: our bound {ours:,.0f} µs"
        axes.text(0, height, title, weight="bold", fontsize=9, va="center")
        for row in group:
            height += 1
            _bar(
                axes,
                height,
                row["bounds"][GPU],
                ours,
                "with its matmuls" if own_matmuls(row, group[0]) else "",
            )
            axes.annotate(
                row["side"],
                (0, height),
                (-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
            )
        height += 1.5
    axes.set(ylim=(height - 0.6, -0.8), yticks=[], xlim=(0, None))
    axes.axvline(1, color="black", lw=0.7, ls=":", zorder=0)
    axes.set_xlabel(
        f"work of each unit at its full rate on {GPU}, in our bounds (a bound is no time)", fontsize=9
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles: list[Any] = [Patch(color=colour, label=name) for name, _, colour in PIECES]
    handles.append(Line2D([], [], color="black", lw=2.5, label="bound"))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


def _bar(axes: Axes, height: float, bound: dict[str, Any], ours: float, note: str) -> None:
    left = 0.0
    for _, units, colour in PIECES:
        width = max(bound["units"].get(unit, 0.0) for unit in units) / ours
        axes.barh(height, max(min(width, LONGEST - left), 0), 0.8, left=left, color=colour)
        left = min(left + width, LONGEST)
    ratio = bound["microseconds"] / ours
    axes.plot(
        [min(ratio, LONGEST)] * 2,
        [height - 0.45, height + 0.45],
        color="black",
        lw=2.5,
        solid_capstyle="butt",
    )
    text = ", ".join([f"{ratio:.2f}", bound["unit"], *[note] * bool(note)])
    axes.annotate(text, (left, height), (4, 0), textcoords="offset points", va="center", fontsize=8)
