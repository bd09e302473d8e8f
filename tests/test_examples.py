"""The scripts in examples/ run as their docstrings say and show what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHOWS = {
    "data_pipeline.py": r"resumed +at window 8: the next batch is the same",
    "kernel_in_transformers.py": r"logits and 28 gradients agree",
    "training_loop.py": r"step 300  loss \d\.\d+ nats a character",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    # without the interpreter that the tests force: a user has plain PyTorch here
    env = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")
    }
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWS[name], done.stdout), done.stdout
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+) nats", done.stdout)]
    assert losses == sorted(losses, reverse=True), "training learns"
