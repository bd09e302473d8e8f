"""Device and dtype of a run, with a warning if a GPU is present but unusable."""

import ctypes
import gc
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_gpu() -> tuple[bool, str | None]:
    """Whether torch can use a GPU and, if one is present but unusable, the reason and the remedy."""
    with warnings.catch_warnings(record=True) as caught:  # torch warns here if the driver is unusable
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return available, None if available else _lost_gpu([str(w.message) for w in caught])


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if one works and the CPU otherwise.

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


def total_memory(device: torch.device) -> int:
    """Bytes of memory that this process can have there: the GPU's, or the machine's within its cgroup's and ulimit's limits."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if (own := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(own)
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if not kinds:  # version 2
                root, name = Path("/sys/fs/cgroup"), "memory.max"
            elif "memory" in kinds.split(","):
                root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            else:
                continue
            folder = root / group.lstrip("/")
            for place in (folder, *folder.parents):  # a container may see its own group as the root
                with suppress(OSError, ValueError):  # not there, or "max"
                    limits.append(int((place / name).read_text()))
    return min(limits)


def require_memory(device: torch.device, need: int, what: str, remedy: str) -> None:
    """Refuse what cannot fit before any of it is allocated.

    Args:
        device: where.
        need: bytes.
        what: needs them, such as "a model of 12 layers".
        remedy: what to do.

    Raises:
        ValueError: the device has less memory in all.
    """
    if need > (total := total_memory(device)):
        name = "the GPU" if device.type == "cuda" else "this machine"
        raise ValueError(f"{what} needs {gib(need)} of memory, and {name} has {gib(total)}; {remedy}")


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _lost_gpu(messages: list[str]) -> str | None:
    """Why this torch cannot use a GPU that the driver lists; None if there is no GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    if listed.returncode or "GPU" not in listed.stdout:
        return None
    gpu = listed.stdout.splitlines()[0].split(" (")[0]
    if torch.version.cuda is None:
        return f"{gpu}; torch {torch.__version__} is a build for CPUs. Install a CUDA build: pip install --upgrade torch"
    unknown = f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot start it"
    reason = messages[0].splitlines()[0] if messages else unknown
    return f"{gpu}; {reason} Update the driver, or install a torch for its CUDA version"


def driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else "unknown"


def keep_freed_memory() -> None:
    """Keep the memory that a training step frees for the next step.

    glibc returns large blocks to the operating system, which clears every page again. Keeping them takes a step of 24 x 160
    tokens on two cores from 104 ms to 74. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: blocks up to 32 MiB, its maximum, come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is never trimmed
        mallopt(-2, 64 << 20)  # M_TOP_PAD: the heap grows by 64 MiB at a time


@contextmanager
def settled_heap() -> Iterator[None]:
    """Exclude present objects from garbage collection: 0.3 million, and each pass over them takes a third of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
