"""The counts that our kernels are held to: a committed file, and what is worse than in it.

Counted at a few tokens a sequence, where all kernels of a training step are launched as at full size and their loops are short. Counts are the same
on every machine, but not of every compiler: the file has them for the Triton that it names, with the ptxas in it.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from ..emulator.run import processes, workers
from .bounds import of_work
from .measure import cases, measure
from .rates import GPUS
from .work import Work

TRITON = f"Triton {version('triton')}"
FILE = Path(__file__).with_name("kernels.json")
SIZE = {"batch": 64, "length": 128}
ALLOWED = 1.03  # of the committed figure
FEWER_IS_WORSE = ("resident", "in_flight")
GPU_OF = {"sm_80": GPUS["A100"], "sm_90": GPUS["H100"]}

Counts = dict[str, dict[str, float]]  # kernel: figure: value


def figures(work: Work, architecture: str) -> dict[str, float]:
    """What a launch is held to."""
    found: dict[str, float] = {
        "instructions": work.issued,
        "special": work.special,
        "tensor_flops": work.tensor_flops,
        "sectors": work.sectors,
        "dram_bytes": work.dram_read + work.dram_written,
        "shared_wavefronts": work.shared_wavefronts + work.matrix_shared_bytes / 128,
        "bank_conflicts": work.shared_wavefronts - work.shared_at_best,
        "barriers": work.barriers,
        "in_flight": work.in_flight,
        "registers": work.registers,
        "spilled": work.spilled,
        "resident": of_work(GPU_OF[architecture], work).programs,
    }
    return {name: round(value) for name, value in found.items()}


def count(architecture: str, names: Sequence[str] = ()) -> Counts:
    """The figures of every launch of the operators, by default of all.

    names: of operators.
    """
    found: Counts = {}
    for case in cases(**SIZE):
        if names and case.example.operator not in names:
            continue
        for measured in measure(case, architecture):
            for work in measured.works:
                name = f"{measured.name}, {measured.direction}: {work.kernel}"
                again = sum(other.partition(" #")[0] == name for other in found)
                found[f"{name} #{again + 1}" if again else name] = figures(work, architecture)
    return found


def committed(architecture: str) -> Counts | None:
    """The figures to hold to; None where the file has none of this Triton."""
    return _of_this_triton().get(architecture)


def worse(before: Counts, now: Counts) -> Iterator[str]:
    """What is worse than before by more than is allowed, and what does not correspond: a line each, with kernel and figure."""
    yield from (f"{kernel} is not launched any more" for kernel in before if kernel not in now)
    for kernel, counted in now.items():
        if kernel not in before:
            yield f"{kernel} is new"
            continue
        for figure, value in counted.items():
            old = before[kernel][figure]
            least, most = sorted((old, value))
            if most > ALLOWED * least and (value < old) == (figure in FEWER_IS_WORSE):
                yield f"{kernel}: {figure} {_change(old, value)}"


def _change(old: float, value: float) -> str:
    return f"{old:,} -> {value:,}" + (f" ({value / old - 1:+.1%})" if old else "")


def accept(names: Sequence[str], architectures: Sequence[str]) -> None:
    """Count the operators, write their figures into the file in place of another Triton's, and print what changed.

    names: of operators, by default all.
    """
    kept = _of_this_triton()
    with processes(workers()) as pool:
        counted = list(pool.map(count, architectures, [names] * len(architectures)))
    for architecture, now in zip(architectures, counted, strict=True):
        before = kept.get(architecture, {})
        others = {k: v for k, v in before.items() if names and k.partition(",")[0] not in names}
        kept[architecture] = others | now
        for kernel, found in now.items():
            for figure, value in found.items():
                if kernel in before and value != (old := before[kernel][figure]):
                    print(f"{architecture} {kernel}: {figure} {_change(old, value)}")
        print(f"{architecture}: {len(now)} launches")
    FILE.write_text(json.dumps({TRITON: kept}, indent=1) + "\n")
    print(FILE)


def _of_this_triton() -> dict[str, Counts]:
    """By architecture."""
    return json.loads(FILE.read_text()).get(TRITON, {}) if FILE.exists() else {}
