"""Pictures of a record (`record.py`): operators, attention by length, the training step, the parts of ours.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and every curve has a marker of its own as
well. The background is white, so a picture reads the same on a dark page as on a light one.
"""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from .counts.pictures import counts_picture
from .ops.run import BOTH, OURS, first_sizes

ACCENT, GREY, PALE = "#0072B2", "#555555", "#A0A0A0"
DIRECTIONS = {"forward": "#56B4E9", "backward": "#0072B2", "": "#E69F00"}
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # keeps a text readable over grid lines
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


def operators_picture(record: dict[str, Any]) -> Figure | None:
    """Every operator at its first size, forward + backward: share of the limit, and time over ours."""
    groups = first_sizes(record["rows"])
    if not groups:
        return None
    lines = sum(len(rows) + 1.4 for rows in groups)
    figure = Figure(figsize=(10, 1.4 + 0.21 * lines), layout="constrained", facecolor="white")
    share, ratio = figure.subplots(1, 2, sharey=True)
    height = 0.0
    longest = min(3.0, max(1.2, *(row["ratio"] or 0 for rows in groups for row in rows)))
    for rows in groups:
        sizes = ", ".join(f"{key} {value:g}" for key, value in rows[0]["sizes"].items())
        share.text(0, height, rows[0]["name"], weight="bold", fontsize=9, va="center")
        ratio.text(0, height, sizes, color=GREY, fontsize=8, va="center", bbox=BEHIND)
        for row in rows:
            height += 1
            colour = ACCENT if row["side"].startswith(OURS) else PALE
            _clipped_bar(share, height, row["share"], 1.0, "{:.0%}", colour)
            if row["ratio"]:
                _clipped_bar(ratio, height, row["ratio"], longest, "{:.2f}", colour)
            share.text(-0.015, height, row["side"], ha="right", va="center", fontsize=8)
        height += 1.4
    share.set(xlim=(0, 1.13), ylim=(height - 0.6, -0.8), yticks=[])
    share.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ratio.set(xlim=(0, 1.13 * longest))
    ratio.axvline(1, color=ACCENT, lw=1, ls=":")
    _plain(share, "share of the limit (copy bandwidth or matmul rate)")
    _plain(ratio, "time over ours (longer: slower than ours)")
    figure.suptitle(f"Operators, {BOTH}, {_where(record)}", fontsize=10)
    return figure


def _clipped_bar(axes: Axes, height: float, value: float, most: float, text: str, colour: str) -> None:
    """A bar with its value; one too long for the axes ends in an arrow."""
    shown = min(value, most * 1.02)
    arrow = " ▸" if value > shown else ""
    axes.barh(height, shown, 0.78, color=colour)
    axes.text(shown + 0.01 * most, height, arrow + text.format(value), va="center", fontsize=8, bbox=BEHIND)


def attention_picture(record: dict[str, Any]) -> Figure | None:
    """Causal attention over T at equal tokens, without dropout and with: rate and milliseconds. None for a single T."""
    rows = [
        row
        for row in record["rows"]
        if row["name"] == "attention" and row["direction"] == BOTH and row["milliseconds"]
    ]
    rows = [row for row in rows if row["sizes"]["D"] == rows[0]["sizes"]["D"]]
    rates = sorted({row["sizes"]["p"] for row in rows})
    lengths = sorted({row["sizes"]["T"] for row in rows})
    if len(lengths) < 2:
        return None
    names = list(dict.fromkeys(row["side"] for row in rows))
    fastest = max(row["gflop"] / row["milliseconds"] for row in rows)
    unit, factor = ("TFLOP/s", 1) if fastest > 1 else ("GFLOP/s", 1000)
    figure = Figure(figsize=(11.5, 1.2 + 3.1 * len(rates)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(rates), 2, squeeze=False, sharex=True)
    curves: dict[str, Line2D] = {}
    for (speed, duration), p in zip(grid, rates, strict=True):
        for i, name in reversed(list(enumerate(names))):  # ours last, on top
            points = sorted(
                (row["sizes"]["T"], factor * row["gflop"] / row["milliseconds"], row["milliseconds"])
                for row in rows
                if (row["side"], row["sizes"]["p"]) == (name, p)
            )
            if not points:
                continue
            colour, marker = STYLES[i % len(STYLES)]
            look = {"color": colour, "marker": marker, "ms": 6, "lw": 1.4 if i else 2.4}
            at, rate, milliseconds = zip(*points, strict=True)
            speed.plot(at, rate, **look)
            (curves[name],) = duration.plot(at, milliseconds, **look, label=name)
        speed.set(ylabel=unit, title=f"dropout {p:g}" if p else "no dropout", ylim=(0, None))
        duration.set(ylabel=f"ms, {BOTH}", yscale="log")
        duration.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        duration.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        duration.yaxis.set_minor_locator(NullLocator())
        for axes in (speed, duration):
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    handles = [curves[name] for name in names]
    figure.legend(handles=handles, loc="outside right center", fontsize=9, frameon=False)
    sizes = rows[0]["sizes"]
    for axes in grid[-1]:
        axes.set_xlabel(f"T, at {sizes['B'] * sizes['T']:,.0f} tokens")
    title = f"Causal attention, {BOTH}, {sizes['H']:g} heads of {sizes['D']:g}, {_where(record)}"
    figure.suptitle(title, fontsize=10)
    return figure


def step_picture(record: dict[str, Any]) -> Figure | None:
    """The training step of every implementation: milliseconds and peak memory."""
    rows = [row for row in record["rows"] if row["milliseconds"]]
    if not rows:
        return None
    largest = max(row["gigabytes"] for row in rows)
    unit, factor = ("GB", 1) if largest >= 1 else ("MB", 1000)
    figure = Figure(figsize=(10, 1.4 + 0.36 * len(rows)), layout="constrained", facecolor="white")
    time, space = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(rows):
        colour = PALE if i else ACCENT
        beside = f"  ({row['ratio']:.2f} × ours)" if row["ratio"] and i else ""
        milliseconds, size = row["milliseconds"], factor * row["gigabytes"]
        for axes, value, text in (
            (time, milliseconds, f"{milliseconds:,.1f}{beside}"),
            (space, size, f"{size:,.3g}"),
        ):
            axes.barh(i, value, 0.72, color=colour)
            axes.annotate(text, (value, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    time.set_yticks(range(len(rows)), [row["side"] for row in rows])
    time.invert_yaxis()
    time.set(xlim=(0, 1.35 * max(row["milliseconds"] for row in rows)))
    space.set(xlim=(0, 1.15 * factor * largest))
    _plain(time, "milliseconds a step (shorter is faster)")
    _plain(space, f"peak memory of its tensors, {unit}")
    _titled(figure, f"A training step, {rows[0]['case']}", record)
    return figure


def breakdown_picture(record: dict[str, Any]) -> Figure:
    """A bar for every part of our step, forward and backward stacked, with its share of the whole."""
    rows = record["rows"]
    parts: dict[str, dict[str, float]] = {}
    for row in rows:
        parts.setdefault(row["name"], {})[row["direction"]] = row["milliseconds"]
    whole = sum(row["milliseconds"] for row in rows)
    figure = Figure(figsize=(10, 1.5 + 0.34 * len(parts)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for i, found in enumerate(parts.values()):
        left = 0.0
        for direction, colour in DIRECTIONS.items():
            if direction in found:
                axes.barh(i, found[direction], 0.72, left=left, color=colour)
                left += found[direction]
        text = f"{left / whole:.1%}   {left:,.2f} ms"
        axes.annotate(text, (left, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    for direction, colour in DIRECTIONS.items():
        if any(direction in found for found in parts.values()):
            axes.barh(0, 0, color=colour, label=direction or "neither")
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.22 * max(sum(found.values()) for found in parts.values())))
    _plain(axes, "milliseconds")
    case = rows[0]["case"].removesuffix(f", {rows[0]['direction']}")
    _titled(figure, f"Our training step by part, {whole:,.1f} ms, {case}", record)
    return figure


# file name -> benchmark whose rows it shows, function
PICTURES = {
    "operators": ("ops", operators_picture),
    "attention": ("ops", attention_picture),
    "step": ("step", step_picture),
    "breakdown": ("breakdown", breakdown_picture),
    "counts": ("counts", counts_picture),
}


def _plain(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9)


def _where(record: dict[str, Any]) -> str:
    dtypes = {row["dtype"] for row in record["rows"] if row["dtype"]}
    return ", ".join([*sorted(dtypes), record["versions"]["device"], f"torch {record['versions']['torch']}"])


def _titled(figure: Figure, title: str, record: dict[str, Any]) -> None:
    versions = record["versions"]
    figure.suptitle(title, fontsize=11, weight="bold", x=0.01, ha="left")
    about = f"{versions['device']}, torch {versions['torch']}, {record['date']}"
    figure.text(0.99, 0.005, about, fontsize=8, color=GREY, ha="right", va="bottom")
    margin = 0.3 / figure.get_figheight()
    figure.set_layout_engine("constrained", rect=(0, margin, 1, 1 - margin))
