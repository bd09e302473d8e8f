"""`python -m fusedgpt.bench step`: the bench suite's command line."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

# `python -m` in a clone puts the clone on the path, where transformers' `import kernels` would find ours
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[1]]

app = tyro.extras.SubcommandApp()


@app.command
def step(
    size: str = "tiny",
    rounds: int = 60,
    nanogpt: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="JSON")] = None,
) -> None:
    """Time a whole training step beside transformers' GPT-2, and nanoGPT where a clone is named.

    Args:
        size: tiny, small or gpt2.
        rounds: steps of each side, taken in turns.
        nanogpt: a clone of nanoGPT to compare with.
        out: also write the figures there as JSON.
    """
    from .step import run_step

    run_step(size, rounds, nanogpt, out)


if __name__ == "__main__":
    try:
        app.cli(prog="python -m fusedgpt.bench", description="What is faster, by how much, on this machine.")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
