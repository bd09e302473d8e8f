"""Which device and dtype a run computes on, and a loud word where a GPU is present but cannot be used."""

import ctypes
import gc
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_gpu() -> tuple[bool, str | None]:
    """Whether torch can use a GPU and, where one is present that it cannot use, why, with the remedy."""
    with warnings.catch_warnings(record=True) as said:  # torch says here why a driver does not serve
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return available, None if available else _lost_gpu([str(w.message) for w in said])


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where one works and the CPU otherwise.

    A GPU that is present but unusable is reported on stderr, with the remedy.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        available, lost = find_gpu()
        if lost:
            print(f"warning: this machine has a GPU that is not used: {lost}", file=sys.stderr)
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"device {name!r} is none that torch knows; take auto, cpu, cuda or cuda:N"
        ) from None
    if device.type == "cuda":
        available, lost = find_gpu()
        found = torch.cuda.device_count() if available else 0
        if (device.index or 0) >= found:
            why = lost or f"torch finds {found} CUDA devices here"
            raise ValueError(f"device {name!r} cannot be used: {why}; --device auto takes what there is")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The activations' dtype; "auto" is bfloat16 on a GPU that has it (else float16), and float32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _lost_gpu(said: list[str]) -> str | None:
    """Why a GPU that the driver lists cannot be used from this torch, or None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    if listed.returncode or "GPU" not in listed.stdout:
        return None
    gpu = listed.stdout.splitlines()[0].split(" (")[0]
    if torch.version.cuda is None:
        return f"{gpu}; torch {torch.__version__} is a build for CPUs. Install a CUDA build: pip install --upgrade torch"
    reason = (
        said[0].splitlines()[0]
        if said
        else f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot start it"
    )
    return f"{gpu}; {reason} Update the driver, or install a torch for its CUDA version"


def keep_freed_memory() -> None:
    """Let the process keep the memory that a training step frees, for the next step.

    glibc gives large blocks back to the kernel, which then clears every page of them again: on two cores a step of
    24 x 160 tokens takes 74 ms instead of 104. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: blocks up to 32 MiB, the most it takes, come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose free end stays
        mallopt(-2, 64 << 20)  # M_TOP_PAD: and which grows by 64 MiB at a time


@contextmanager
def settled_heap() -> Iterator[None]:
    """Spare the garbage collector what is there now: 0.3 million objects, each walk through them a third of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
