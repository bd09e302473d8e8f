"""`python -m fusedgpt.bench step | ops | ... | all | compare | readme | tiles | gpu`: the bench suite's command line.

argparse, not tyro as in `gpt`: `gpu` has to run on machines where nothing can be installed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `python -m` in a clone puts the clone on the path, where transformers' `import kernels` would find ours
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[1]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark in `argv` and return the exit code: 1 where something computes the wrong thing, 2 for a mistake."""
    options = vars(_parser().parse_args(argv))
    try:
        return _run(options.pop("command"), options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(command: str, options: dict[str, Any]) -> int:
    # imported here, so that the help is there at once and a benchmark needs no more than its own libraries
    if command == "ops":
        from .ops.run import run_ops

        run_ops(**options)
    elif command == "compare":
        from .compare import run_compare

        run_compare(**options)
    elif command == "readme":
        from .readme import run_readme

        run_readme(**options)
    elif command == "tiles":
        from .tiles.sweep import run_tiles

        run_tiles(**options)
    elif command == "gpu":
        from .gpu.run import run_gpu

        return run_gpu(**options)
    else:
        from .step.sizes import workload
        from .suite import run_all, run_measurement

        given = {
            name: options.pop(name) for name in ("size", "device_name", "dropout", "batch") if name in options
        }
        if command == "all":
            run_all(workload(**given), **options)
        elif options.pop("breakdown", False):
            if options.pop("nanogpt_folder") is not None:
                raise ValueError("--breakdown shows our step alone; leave --nanogpt out")
            run_measurement("breakdown", workload(**given), **options)
        else:
            run_measurement(command, workload(**given), **options)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it takes a whole number from 1 up")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedgpt.bench", description="What is faster, by how much, on this machine."
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="ops | step | memory | startup | decode | all | compare | readme | tiles | gpu",
    )

    ops = commands.add_parser(
        "ops", help="every operator beside its peers: times, memory, share of the limit"
    )
    ops.add_argument("names", nargs="*", metavar="NAME", help="operators, such as attention (default: all)")
    ops.add_argument("--rounds", type=_count, default=30, help="timings of each side (default: 30)")

    step = commands.add_parser(
        "step", help="a whole training step beside torch.compile, transformers' GPT-2 and nanoGPT"
    )
    step.add_argument(
        "--breakdown", action="store_true", help="instead: the time of every part of our step by name"
    )
    step.add_argument("--rounds", type=_count, default=40, help="turns of each side (default: 40)")
    memory = commands.add_parser("memory", help="the step's peak memory, and what ours is made of")
    memory.add_argument(
        "--batches",
        type=_count,
        nargs="+",
        metavar="B",
        default=(),
        help="(default: half of the size's and all)",
    )
    for command in (step, memory):
        command.add_argument(
            "--nanogpt", dest="nanogpt_folder", type=Path, metavar="DIR", help="a clone to compare with"
        )
    startup = commands.add_parser("startup", help="seconds to the first training step in fresh processes")
    startup.add_argument("--runs", type=_count, default=3, help="processes a figure (default: 3)")
    decode = commands.add_parser("decode", help="tokens a second of text beside transformers")
    decode.add_argument("--rounds", type=_count, default=5, help="timings of each side (default: 5)")
    everything = commands.add_parser(
        "all", help="ops, step, memory, startup and decode: one record, its pictures; 3 minutes on a CPU"
    )
    for command in (step, memory, startup, decode, everything):
        command.add_argument(
            "--size", help=f"{', '.join(SIZE_NAMES)} (default: gpt2 on a GPU, tiny on a CPU)"
        )
    for command in (step, everything):
        command.add_argument("--batch", type=int, metavar="B", help="sequences (default: the size's)")
    for command in (step, memory, everything):
        command.add_argument("--dropout", type=float, default=0.0, metavar="P", help="(default: 0)")
    for command in (ops, step, memory, startup, decode, everything):
        command.add_argument("--device", dest="device_name", default="auto", help="auto, cpu, cuda, cuda:N")

    compare = commands.add_parser("compare", help="what moved from one record to another")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.add_argument(
        "--above",
        type=float,
        default=5.0,
        metavar="PERCENT",
        help="smaller changes are not shown (default: 5)",
    )
    readme = commands.add_parser(
        "readme", help="write README's table and docs' pictures from the newest results in bench/results"
    )
    readme.add_argument("results", type=Path, nargs="*", metavar="RESULT.json", help="these results instead")

    tiles = commands.add_parser(
        "tiles", help="sweep tile sizes on this GPU; prints rows for kernels/tiles.py"
    )
    tiles.add_argument(
        "--dtype", dest="dtype_name", default="bfloat16", choices=("bfloat16", "float16", "float32")
    )
    tiles.add_argument("--rounds", type=_count, default=10, help="timings of each candidate (default: 10)")
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
    for command in (ops, step, memory, startup, decode, everything):
        command.add_argument(
            "--out", type=Path, metavar="JSON", help="write the record there (all: build/bench)"
        )
        command.add_argument(
            "--pictures", type=Path, metavar="FOLDER", help="for its pictures (default: that of --out)"
        )
    gpu.add_argument("--out", type=Path, metavar="FOLDER", help="for the record (default: bench/results)")
    return parser


SIZE_NAMES = (
    "tiny",
    "small",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
)  # importing them would import torch

if __name__ == "__main__":
    sys.exit(main())
