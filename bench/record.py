"""The record of a benchmark: one JSON object with the figures and all that they depend on.

    {"kind": "ops", "date": "2026-11-21", "commit": "0123456789ab+", "versions": {"device": ..., "torch": ...},
     "ceilings": {"copy": bytes a second, "matmul": FLOPs a second}, "rows": [{"name": ..., "case": ..., ...}]}

A row names what was measured (`name`), at which sizes (`case`) and which implementation (`side`). Its other fields are
figures; one that could not be measured is null. So records compare row by row, whatever else a benchmark puts into its rows.
"""

import datetime
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..gpt.device import driver
from ..kernels import _triton
from ..kernels.selfcheck import ptxas_version
from ..kernels.tiles import hardware

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]


@contextmanager
def recording(
    kind: str, device: torch.device, out: Path | None = None, pictures: Path | None = None
) -> Iterator[Record]:
    """The record to fill inside the `with` block; written and drawn after it.

    Args:
        kind: of benchmark.
        device: where it runs.
        out: write the record there as JSON.
        pictures: the folder for its pictures; by default that of `out`, without which there are none.
    """
    found = {"kind": kind, **machine(device), "clocks": [clocks(device)]}
    print(about(found))
    yield found
    found["clocks"].append(clocks(device))
    if all(found["clocks"]):
        print("\nbefore: {}\nafter:  {}".format(*found["clocks"]))
    if out:
        write(out, found)
        print(f"\n{out}")
    if folder := pictures or (out and out.parent):
        draw(found, folder)


def machine(device: torch.device) -> Record:
    """The part of a record that all benchmarks have: date, commit, device and versions."""
    return {"date": str(datetime.date.today()), "commit": commit(), "versions": versions(device)}


def versions(device: torch.device) -> dict[str, str]:
    """What a result depends on: the device and the software under it."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if _triton.MISSING is None:
        found["triton"] = _triton.triton.__version__
    if device.type != "cuda":
        return {"device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads", **found}
    ptxas = ptxas_version(hardware(device).architecture)
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver(),
        **found,
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        **({"ptxas": ptxas} if ptxas else {}),
    }


def commit() -> str | None:
    """The commit measured, with a + where tracked files differ from it; None outside a clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "") if head else None


def about(found: Record) -> str:
    """Device, versions and commit of a record, in a line."""
    texts = (f"{key} {value}" for key, value in found["versions"].items())
    return " · ".join([*texts, found["commit"] or "outside a clone"])


def clocks(device: torch.device) -> str | None:
    """The present clocks, power and temperature of a GPU; None without nvidia-smi."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    names = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    # by UUID: nvidia-smi does not number devices as CUDA_VISIBLE_DEVICES does
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid else []
    values = _output("nvidia-smi", *which, f"--query-gpu={','.join(names)}", "--format=csv,noheader").split(
        ", "
    )
    if len(values) != len(names):
        return None
    return "SM {}, memory {}, {} of {}, {} °C".format(*values)


def _output(*command: str) -> str:
    """The standard output of a command, empty where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write(path: Path, record: Record) -> None:
    """Write a record as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(record), indent=1) + "\n")


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(file: Path) -> Record:
    """Read a record.

    Raises:
        ValueError, OSError: the file is no record, or cannot be read.
    """
    try:
        record = json.loads(file.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"kind", "versions", "rows"} <= record.keys():
        raise ValueError(f"{file} is not a result of the bench; it takes what --out or `make gpu` wrote")
    return record


def draw(found: Record, folder: Path, prefix: str = "") -> None:
    """Draw the pictures that a record has rows for into a folder. prefix: of their file names."""
    try:
        from .pictures import PICTURES
    except ImportError as error:  # matplotlib: `make gpu` runs on what a machine has
        print(f"no pictures: {error}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, (benchmark, picture) in PICTURES.items():
        rows = [row for row in found["rows"] if row["benchmark"] == benchmark and "side" in row]
        if rows and (figure := picture(found | {"rows": rows})):
            path = folder / f"{prefix}{name}.png"
            figure.savefig(path, dpi=120)
            print(path)
