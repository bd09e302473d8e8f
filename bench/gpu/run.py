"""`make gpu`: everything that needs a GPU, in one command that ends within eight minutes.

Parity of every kernel at full size, the tests of tests/gpu, everything that `bench all` measures and, in the remaining
time, compute-sanitizer and the tile sweep. Each part runs in its own process (`parts.py`).
"""

import itertools
import json
import math
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
from contextlib import suppress
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
TESTS = ("tests/gpu", "tests/kernels/test_integration.py")
# the part "parity" checks the full sizes
PYTEST = (
    sys.executable,
    *["-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-q", "-k"],
    "not full_size",
)


# ---- the parts, generators of results


def compile_kernels(options: Options) -> Iterator[Row]:
    """Fill the caches of compiled kernels with what "parity" and "tests" launch: they are sequential, compiling is parallel.

    Both run here in pieces, side by side, for the sake of their kernels. A failure occurs again in the part itself, which
    reports it.
    """
    until = _deadline(options)

    def run(what: Row, command: list[str]) -> Row:
        began = time.monotonic()
        printed = _output(command, until - began)
        row = {**what, "seconds": round(time.monotonic() - began, 1)}
        return row if printed is not None else {**row, "left out": "not compiled in time"}

    workers = min(os.cpu_count() or 1, 16)  # each takes half a gigabyte of the GPU's memory for its context
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run, *job) for job in _parity_jobs()]
        jobs += [pool.submit(run, *job) for job in _test_jobs(workers, until)]
        yield from (job.result() for job in jobs)


def _parity_jobs() -> Iterator[tuple[Row, list[str]]]:
    for operator, dtype in itertools.product(SMALL, DTYPES):
        name = str(dtype)[6:]
        options = json.dumps({"operators": [operator], "dtypes": [name], "rows": 4096})
        command = [sys.executable, "-m", "fusedgpt.bench.gpu.run", "parity", os.devnull, options]
        yield {"operator": operator, "dtype": name}, command


def _test_jobs(number: int, until: float) -> Iterator[tuple[Row, list[str]]]:
    """The tests in so many groups, without those that fill the GPU's memory."""
    names = [name for name in _collected(until) if "2to31" not in name.lower().replace("_", "")]
    for group in (names[i::number] for i in range(number)):
        if group:
            yield {"test": f"a group of {len(group)}"}, [*PYTEST, *group]


def check_parity(options: Options) -> Iterator[Row]:
    device, until = require_gpu(), _deadline(options)
    rows = options.get("rows") or full_rows(device)
    dtypes = [getattr(torch, name) for name in options.get("dtypes", ())] or DTYPES
    operators = options.get("operators") or SMALL
    examples = [(example, dtype) for dtype in dtypes for example in full_size(rows, device, dtype)]
    for example, dtype in examples:
        if example.operator not in operators:
            continue
        what = {"operator": example.operator, "shape": example.size, "dtype": str(dtype)[6:]}
        if time.monotonic() > until:
            yield {**what, "left out": "the time was over"}
            continue
        try:
            with use_backend("triton"):
                found = parity(example, device, dtype)
        except Exception as failure:  # whatever a launch may raise; the others are still checked
            yield {**what, "ok": False, "message": f"{type(failure).__name__}: {failure}"[:400]}
            continue
        yield {**what, **found._asdict(), "ok": found.ok}


def run_tests(options: Options) -> Iterator[Row]:
    if not (ROOT / "tests" / "gpu").is_dir():
        yield {"left out": "no tests here: they are in the repository, not in the package"}
        return
    until = _deadline(options)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [*PYTEST, f"--junitxml={report}", *TESTS]
        printed = _output(command, until - time.monotonic())
        if not report.exists():
            if printed is not None:
                raise RuntimeError(printed.strip()[-400:])
            yield {"left out": "all tests: the last one could not be interrupted"}
            return
        ran: set[tuple[str | None, str | None]] = set()
        for case in ElementTree.parse(report).iter("testcase"):
            if not case.get("name"):  # the one that was stopped
                continue
            ran.add((case.get("classname"), case.get("name")))
            found: Row = {"test": case.get("name"), "seconds": float(case.get("time", 0))}
            if (skipped := case.find("skipped")) is not None:
                yield {**found, "left out": skipped.get("message", "")}
                continue
            failures = [*case.iter("failure"), *case.iter("error")]
            message = " ".join(failure.get("message", "") for failure in failures)[:400]
            yield {**found, "ok": not failures, **({"message": message} if failures else {})}
    if printed is None:
        for test in map(_in_report, _collected(math.inf)):
            if test not in ran:
                yield {"test": test[1], "left out": "the time was over"}


def _collected(until: float) -> list[str]:
    """The names of the tests that need a GPU, as pytest takes them; empty where there is no time to collect them."""
    printed = _output([*PYTEST, "--collect-only", *TESTS], until - time.monotonic()) or ""
    return [line for line in printed.splitlines() if "::" in line]


def _in_report(test: str) -> tuple[str, str]:
    """Class and name in JUnit's report: ("tests.gpu.test_a.TestB", "test_c[d]") of tests/gpu/test_a.py::TestB::test_c[d]."""
    path, bracket, parameters = test.partition("[")
    where, _, name = path.rpartition("::")
    return where.replace(".py", "").replace("::", ".").replace("/", "."), name + bracket + parameters


def sanitize(options: Options) -> Iterator[Row]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        yield {"left out": "compute-sanitizer is not installed"}
        return
    until = _deadline(options)

    def run(check: str, *flags: str) -> Row:
        command = [tool, "--tool", check, *flags, sys.executable, "-m", "fusedgpt.bench.gpu.sanitize"]
        printed = _output(command, until - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        verdict = {"left out": "the time was over"} if printed is None else sanitizer_verdict(printed)
        return {"check": check, **verdict}

    with ThreadPoolExecutor(2) as pool:  # side by side: one after the other takes longer than there is time
        # PyTorch and Triton probe the driver with calls that may fail; those are no errors
        memory = pool.submit(run, "memcheck", "--report-api-errors", "no")
        races = pool.submit(run, "racecheck", "--racecheck-detect-level", "error")
        yield memory.result()
        row = races.result()
        row.pop("ok", None)  # it informs, and memcheck judges
        yield row


def sanitizer_verdict(text: str) -> Row:
    """What compute-sanitizer found, or why it could not run, from its output."""
    found = re.search(r"(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)", text)
    if found is None or not re.search(r"^ran \d+ examples", text, re.MULTILINE):
        printed = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
        unsupported = [line for line in printed if "not supported" in line]
        if unsupported:
            return {"left out": unsupported[0]}
        return {"ok": False, "message": " ".join(printed[-3:]) or "it printed nothing"}
    count = int(found[1] or found[2])
    return {"ok": count == 0, "message": f"{count} found"}


def _deadline(options: Options) -> float:
    """When a part stops beginning new work, so that it can still say what it left out."""
    return time.monotonic() + 0.8 * options.get("seconds", math.inf)


def _output(command: list[str], seconds: float, **variables: str) -> str | None:
    """What a command printed; None where it took longer than so many seconds.

    It is then interrupted, as by Ctrl-C, so that pytest still writes its report.
    """
    if seconds <= 0:
        return None
    shared = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # a cache of their own: "startup" needs the shared one empty
    own = {"TORCHINDUCTOR_CACHE_DIR": f"{shared}-tests"} if shared else {}
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | own | variables, stdout=pipe, stderr=both, text=True
    )
    try:
        return process.communicate(timeout=None if seconds == math.inf else seconds)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=8)
    process.kill()
    return None


def sweep_tiles(options: Options) -> Iterator[Row]:
    for text in tile_sweep.run_tiles(seconds=0.6 * options["seconds"]):  # the last candidate ends later
        yield {"row": text}


# The most important first: a slow machine has no time for the last.
PARTS = {
    "compile": Part(compile_kernels, 80),
    "parity": Part(check_parity, 60, judges=True),
    "tests": Part(run_tests, 100, judges=True),
    **suite.PARTS,
    "sanitizer": Part(sanitize, 70, judges=True),
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
        left_out: dict[str, list[str]] = {}
        for row in rows:
            what = " ".join(
                str(row[key]) for key in ("operator", "shape", "dtype", "test", "check") if key in row
            )
            if row.get("ok") is False:
                yield "    WRONG " + ", ".join(f"{key} {value}" for key, value in row.items() if key != "ok")
            elif "left out" in row:
                left_out.setdefault(row["left out"], []).append(what)
            elif "ok" not in row and "message" in row:
                yield f"    {what}: {row['message']}"
        for reason, names in left_out.items():
            yield f"    left out, {reason}: {'; '.join(names)}".removesuffix(": ")
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
