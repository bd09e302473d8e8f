"""The loss curves of runs, training and validation, as a picture."""

import os
from pathlib import Path

from ..data.files import replacing
from ..data.untrusted import InputError, MissingFile, printable
from .metrics import read_metrics


def plot_runs(runs: list[Path], out: Path | None = None) -> Path:
    """Draw the training and validation loss of runs as a PNG, with the spikes that the log marks; returns its path.

    Args:
        runs: run folders.
        out: the file; by default loss_curve.png in the folder of the first run.

    Raises:
        InputError: a folder is not a run, its log is damaged or holds nothing yet, or `out` is there and no PNG.
    """
    if out and out.exists() and not _is_png(out):
        raise InputError(out, "it exists and is no PNG", "choose another file for the picture")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, run in enumerate(runs):
        file = run / "metrics.jsonl"
        if not os.path.isfile(file):  # not Path.is_file, which raises where a name is too long
            raise MissingFile(
                run, "it has no metrics.jsonl", "name the folder of a run that has been trained"
            )
        records = read_metrics(file)
        training = [(r["step"], r["loss"]) for r in records if "loss" in r]
        validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        if not training and not validation:
            raise InputError(file, "it holds no losses yet", "wait for the first line of the log")
        colour, label = colours[i % 10], f"{_name(run)}: " if len(runs) > 1 else ""
        if training:
            axes.plot(*zip(*training, strict=True), color=colour, alpha=0.45, lw=1, label=f"{label}training")
        if spikes := [(r["step"], r["highest_loss"]) for r in records if "spike" in r]:
            axes.plot(*zip(*spikes, strict=True), color=colour, ls="", marker="x", label=f"{label}spike")
        if validation:
            axes.plot(
                *zip(*validation, strict=True), color=colour, marker="o", ms=3, label=f"{label}validation"
            )
            step, best = min(validation, key=lambda point: point[1])
            axes.annotate(
                f"{best:.3f}", (step, best), (0, 8), textcoords="offset points", ha="center", color=colour
            )
        floor = next((r["best_possible"] for r in reversed(records) if "best_possible" in r), None)
        if floor is not None:
            axes.axhline(floor, color=colour, ls=":", label=f"{label}best possible {floor:.3f}")
    axes.set(xlabel="step", ylabel="loss, nats a token", title=", ".join(map(_name, runs)))
    low, high = axes.dataLim.intervaly
    if high > 5 * low > 0:  # otherwise the first steps take most of the axis
        axes.set_yscale("log")
        ticks = [
            tick
            for decade in (0.1, 1.0, 10.0)
            for tick in (decade, 1.5 * decade, 2 * decade, 3 * decade, 5 * decade, 7 * decade)
        ]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(0.9 * low, 1.1 * high)
    axes.grid(alpha=0.25)
    axes.legend()
    out = out or runs[0] / "loss_curve.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as png:
        figure.savefig(png, format="png", dpi=120)
    return out


def _is_png(file: Path) -> bool:
    """Whether what is there may be replaced by a picture."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(8) == b"\x89PNG\r\n\x1a\n"


def _name(run: Path) -> str:
    return printable(run.name, 60).replace("$", r"\$")  # which would begin a formula
