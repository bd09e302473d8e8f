"""Parts of a long run, each in a process of its own with a time limit.

So one that hangs, or breaks the GPU's context, does not affect the others. The rows that a part found before it was stopped
are kept, and the record is written after every part.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from . import record

Row = dict[str, Any]  # one result; "ok" is False where something is wrong and absent where nothing is judged
Options = dict[str, Any]


class Part(NamedTuple):
    run: Callable[[Options], Iterator[Row]]  # options: those of the whole run, and "seconds", its limit
    seconds: int  # the most it may take
    judges: bool = False  # whether its failure is ours: a timing may fail because of another implementation


def run_parts(
    module: str, parts: Mapping[str, Part], options: Options, found: Row, file: Path, seconds: float
) -> None:
    """Run the parts in turn into `found` and write that to the file after each.

    `found` gets "rows", each with the part's name as its "benchmark", and "parts": by name the seconds and, where a part
    failed or was stopped, the error.

    Args:
        module: calls `part_main` when a part's process runs it.
        seconds: for all parts together; no part gets more than what is left of them.
    """
    began = time.monotonic()
    found |= {"parts": {}, "rows": []}
    for name, part in parts.items():
        limit = min(part.seconds, seconds - (time.monotonic() - began))
        print(f"\n== {name}", flush=True)
        if limit < 5:
            status: Row = {"seconds": 0, "error": "stopped before it began: no time was left"}
            rows: list[Row] = []
        else:
            rows, status = run_part(module, name, limit, options)
        if "error" in status:
            print(status["error"], flush=True)
        found["parts"][name] = status
        found["rows"] += [{"benchmark": name, **row} for row in rows]
        record.write(file, found)  # a machine may go away


def run_part(module: str, name: str, seconds: float, options: Options) -> tuple[list[Row], Row]:
    """Run a part in a process of its own, for so many seconds at most; returns its rows and its status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "rows.jsonl")
        asked = json.dumps(options | {"seconds": seconds})
        process = subprocess.Popen(
            [sys.executable, "-m", module, name, str(file), asked],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that the part's children end with it
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        assert process.stdout is not None
        printed = []
        for text in process.stdout:
            print(text, end="", flush=True)
            printed.append(text)
        process.wait()
        timer.cancel()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the part has left running
        lines = file.read_text().splitlines() if file.exists() else []
    status: Row = {"seconds": round(time.monotonic() - began, 1)}
    if late.is_set():
        status["error"] = f"stopped after {seconds:.0f} s"
    elif process.returncode:
        status["error"] = ("".join(printed).strip().splitlines() or ["it printed nothing"])[-1].strip()
    if "error" in status:
        status["printed"] = "".join(printed)[-4000:]
    return [json.loads(text) for text in lines], status


def part_main(parts: Mapping[str, Part], name: str, file: str, options: str) -> None:
    """A part's own process: write its rows to the file, line by line."""
    with open(file, "w", buffering=1) as rows:
        for row in parts[name].run(json.loads(options)):
            rows.write(json.dumps(record.finite(row)) + "\n")


def environment() -> dict[str, str]:
    """For a child process: the environment with this process's path. The clone itself is not on it, see __main__.py."""
    path = os.pathsep.join(filter(None, sys.path))
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
