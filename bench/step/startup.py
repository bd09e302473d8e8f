"""Seconds until the first training step is finished, in fresh processes: ours, through torch.compile, and transformers.

Cold: the caches of compiled kernels are empty, as on a machine that has never run this. Warm: they hold what the process
before left. An implementation that compiles nothing has no such difference on a CPU. Ours starts as `gpt train` does: its
kernels are compiled in threads while the weights are drawn.

Each process runs `python -m fusedgpt.bench.step.startup IMPLEMENTATION SIZE DEVICE`, which times `import torch` too. So
nothing that imports torch may stand at the top of this file.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sizes import Workload


@dataclass
class Row:
    """The median of some fresh processes."""

    name: str
    case: str
    side: str
    seconds: float | None = (
        None  # from the end of `import torch` to that of the first step; None: `note` says why
    )
    import_torch: float | None = None  # seconds
    ratio: float | None = None  # its seconds over ours in the same state of the caches
    runs: int = 0
    note: str = ""


def measure(work: "Workload", runs: int = 3) -> Iterator[Row]:
    """Every implementation, cold and, where that differs, warm.

    runs: processes a figure; torch.compile has one cold process and one less than `runs` that are warm.
    """
    from .implementations import COMPILED, OURS, builders

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
        for name, state, times in cases:
            row = Row("startup", f"{work.case}{', ' if state else ''}{state}", name)
            found = []
            try:
                for run in range(times):
                    folders = {
                        "TORCHINDUCTOR_CACHE_DIR": inductor
                    }  # holds torch.compile's Triton kernels too
                    if name == OURS:
                        folders["TRITON_CACHE_DIR"] = caches / f"triton-{run if state == 'cold' else 0}"
                    found.append(_run(name, work, folders))
            except RuntimeError as error:
                row.note = str(error)
            if found:
                row.runs = len(found)
                row.seconds = statistics.median(each["seconds"] for each in found)
                row.import_torch = statistics.median(each["import_torch"] for each in found)
                if name == OURS:
                    ours[state] = row.seconds
                beside = ours.get(state) or ours.get("cold") or ours.get("")
                row.ratio = row.seconds / beside if beside else None
            yield row


COLUMNS = (
    ("start", "<50", "case", "{}"),
    ("implementation", "<36", "side", "{}"),
    ("import torch", ">12", "import_torch", "{:.1f} s"),
    ("first step", ">10", "seconds", "{:.1f} s"),
    ("to ours", ">7", "ratio", "{:.2f}"),
    ("runs", ">4", "runs", "{}"),
)


def _run(name: str, work: "Workload", caches: dict[str, Path]) -> dict[str, float]:
    """One process.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    from ..parts import environment

    command = [sys.executable, "-m", "fusedgpt.bench.step.startup", name, work.size, str(work.device)]
    variables = environment() | {variable: str(folder) for variable, folder in caches.items()}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    last = ((done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""])[-1]
    if done.returncode:
        raise RuntimeError(f"failed: {last}"[:200])
    return json.loads(last)


def main(name: str, size: str, device_name: str) -> None:
    """The fresh process: print the seconds of `import torch`, and those from then to the end of the first step, as JSON."""
    began = time.perf_counter()
    import torch

    imported = time.perf_counter()
    from .implementations import builders
    from .sizes import workload

    work = workload(size, device_name)
    loss, _ = dict(builders(work))[name]().step(*next(work.batches()))
    loss.item()
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    print(json.dumps({"import_torch": imported - began, "seconds": time.perf_counter() - imported}))


if __name__ == "__main__":
    main(*sys.argv[1:])
