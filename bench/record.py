"""What a benchmark leaves: one JSON object with the figures and all that they depend on.

    {"kind": "ops", "date": "2026-11-21", "commit": "0123456789ab+", "versions": {"device": ..., "torch": ...},
     "ceilings": {"copy": bytes a second, "matmul": FLOPs a second}, "rows": [{"name": ..., "case": ..., ...}]}

A row names what was timed (`name`), at which sizes (`case`) and by whom (`side`); the other fields are its figures, and one
that could not be taken is null. So two records compare row by row, whatever else their benchmarks put into a row.
"""

import datetime
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import versions

ROOT = Path(__file__).resolve().parents[1]


def machine(device: torch.device) -> dict[str, Any]:
    """The part of a record that all benchmarks have: date, commit, and the versions of what ran."""
    return {"date": str(datetime.date.today()), "commit": commit(), "versions": versions(device)}


def commit() -> str | None:
    """The commit measured, with a + where tracked files differ from it; None outside a clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    head = _printed("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _printed("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "") if head else None


def clocks(device: torch.device) -> str | None:
    """A GPU's clocks, power and temperature at this moment; None where nothing tells them."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    names = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    # by its UUID: nvidia-smi does not count devices as CUDA_VISIBLE_DEVICES does
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid else []
    said = _printed("nvidia-smi", *which, f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    values = said.split(", ")
    if len(values) != len(names):
        return None
    return "SM {}, memory {}, {} of {}, {} °C".format(*values)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON. NaN and infinity, which JSON does not have, become null.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(record), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _printed(*command: str) -> str:
    """What a command prints, or nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def draw(found: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """The pictures of a record, in a folder: those that it has rows for. prefix: of the files' names."""
    try:
        from .pictures import attention_picture, operators_picture
        from .step_pictures import breakdown_picture, step_picture
    except ImportError as error:  # matplotlib: `make gpu` runs on what a machine has
        print(f"no pictures: {error}")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for benchmark, picture, name in (
        ("ops", operators_picture, "operators"),
        ("ops", attention_picture, "attention"),
        ("step", step_picture, "step"),
        ("breakdown", breakdown_picture, "breakdown"),
    ):
        rows = [row for row in found["rows"] if row["benchmark"] == benchmark and "side" in row]
        path = folder / f"{prefix}{name}.png"
        if rows and picture(found | {"rows": rows}, path):
            print(path)
            drawn.append(path)
    return drawn
