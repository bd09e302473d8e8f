"""`make gpu`: all that only a GPU can show, in one command that ends within eight minutes.

Parity of every kernel at full size, the tests of tests/gpu, compute-sanitizer, the operators' times and the step's.
Each part is a process of its own with a limit in time, so one that hangs or breaks the GPU's context takes none of
the others with it; what a part found before it was stopped is kept.
"""

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import add_layer_norm, causal_attention, dropout, embed, layer_norm, linear, use_backend
from ..kernels.backend import TRITON_OPERATORS
from ..kernels.selfcheck import Example, parity
from . import ops
from .record import clocks, commit
from .timing import full_rows, require_gpu, versions

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Record = dict[
    str, Any
]  # one result; "ok" is False where something is wrong and absent where nothing is judged


def full_size(operator: str, rows: int) -> dict[str, Example]:
    """The operator at the sizes of GPT-2's training, with all that its kernels can do; an operator joins by a line."""

    def norm(columns: int) -> Example:
        shapes = {"x": (rows, columns), "weight": (columns,), "bias": (columns,)}
        return shapes, lambda t: layer_norm(t["x"], t["weight"], t["bias"])

    def add(columns: int, p: float) -> Example:
        big, small = (rows, columns), (columns,)
        shapes = {"x": big, "residual": big, "weight": small, "bias": small, "x_bias": small}
        return shapes, lambda t: add_layer_norm(
            t["x"], t["residual"], t["weight"], t["bias"], 1e-5, p, t["seed"], 2, t["x_bias"]
        )

    def heads(length: int, width: int, p: float) -> Example:
        shapes = {"qkv": (4, length, 3 * width)}  # the float64 side holds the T x T matrices of all heads
        return shapes, lambda t: causal_attention(t["qkv"], width // 64, p, t["seed"], 1)

    def project(columns: int, out: int) -> Example:
        shapes = {"x": (rows, columns), "weight": (out, columns), "bias": (out,)}
        return shapes, lambda t: linear(t["x"], t["weight"], t["bias"])

    def tables(columns: int, p: float) -> Example:
        length, vocabulary = min(rows, 1024), min(16 * rows, 50304)

        def call(t: dict[str, torch.Tensor]) -> torch.Tensor:
            row = torch.arange(rows, device=t["wte"].device)
            ids = torch.where(
                row % 20 == 0, 11, row * 7919 % vocabulary
            )  # a token that is a twentieth of all
            return embed(ids.view(-1, length), t["wte"], t["wpe"], p, t["seed"], 1)

        return {"wte": (vocabulary, columns), "wpe": (length, columns)}, call

    widths = (768, 1024, 1280, 1600)
    examples: dict[str, dict[str, Example]] = {
        "embed": {f"{rows} x {c}, p = {p}": tables(c, p) for c, p in ((768, 0.0), (1600, 0.1))},
        "layer_norm": {f"{rows} x {c}": norm(c) for c in widths},
        "add_layer_norm": {f"{rows} x {c}, p = {p}": add(c, p) for c in widths for p in (0.0, 0.1)},
        "linear": {f"{rows} x {c} to {n}": project(c, n) for c, n in ((768, 2304), (1600, 1600))},
        "attention": {
            f"4 x {t} x 3 x {c}, p = {p}": heads(t, c, p)
            for t, c in ((1024, 768), (777, 1600))
            for p in (0.0, 0.1)
        },
        "dropout": {f"{rows} x 768": ({"x": (rows, 768)}, lambda t: dropout(t["x"], 0.1, t["seed"], 4))},
    }
    return examples[operator]


# ---- the parts: what each finds, as it finds it


def check_parity() -> Iterator[Record]:
    device = require_gpu()
    for operator in sorted(TRITON_OPERATORS):
        for name, example in full_size(operator, full_rows(device)).items():
            for dtype in DTYPES:
                what = {"operator": operator, "shape": name, "dtype": str(dtype)[6:]}
                try:
                    with use_backend("triton"):
                        error, allowed = parity(example, device, dtype)
                except Exception as failure:  # whatever a launch may throw; the others are still checked
                    yield {**what, "ok": False, "message": f"{type(failure).__name__}: {failure}"[:400]}
                    continue
                yield {**what, "error": error, "allowed": allowed, "ok": error <= allowed}


def run_tests() -> Iterator[Record]:
    folder = ROOT / "tests"
    if not (folder / "gpu").is_dir():
        yield {"left out": "no tests here: they are in the repository, not in the package"}
        return
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        # what the part "parity" has checked is not checked again
        command += [
            "-k",
            "not full_size",
            str(folder / "gpu"),
            str(folder / "kernels" / "test_integration.py"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError((done.stderr or done.stdout).strip()[-400:])
        for case in ElementTree.parse(report).iter("testcase"):
            record: Record = {"test": case.get("name"), "seconds": float(case.get("time", 0))}
            if (skipped := case.find("skipped")) is not None:
                yield {**record, "left out": skipped.get("message", "")}
                continue
            failures = [*case.iter("failure"), *case.iter("error")]
            message = " ".join(failure.get("message", "") for failure in failures)[:400]
            yield {**record, "ok": not failures, **({"message": message} if failures else {})}


def sanitize() -> Iterator[Record]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        yield {"left out": "compute-sanitizer is not installed"}
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, sys.executable, "-m", "fusedgpt.bench.sanitize"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        yield {"check": check, **sanitizer_verdict(done.stdout + done.stderr)}


def sanitizer_verdict(text: str) -> Record:
    """Out of what compute-sanitizer printed: whether all is well, or why it could not watch."""
    found = re.search(r"(?:ERROR SUMMARY: (\d+) error)|(?:RACECHECK SUMMARY: (\d+) hazard)", text)
    if found is None or not re.search(r"^ran \d+ operators", text, re.MULTILINE):
        said = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
        unsupported = [line for line in said if "not supported" in line]
        if unsupported:
            return {"left out": unsupported[0]}
        return {"ok": False, "message": " ".join(said[-3:]) or "it printed nothing"}
    count = int(found[1] or found[2])
    return {"ok": count == 0, "message": f"{count} found"}


def time_operators() -> Iterator[Record]:
    device = require_gpu()
    most = ops.ceilings(device)
    yield {"ceilings": most._asdict(), "clocks": clocks(device)}
    # the last operator begun, its peers' compilation included, may take what remains of the part's time
    for row in ops.measure(device, most, rounds=20, seconds=PARTS["operators"].seconds - 20):
        yield asdict(row)
    yield {"clocks": clocks(device)}


def time_step() -> Iterator[Record]:
    from .step import gpu_sides

    for row in gpu_sides(require_gpu()):
        yield asdict(row)


class Part(NamedTuple):
    run: Callable[[], Iterator[Record]]
    seconds: int  # the most it may take
    judges: bool  # whether its failure is ours: a timing may fail for a peer's sake


# seven and a half minutes together
PARTS = {
    "parity": Part(check_parity, 80, True),
    "tests": Part(run_tests, 90, True),
    "sanitizer": Part(sanitize, 80, True),
    "operators": Part(time_operators, 100, False),
    "step": Part(time_step, 100, False),
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
    today = str(datetime.date.today())
    parts: dict[str, Record] = {}
    software = versions(device)
    record: Record = {"date": today, "commit": commit(), "versions": software, "parts": parts}
    folder = out or Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", software["device"].lower()).strip("-")
    file = folder / f"{slug}-{today}.json"
    for name, part in PARTS.items():
        print(f"{name} ...", flush=True)
        parts[name] = run_part(name, part.seconds)
        file.write_text(json.dumps(record, indent=1) + "\n")  # after each: a machine may go away
    print()
    print("\n".join(summary(record)))
    print(f"\n{file}")
    return 1 if any(wrong(name, part) for name, part in parts.items()) else 0


def run_part(name: str, seconds: int) -> Record:
    """Run a part in a process of its own, for so many seconds at most."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "rows.jsonl")
        command = [sys.executable, "-m", "fusedgpt.bench.gpu", name, str(rows)]
        process = subprocess.Popen(
            command,
            # this process's path: the clone itself is not on it, see __main__.py
            env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what the part starts ends with it
        )
        error = ""
        try:
            printed, _ = process.communicate(timeout=seconds)
            if process.returncode:
                error = (printed.strip().splitlines() or ["it printed nothing"])[-1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            printed, _ = process.communicate()
            error = f"stopped after {seconds} s"
        lines = rows.read_text().splitlines() if rows.exists() else []
    result: Record = {
        "seconds": round(time.monotonic() - began, 1),
        "rows": [json.loads(text) for text in lines],
    }
    if error:
        result |= {"error": error, "printed": printed[-4000:]}
    return result


def wrong(name: str, part: Record) -> bool:
    """Whether a part found something wrong, or broke. One that only ran out of time did not."""
    broke = "error" in part and not part["error"].startswith("stopped after")
    return any(row.get("ok") is False for row in part["rows"]) or (broke and PARTS[name].judges)


def summary(record: Record) -> Iterator[str]:
    """A short table: what each part found, what is wrong, and the times."""
    about = (f"{name} {value}" for name, value in record["versions"].items())
    yield " · ".join([*about, record["commit"] or "outside a clone"])
    for name, part in record["parts"].items():
        rows = part["rows"]
        judged = [row for row in rows if "ok" in row]
        text = (
            f"{sum(row['ok'] for row in judged)} of {len(judged)} right" if judged else f"{len(rows)} figures"
        )
        yield f"{name:<12}{part['seconds']:>6.0f} s  {text}  {part.get('error', '')}".rstrip()
        for row in rows:
            if row.get("ok") is False:
                yield "    WRONG " + ", ".join(f"{key} {value}" for key, value in row.items() if key != "ok")
            elif "left out" in row:
                yield f"    left out: {row.get('test', row.get('check', ''))} {row['left out']}"
    yield from ops.summary(record["parts"].get("operators", {}).get("rows", []))
    for row in record["parts"].get("step", {}).get("rows", []):
        mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
        speed = f"{row['milliseconds']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s{mfu}"
        yield f"step {row['name']:<40}{speed}, {row['gigabytes']:.1f} GB, {row['ratio']:.2f} of ours"


def main(name: str, file: str) -> None:
    """A part's own process: its findings go into the file line by line."""
    with open(file, "w", buffering=1) as rows:
        for row in PARTS[name].run():
            # JSON has no NaN
            rows.write(
                json.dumps({key: None if value != value else value for key, value in row.items()}) + "\n"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
