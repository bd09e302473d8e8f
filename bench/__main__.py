"""`python -m fusedgpt.bench step | ops | tiles | gpu`: the bench suite's command line.

argparse, not tyro as in `gpt`: `gpu` has to run on machines where nothing can be installed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# `python -m` in a clone puts the clone on the path, where transformers' `import kernels` would find ours
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[1]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark in `argv` and return the exit code: 1 where something computes the wrong thing, 2 for a mistake."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    try:
        # imported here, so that the help is there at once and a benchmark needs no more than its own libraries
        if command == "step":
            from .step import run_step

            run_step(**options)
        elif command == "ops":
            from .ops import run_ops

            run_ops(**options)
        elif command == "tiles":
            from .tile_sweep import run_tiles

            run_tiles(**options)
        else:
            from .gpu import run_gpu

            return run_gpu(**options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedgpt.bench", description="What is faster, by how much, on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="step | ops | tiles | gpu")

    step = commands.add_parser("step", help="a whole training step beside transformers' GPT-2 and nanoGPT")
    step.add_argument("--size", default="tiny", help="tiny, small or gpt2 (default: tiny)")
    step.add_argument("--rounds", type=int, default=60, help="steps of each side, in turns (default: 60)")
    step.add_argument(
        "--nanogpt", dest="nanogpt_folder", type=Path, metavar="DIR", help="a clone to compare with"
    )

    ops = commands.add_parser(
        "ops", help="every operator beside its peers: times, memory, share of the limit"
    )
    ops.add_argument("names", nargs="*", metavar="NAME", help="operators, such as attention (default: all)")
    ops.add_argument("--device", dest="device_name", default="auto", help="auto, cpu, cuda, cuda:N")
    ops.add_argument("--rounds", type=int, default=30, help="timings of each side (default: 30)")
    ops.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="for operators.png and attention.png (default: of --out)",
    )

    tiles = commands.add_parser(
        "tiles", help="sweep tile sizes on this GPU; prints rows for kernels/tiles.py"
    )
    tiles.add_argument(
        "--dtype", dest="dtype_name", default="bfloat16", choices=("bfloat16", "float16", "float32")
    )
    tiles.add_argument("--rounds", type=int, default=10, help="timings of each candidate (default: 10)")
    tiles.add_argument("--seconds", type=float, default=500, help="to spend in all (default: 500)")

    tiles.add_argument("--rows", type=int, metavar="M", help="(default: 65536)")
    tiles.add_argument(
        "--widths",
        type=int,
        nargs="+",
        metavar="C",
        default=(768, 1024, 1280, 1600),
        help="(default: those of GPT-2)",
    )
    gpu = commands.add_parser("gpu", help="all that only a GPU can show, within eight minutes")
    for command, kind in ((step, "JSON"), (ops, "JSON"), (gpu, "FOLDER")):
        command.add_argument("--out", type=Path, metavar=kind, help="also write the figures there as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
