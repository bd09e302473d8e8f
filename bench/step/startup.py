"""How long one waits for the first training step, in fresh processes: ours, through torch.compile, and transformers.

Cold: the caches of compiled kernels are empty, as on a machine that has never run this. Warm: they hold what the process
before left. A side that compiles nothing has no such difference on a CPU. Ours starts as `gpt train` does: its kernels are
compiled in threads while the weights are drawn.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..gpu.parts import environment
from .implementations import COMPILED, OURS, builders
from .sizes import Workload


@dataclass
class Row:
    """The median of some fresh processes."""

    name: str
    case: str
    side: str
    seconds: float | None = None  # from `import torch` done to the first step finished; None: `note` says why
    import_torch: float | None = None  # seconds
    ratio: float | None = None  # its seconds over ours in the same state of the caches
    runs: int = 0
    note: str = ""


def measure(work: Workload, runs: int = 3) -> Iterator[Row]:
    """Every side, cold and where that differs warm.

    runs: processes a figure; torch.compile's has one that is cold and one less that are warm.
    """
    gpu = work.device.type == "cuda"
    theirs = [name for name, _ in builders(work) if name.startswith("transformers") and "," not in name]
    with tempfile.TemporaryDirectory() as scratch:
        caches = Path(scratch)
        # `all` gives every part the same empty folder: `step` then finds there what is compiled here
        shared = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or caches / "inductor")
        inductor = caches / "inductor" if shared.is_dir() and any(shared.iterdir()) else shared
        cases = [(OURS, "cold" if gpu else "", runs)]
        cases += [(OURS, "warm", runs)] if gpu else []
        cases += [(name, "", runs) for name in theirs]
        cases += [(COMPILED, "cold", 1)] + ([(COMPILED, "warm", runs - 1)] if runs > 1 else [])
        ours: dict[str, float] = {}
        for side, state, times in cases:
            row = Row("startup", f"{work.case}{', ' if state else ''}{state}", side)
            found = []
            try:
                for run in range(times):
                    folders = {
                        "TORCHINDUCTOR_CACHE_DIR": inductor
                    }  # torch.compile's Triton kernels are there too
                    if side == OURS:
                        folders["TRITON_CACHE_DIR"] = caches / f"triton-{run if state == 'cold' else 0}"
                    found.append(_run(side, work, folders))
            except RuntimeError as error:
                row.note = str(error)
            if found:
                row.runs = len(found)
                row.seconds = statistics.median(each["seconds"] for each in found)
                row.import_torch = statistics.median(each["import_torch"] for each in found)
                if side == OURS:
                    ours[state] = row.seconds
                beside = ours.get(state) or ours.get("cold") or ours.get("")
                row.ratio = row.seconds / beside if beside else None
            yield row


def _run(side: str, work: Workload, caches: dict[str, Path]) -> dict[str, float]:
    """One process.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    command = [sys.executable, "-m", "fusedgpt.bench.step.first_step", side, work.size, str(work.device)]
    variables = environment() | {name: str(folder) for name, folder in caches.items()}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
    if done.returncode:
        raise RuntimeError(f"failed: {said[-1]}"[:200])
    return json.loads(said[-1])


HEADS = ("start", "side", "import torch", "first step", "to ours", "runs")
LINE = "{:<40}{:<38}{:>13}{:>12}{:>9}{:>6}  {}"


def line(row: Row) -> str:
    """A row of the table."""
    if row.seconds is None:
        return LINE.format(row.case, row.side, "", "", "", "", row.note)
    ratio = f"{row.ratio:.2f}" if row.ratio else ""
    times = f"{row.import_torch:.1f} s", f"{row.seconds:.1f} s"
    return LINE.format(row.case, row.side, *times, ratio, row.runs, "").rstrip()
