"""`python -m fusedgpt.bench step | ops | ... | all | counts | data | compare | readme | tiles | gpu | kernels-report | emulate | saving | soak`:
the bench suite's command line.

argparse, not tyro as in `gpt`: `gpu` has to run on machines where nothing can be installed.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .counts.rates import GPUS

# `python -m` in a clone puts the clone on the path, where transformers' `import kernels` would find ours
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parents[1]]

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
COUNTED = ("sm_80", "sm_90")
EMULATED = ("sm_80", "sm_90", "sm_86", "sm_89", "sm_120")
MODES = ("early", "late", "random")
SIZE_NAMES = (
    "tiny",
    "small",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
)  # importing these imports torch
# imported when they run, so that the help is there at once and a benchmark needs no more than its own libraries
FUNCTIONS = {
    "ops": (".ops.run", "run_ops"),
    "counts": (".counts.run", "run_counts"),
    "data": (".data", "run_data"),
    "compare": (".compare", "run_compare"),
    "readme": (".readme", "run_readme"),
    "tiles": (".tiles.sweep", "run_tiles"),
    "gpu": (".gpu.run", "run_gpu"),
    "kernels-report": (".gpu.kernels_report", "run_kernels_report"),
    "emulate": (".emulator.run", "run_emulate"),
    "soak": (".soak.run", "run_soak"),
    "saving": (".step.saving", "run_saving"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark in `argv` and return the exit code: 1 where something computes the wrong thing, 2 for a mistake."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    try:
        if command not in FUNCTIONS:
            _run_on_workload(command, options)
            return 0
        module, function = FUNCTIONS[command]
        result = getattr(importlib.import_module(module, __package__), function)(**options)
        return result if command in ("gpu", "kernels-report", "emulate", "soak") else 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run_on_workload(command: str, options: dict[str, Any]) -> None:
    from .step.sizes import full_workload, workload
    from .suite import run_all, run_measurement

    if options.pop("bytes", False):
        sizes = {name: options.pop(name) for name in ("size", "batch", "dropout")}
        return run_measurement("bytes", full_workload(**sizes), options["out"], options["pictures"])
    names = ("size", "device_name", "dropout", "batch")
    work = workload(**{name: options.pop(name) for name in names if name in options})
    if command == "all":
        return run_all(work, **options)
    if options.pop("breakdown", False):
        command = "breakdown"
        if options.pop("nanogpt_folder") is not None:
            raise ValueError("--breakdown shows our step alone; leave --nanogpt out")
    run_measurement(command, work, **options)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it takes a whole number from 1 up")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    description = "What is faster, by how much, on this machine."
    parser = argparse.ArgumentParser(prog="python -m fusedgpt.bench", description=description)
    names = "ops | step | memory | startup | decode | all | counts | data | compare | readme | tiles | gpu | kernels-report | emulate | saving | soak"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    ops = commands.add_parser("ops", help="operators beside others: time, memory, share of the limit")
    ops.add_argument("names", nargs="*", metavar="NAME", help="operators, such as attention (default: all)")
    ops.add_argument("--rounds", type=_count, default=30, help="timings of each (default: 30)")

    step = commands.add_parser(
        "step", help="a training step beside torch.compile, transformers' GPT-2 and nanoGPT"
    )
    step.add_argument("--breakdown", action="store_true", help="instead: the time of every part of our step")
    step.add_argument(
        "--bytes",
        action="store_true",
        help="instead: the bytes that every part of our step moves on a GPU, counted without one",
    )
    step.add_argument("--rounds", type=_count, default=40, help="turns of each (default: 40)")
    memory = commands.add_parser("memory", help="the step's peak memory, and the budget of ours")
    batches = "(default: half of the size's and all of it)"
    memory.add_argument("--batches", type=_count, nargs="+", metavar="B", default=(), help=batches)
    for command in (step, memory):
        command.add_argument(
            "--nanogpt", dest="nanogpt_folder", type=Path, metavar="DIR", help="a clone to compare with"
        )
    startup = commands.add_parser("startup", help="seconds to the first training step in fresh processes")
    startup.add_argument("--runs", type=_count, default=3, help="processes a figure (default: 3)")
    decode = commands.add_parser("decode", help="tokens a second of generated text beside transformers")
    decode.add_argument("--rounds", type=_count, default=5, help="timings of each (default: 5)")
    everything = commands.add_parser(
        "all", help="ops, step, memory, startup and decode: one record, its pictures; 3 minutes on a CPU"
    )
    sizes = f"{', '.join(SIZE_NAMES)} (default: gpt2 on a GPU, tiny on a CPU)"
    for command in (step, memory, startup, decode, everything):
        command.add_argument("--size", help=sizes)
    for command in (step, everything):
        command.add_argument("--batch", type=int, metavar="B", help="sequences (default: the size's)")
    for command in (step, memory, everything):
        command.add_argument("--dropout", type=float, default=0.0, metavar="P", help="(default: 0)")
    counts = commands.add_parser(
        "counts",
        help="what the compiled kernels execute and move beside others', and the bounds of it; needs no GPU",
    )
    counts.add_argument(
        "names", nargs="*", metavar="NAME", help="operators, such as attention (default: all)"
    )
    counts.add_argument(
        "--architecture",
        dest="architectures",
        nargs="+",
        choices=COUNTED,
        default=(),
        help="(default: those of the GPUs)",
    )
    counts.add_argument(
        "--gpu", dest="gpus", nargs="+", choices=GPUS, default=tuple(GPUS), help="whose bounds (default: all)"
    )
    counts.add_argument(
        "--clones",
        type=Path,
        metavar="DIR",
        help="a folder with clones of triton and flash-attention, to count their kernels too",
    )
    counts.add_argument(
        "--accept", action="store_true", help="instead: write the counts that tests hold our kernels to"
    )
    for command in (ops, step, memory, startup, decode, everything):
        command.add_argument("--device", dest="device_name", default="auto", help="auto, cpu, cuda, cuda:N")
    for command in (ops, step, memory, startup, decode, everything, counts):
        command.add_argument(
            "--out", type=Path, metavar="JSON", help="write the record there (all: build/bench)"
        )
        command.add_argument(
            "--pictures", type=Path, metavar="FOLDER", help="for its pictures (default: that of --out)"
        )

    data = commands.add_parser(
        "data", help="training of BPE beside tokenizers, and GPT-2 encoding beside tiktoken"
    )
    made = "files, folders, tales:N, or languages:N for N MB made here (default: tales:20000 languages:2 languages:10)"
    data.add_argument("sources", nargs="*", metavar="TEXT", help=made)
    data.add_argument(
        "--vocab-sizes",
        type=_count,
        nargs="+",
        metavar="V",
        default=(4096, 32768),
        help="(default: 4096 32768)",
    )
    data.add_argument("--rounds", type=_count, default=3, help="turns of each (default: 3)")
    data.add_argument("--out", type=Path, metavar="JSON", help="write the record there")

    compare = commands.add_parser("compare", help="what moved from one record to another")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    above = "smaller changes are counted, not shown (default: 5)"
    compare.add_argument("--above", type=float, default=5.0, metavar="PERCENT", help=above)
    readme = commands.add_parser(
        "readme",
        help="write the tables of README.md and docs, and the pictures, from bench/results",
    )
    readme.add_argument("results", type=Path, nargs="*", metavar="RESULT.json", help="these results instead")

    tiles = commands.add_parser(
        "tiles", help="sweep tile sizes on this GPU; prints rows for kernels/tiles.py"
    )
    dtypes = ("bfloat16", "float16", "float32")
    tiles.add_argument("--dtype", dest="dtype_name", default="bfloat16", choices=dtypes)
    tiles.add_argument("--rounds", type=_count, default=10, help="timings of each candidate (default: 10)")
    tiles.add_argument("--seconds", type=float, default=500, help="to spend in all (default: 500)")
    tiles.add_argument("--rows", type=int, metavar="M", help="(default: 65536)")
    widths = (768, 1024, 1280, 1600)
    tiles.add_argument(
        "--widths", type=int, nargs="+", metavar="C", default=widths, help="(default: those of GPT-2)"
    )

    gpu = commands.add_parser("gpu", help="everything that needs a GPU, within eight minutes")
    gpu.add_argument("--out", type=Path, metavar="FOLDER", help="for the record (default: bench/results)")

    report = commands.add_parser(
        "kernels-report", help="registers, spills and shared memory of every kernel, compiled without a GPU"
    )
    report.add_argument(
        "--json", dest="json_file", type=Path, metavar="FILE", help="write the rows there too"
    )
    report.add_argument(
        "--architecture",
        dest="architectures",
        nargs="+",
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        help="(default: all four)",
    )
    report.add_argument("--kernel", dest="word", default="", help="only those whose name contains this")

    emulate = commands.add_parser(
        "emulate", help="run the compiled kernels of every operator in the PTX emulator; needs no GPU"
    )
    for name, choices in (("architecture", EMULATED), ("mode", MODES)):
        emulate.add_argument(
            f"--{name}", dest=f"{name}s", nargs="+", choices=choices, default=choices, help="(default: all)"
        )
    emulate.add_argument("--operator", dest="word", default="", help="only checks whose name contains this")
    emulate.add_argument(
        "--mutations",
        type=_count,
        default=0,
        metavar="N",
        help="instead: break the PTX, N times for each kernel and kind of fault, and count what is noticed",
    )

    saving = commands.add_parser("saving", help="the throughput that a training run loses to its checkpoints")
    saving.add_argument(
        "sizes", nargs="*", default=("tiny", "small"), metavar="SIZE", help="(default: tiny small)"
    )
    saving.add_argument(
        "--rounds", type=_count, default=20, help="blocks of steps of each kind (default: 20)"
    )
    saving.add_argument("--device", dest="device_name", default="auto", help="auto, cpu, cuda, cuda:N")
    saving.add_argument("--out", type=Path, metavar="JSON", help="write the record there")

    soak = commands.add_parser(
        "soak", help="what a run survives: kill -9, faults, mutated files; half an hour on two cores"
    )
    soak.add_argument("--minutes", type=float, default=30.0, metavar="M", help="in all (default: 30)")
    soak.add_argument("--only", choices=("kills", "faults", "fuzz"), help="one part")
    soak.add_argument("--seed", type=int, default=0, help="of moments and mutations (default: 0)")
    soak.add_argument("--inputs", type=_count, help="mutated inputs (default: 200,000 in 30 minutes)")
    one = "instead: show what comes of one mutated input"
    soak.add_argument("--replay", metavar="TARGET:NUMBER", help=one)
    record = "write the record there (default: bench/results/soak-DATE.json, with --only none)"
    soak.add_argument("--out", type=Path, metavar="JSON", help=record)
    return parser


if __name__ == "__main__":
    sys.exit(main())
