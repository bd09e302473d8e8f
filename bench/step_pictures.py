"""Pictures of the training step, drawn from a record: the sides beside each other, and where the time of ours goes."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .pictures import ACCENT, GREY, PALE

FORWARD, BACKWARD, ONCE = "#56B4E9", "#0072B2", "#E69F00"


def step_picture(record: dict[str, Any], path: Path) -> bool:
    """Bars of every side: milliseconds a step, and the peak of its memory.

    Args:
        record: with rows of `bench step`.
        path: the PNG.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in record["rows"] if row["milliseconds"]]
    if not rows:
        return False
    largest = max(row["gigabytes"] for row in rows)
    unit, factor = ("GB", 1) if largest >= 1 else ("MB", 1000)
    figure = Figure(figsize=(10, 1.4 + 0.36 * len(rows)), layout="constrained", facecolor="white")
    time, space = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(rows):
        colour = ACCENT if row["side"] == rows[0]["side"] else PALE
        beside = f"  ({row['ratio']:.2f} × ours)" if row["ratio"] and i else ""
        for axes, value, text in (
            (time, row["milliseconds"], f"{row['milliseconds']:,.1f}{beside}"),
            (space, factor * row["gigabytes"], f"{factor * row['gigabytes']:,.3g}"),
        ):
            axes.barh(i, value, 0.72, color=colour)
            axes.annotate(text, (value, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    time.set_yticks(range(len(rows)), [row["side"] for row in rows])
    time.invert_yaxis()
    time.set(xlim=(0, 1.35 * max(row["milliseconds"] for row in rows)))
    space.set(xlim=(0, 1.15 * factor * largest))
    time.set_xlabel("milliseconds a step (shorter is faster)", fontsize=9)
    space.set_xlabel(f"{unit} that its tensors take at the peak", fontsize=9)
    for axes in (time, space):
        _plain(axes)
    _titled(figure, f"A training step, {rows[0]['case']}", record, path)
    return True


def breakdown_picture(record: dict[str, Any], path: Path) -> bool:
    """A bar for every part of our step, forward and backward stacked, with its share of the whole.

    Args:
        record: with rows of `bench breakdown`.
        path: the PNG.

    Returns:
        Whether there was anything to draw.
    """
    rows = record["rows"]
    parts: dict[str, dict[str, float]] = {}
    for row in rows:
        parts.setdefault(row["name"], {})[row["direction"]] = row["milliseconds"]
    if not parts:
        return False
    whole = sum(row["milliseconds"] for row in rows)
    longest = max(sum(found.values()) for found in parts.values())
    figure = Figure(figsize=(10, 1.5 + 0.34 * len(parts)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    colours = {"forward": FORWARD, "backward": BACKWARD, "": ONCE}
    for i, found in enumerate(parts.values()):
        left = 0.0
        for direction in ("forward", "backward", ""):
            if direction in found:
                axes.barh(i, found[direction], 0.72, left=left, color=colours[direction])
                left += found[direction]
        text = f"{left / whole:.1%}   {left:,.2f} ms"
        axes.annotate(text, (left, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    for direction, colour in colours.items():
        if any(direction in found for found in parts.values()):
            axes.barh(0, 0, color=colour, label=direction or "neither")
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.22 * longest))
    axes.set_xlabel("milliseconds", fontsize=9)
    _plain(axes)
    case = rows[0]["case"].removesuffix(f", {rows[0]['direction']}")
    _titled(figure, f"Our training step by part, {whole:,.1f} ms, {case}", record, path)
    return True


def _plain(axes: Any) -> None:
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9)


def _titled(figure: Figure, title: str, record: dict[str, Any], path: Path) -> None:
    versions = record["versions"]
    figure.suptitle(title, fontsize=11, weight="bold", x=0.01, ha="left")
    about = f"{versions['device']}, torch {versions['torch']}, {record['date']}"
    figure.text(0.99, 0.005, about, fontsize=8, color=GREY, ha="right", va="bottom")
    figure.get_layout_engine().set(
        rect=(0, 0.3 / figure.get_figheight(), 1, 1 - 0.3 / figure.get_figheight())
    )  # type: ignore[union-attr]
    figure.savefig(path, dpi=120)
