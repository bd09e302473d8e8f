"""`make gpu`: everything that needs a GPU, in one command that ends within eight minutes.

Parity of every kernel at full size, the tests of tests/gpu, everything that `bench all` measures and, in the remaining
time, compute-sanitizer and the tile sweep. Each part runs in its own process (`parts.py`).
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ...kernels import use_backend
from ...kernels.examples import SMALL, full_size, parity
from .. import record, suite
from ..ops import run as ops
from ..parts import Options, Part, Row, part_main, run_parts
from ..step.sizes import workload
from ..tiles import sweep as tile_sweep
from ..timing import full_rows, require_gpu

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SECONDS = 465.0  # of all parts together: within eight minutes


# ---- the parts, generators of results


def compile_kernels(_: Options) -> Iterator[Row]:
    """Fill Triton's cache with what "parity" launches: that part is sequential, compiling is parallel."""

    def run(operator: str, dtype: torch.dtype) -> Row:
        began, name = time.monotonic(), str(dtype)[6:]
        options = json.dumps({"operators": [operator], "dtypes": [name], "rows": 4096})
        command = [sys.executable, "-m", "fusedgpt.bench.gpu.run", "parity", os.devnull, options]
        # a failure occurs again under "parity", which reports it
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return {"operator": operator, "dtype": name, "seconds": round(time.monotonic() - began, 1)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(run, *zip(*itertools.product(SMALL, DTYPES), strict=True))


def check_parity(options: Options) -> Iterator[Row]:
    device = require_gpu()
    rows = options.get("rows") or full_rows(device)
    dtypes = [getattr(torch, name) for name in options.get("dtypes", ())] or DTYPES
    operators = options.get("operators") or SMALL
    examples = [example for example in full_size(rows) if example.operator in operators]
    for example, dtype in itertools.product(examples, dtypes):
        what = {"operator": example.operator, "shape": example.size, "dtype": str(dtype)[6:]}
        try:
            with use_backend("triton"):
                found = parity(example, device, dtype)
        except Exception as failure:  # whatever a launch may raise; the others are still checked
            yield {**what, "ok": False, "message": f"{type(failure).__name__}: {failure}"[:400]}
            continue
        yield {**what, **found._asdict(), "ok": found.ok}


def run_tests(options: Options) -> Iterator[Row]:
    folder = ROOT / "tests"
    if not (folder / "gpu").is_dir():
        yield {"left out": "no tests here: they are in the repository, not in the package"}
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # the part "parity" has checked the full sizes
        paths = (folder / "gpu", folder / "kernels" / "test_integration.py")
        command += ["-k", "not full_size", *map(str, paths)]
        # their own cache: "startup" needs the shared one empty
        own = os.environ | {"TORCHINDUCTOR_CACHE_DIR": scratch}
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        process = subprocess.Popen(command, cwd=ROOT, env=own, stdout=pipe, stderr=both, text=True)
        stopped = False
        try:
            printed, _ = process.communicate(timeout=0.85 * options["seconds"])
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGINT)  # like Ctrl-C: pytest still writes its report
            printed, _ = process.communicate()
        if not report.exists():
            raise RuntimeError(printed.strip()[-400:])
        for case in ElementTree.parse(report).iter("testcase"):
            if not case.get("name"):  # the one that was stopped
                continue
            found: Row = {"test": case.get("name"), "seconds": float(case.get("time", 0))}
            if (skipped := case.find("skipped")) is not None:
                yield {**found, "left out": skipped.get("message", "")}
                continue
            failures = [*case.iter("failure"), *case.iter("error")]
            message = " ".join(failure.get("message", "") for failure in failures)[:400]
            yield {**found, "ok": not failures, **({"message": message} if failures else {})}
        if stopped:
            yield {"left out": f"the tests after these: {0.85 * options['seconds']:.0f} s were over"}


def sanitize(_: Options) -> Iterator[Row]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        yield {"left out": "compute-sanitizer is not installed"}
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, sys.executable, "-m", "fusedgpt.bench.gpu.sanitize"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        yield {"check": check, **sanitizer_verdict(done.stdout + done.stderr)}


def sanitizer_verdict(text: str) -> Row:
    """What compute-sanitizer found, or why it could not run, from its output."""
    found = re.search(r"(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)", text)
    if found is None or not re.search(r"^ran \d+ operators", text, re.MULTILINE):
        printed = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
        unsupported = [line for line in printed if "not supported" in line]
        if unsupported:
            return {"left out": unsupported[0]}
        return {"ok": False, "message": " ".join(printed[-3:]) or "it printed nothing"}
    count = int(found[1] or found[2])
    return {"ok": count == 0, "message": f"{count} found"}


def sweep_tiles(options: Options) -> Iterator[Row]:
    for text in tile_sweep.run_tiles(seconds=0.6 * options["seconds"]):  # the last candidate ends later
        yield {"row": text}


# The most important first: a slow machine has no time for the last.
PARTS = {
    "compile": Part(compile_kernels, 50),
    "parity": Part(check_parity, 60, judges=True),
    "tests": Part(run_tests, 90, judges=True),
    **suite.PARTS,
    "sanitizer": Part(sanitize, 50, judges=True),
    "tiles": Part(sweep_tiles, 300),
}


# ---- the command


def run_gpu(out: Path | None = None) -> int:
    """Run every part, write `<gpu>-<date>.json` and print a short table; returns 1 where something is wrong, else 0.

    Args:
        out: the folder to write to; by default that in the variable OUT, or bench/results in the repository.

    Raises:
        ValueError: there is no GPU that Triton kernels run on.
    """
    device = require_gpu()
    found: Row = {"kind": "gpu", **record.machine(device), "clocks": [record.clocks(device)]}
    folder = out or Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    file = folder / suite.record_name(device)
    options = suite.options_of(workload(device_name=str(device)))
    with suite.caches():
        run_parts("fusedgpt.bench.gpu.run", PARTS, options, found, file, SECONDS)
    found["clocks"].append(record.clocks(device))
    record.write(file, found)
    print()
    print("\n".join(summary(found)))
    print(f"\n{file}")
    return 1 if any(wrong(name, found) for name in found["parts"]) else 0


def rows_of(name: str, found: Row) -> list[Row]:
    return [row for row in found["rows"] if row["benchmark"] == name]


def wrong(name: str, found: Row) -> bool:
    """Whether a part found an error or failed; running out of time is no failure."""
    error = found["parts"][name].get("error", "stopped")
    broke = not error.startswith("stopped")
    return any(row.get("ok") is False for row in rows_of(name, found)) or (broke and PARTS[name].judges)


def summary(found: Row) -> Iterator[str]:
    """A short table: results, errors and seconds of each part, then the timings."""
    yield record.about(found)
    for clocks in found["clocks"]:
        if clocks:
            yield clocks
    for name, status in found["parts"].items():
        rows = rows_of(name, found)
        judged = [row for row in rows if "ok" in row]
        right = f"{sum(row['ok'] for row in judged)} of {len(judged)} right"
        text = right if judged else f"{len(rows)} figures"
        yield f"{name:<12}{status['seconds']:>6.0f} s  {text}  {status.get('error', '')}".rstrip()
        for row in rows:
            if row.get("ok") is False:
                yield "    WRONG " + ", ".join(f"{key} {value}" for key, value in row.items() if key != "ok")
            elif "left out" in row:
                yield f"    left out: {row.get('test', row.get('check', ''))} {row['left out']}"
    yield from ops.summary(rows_of("ops", found))
    for name in suite.MEASUREMENTS:
        if rows := rows_of(name, found):
            yield from ("", *suite.lines(name, rows))
    if rows := rows_of("tiles", found):
        yield from ("", "tiles, to paste into kernels/tiles.py:", *(row["row"] for row in rows))


def main(name: str, file: str, options: str) -> None:
    part_main(PARTS, name, file, options)


if __name__ == "__main__":
    main(*sys.argv[1:])
