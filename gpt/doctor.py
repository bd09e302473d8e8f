"""`gpt doctor`: versions, device and compilers, and a check of every operator against float64.

It works without a GPU and without Triton, and reports what they would need.
"""

import platform
from collections.abc import Iterator

import torch

from .. import __version__
from ..data.untrusted import printable
from ..kernels import _triton
from ..kernels.backend import missing_tools, requested
from ..kernels.selfcheck import (
    FIXED_PTXAS,
    FIXED_TRITON,
    Check,
    check_all,
    may_miscompile,
    may_race,
    ptxas_version,
)
from ..kernels.tiles import hardware
from .device import driver, find_gpu, pick_device
from .verdicts import read_verdicts


def examine(device_name: str = "auto") -> bool:
    """Print the facts of this machine and a check of every operator; returns whether all are right.

    Raises:
        ValueError: there is no such device here.
    """
    device = pick_device(device_name)
    for name, fact in facts(device):
        print(f"{name:<10}{printable(fact)}")
    print()
    checks = check_all(device)
    print("\n".join(table(checks)))
    wrong = [check.operator for check in checks if not check.ok]
    if wrong:
        print(
            f"\n{len(wrong)} of {len(checks)} operators fail here: {', '.join(wrong)}. Do not train with them; "
            "FUSEDGPT_BACKEND=torch runs everything in plain PyTorch."
        )
    else:
        print(f"\nall {len(checks)} operators are right")
    return not wrong


def facts(device: torch.device) -> Iterator[tuple[str, str]]:
    """Facts of the machine as (name, value), with what is missing or doubtful."""
    yield "fusedgpt", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    yield (
        "torch",
        f"{torch.__version__}, built for {toolkit if torch.version.hip or torch.version.cuda else 'CPUs'}",
    )
    compiled = device.type == "cuda" and not _triton.INTERPRETED
    architecture = hardware(device).architecture if compiled else "sm_90"  # whose ptxas matters most
    if _triton.MISSING is None:
        version, fixed = _triton.triton.__version__, ".".join(map(str, FIXED_TRITON))
        doubt = (
            f": can leave out barriers around matmuls on {architecture} (Triton issue 9871), which no check is sure to "
            f"notice; fixed in {fixed}, pip install --upgrade torch brings it"
        )
        yield (
            "triton",
            version
            + (", interpreted" if _triton.INTERPRETED else "")
            + (doubt if may_race(architecture, version) else ""),
        )
    else:
        yield "triton", f"none ({_triton.MISSING}): no fused kernels; pip install triton"

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield (
            "device",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {architecture}; driver {driver()}",
        )
    else:
        yield "device", f"{device}, {torch.get_num_threads()} threads"
        if lost := find_gpu()[1]:
            yield "GPU", f"LOST: {lost}"
        else:
            yield "GPU", "none"
    if (ptxas := ptxas_version(architecture)) is not None:
        fixed = ".".join(map(str, FIXED_PTXAS))
        doubt = (
            f": can miscompile matmuls on Hopper (Triton issue 9433), so the check below matters; fixed in {fixed}, "
            "TRITON_PTXAS_PATH names another"
        )
        yield (
            "ptxas",
            f"{ptxas} for {architecture}" + (doubt if may_miscompile(architecture, ptxas) else ""),
        )
    missing = missing_tools()
    yield (
        "launcher",
        "; ".join(missing) + ": a GPU needs it" if missing else "C compiler and Python headers are there",
    )
    yield "backend", requested()
    if _triton.MISSING is None:
        for example, fault in read_verdicts(device).items():
            if fault:
                yield "WRONG", f"when a run began: {example}: {fault}"


def table(checks: list[Check]) -> list[str]:
    """The lines of a table: operator, implementation, error, tolerance, verdict, and the reason for the implementation."""
    lines = [("operator", "runs in", "error", "allowed", "", "because")]
    for check in checks:
        runs_in = {"triton": "Triton", "torch": "PyTorch"}.get(check.backend, check.backend)
        error, allowed = f"{check.error:.1e}", f"{check.tolerance:.1e}"
        lines.append((check.operator, runs_in, error, allowed, "ok" if check.ok else "WRONG", check.reason))
    return ["{:<22}{:<9}{:>8}{:>9}  {:<7}{}".format(*line).rstrip() for line in lines]
