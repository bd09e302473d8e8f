"""Timing: implementations take turns, medians, device events; and the GPU to time on."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ..gpt.device import find_gpu
from ..kernels import _triton
from ..kernels.backend import unusable

Call = Callable[[int], object]  # does the work once, on the inputs of that number

_BURST = 5  # rounds that are queued on a device at once
# clock cycles, about 10 ms, in which the host queues a burst: the device never waits for a launch
_HEAD_START = 20_000_000


def medians(calls: Sequence[Call], device: torch.device, rounds: int, warm_up: int = 3) -> list[float]:
    """The median time of each call in milliseconds.

    They take turns, so a drift of the machine's speed favours none. Another one begins each round, and none gets the inputs
    that the call before has just left in the caches.
    """
    samples: list[list[float]] = [[] for _ in calls]
    for i in range(warm_up):
        for call in calls:
            call(i)
    if device.type != "cuda":
        for i in range(rounds):
            for turn in _turns(i, len(calls)):
                start = time.perf_counter()
                calls[turn](i + turn)
                samples[turn].append(1e3 * (time.perf_counter() - start))
        return [statistics.median(times) for times in samples]

    with torch.cuda.device(device):
        for first in range(0, rounds, _BURST):
            torch.cuda.synchronize()
            torch.cuda._sleep(_HEAD_START)
            marks = []
            for i in range(first, min(first + _BURST, rounds)):
                for turn in _turns(i, len(calls)):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    calls[turn](i + turn)
                    end.record()
                    marks.append((samples[turn], begin, end))
            torch.cuda.synchronize()
            for times, begin, end in marks:
                times.append(begin.elapsed_time(end))
    return [statistics.median(times) for times in samples]


def _turns(i: int, calls: int) -> list[int]:
    return [(i + turn) % calls for turn in range(calls)]


def failure(error: BaseException) -> str:
    """Why an implementation has no figures, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of copying a tensor far larger than the caches."""
    size = min(2**30, memory(device) // 8) if device.type == "cuda" else 2**26
    tensors = [torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(2)]
    (milliseconds,) = medians([lambda _: tensors[0].copy_(tensors[1])], device, 20)
    return 2 * size / milliseconds * 1e3


def matmul_rate(device: torch.device) -> float:
    """FLOPs a second of a large square matmul: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    (milliseconds,) = medians([lambda _: torch.mm(a, b)], device, 20)
    return 2 * size**3 / milliseconds * 1e3


def memory(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def full_rows(device: torch.device) -> int:
    """Rows of a full-size test: GPT-2's 64 x 1024 tokens, or an eighth of that on a small GPU."""
    return 65536 if memory(device) >= 40 * 2**30 else 8192


def require_gpu() -> torch.device:
    """The GPU to measure on.

    Raises:
        ValueError: there is none that Triton's kernels can run on; the message says why.
    """
    available, lost = find_gpu()
    if not available:
        raise ValueError(f"this needs a GPU: {lost or 'there is none here'}")
    if _triton.MISSING is not None:
        raise ValueError(f"this needs Triton: {_triton.MISSING}")
    if _triton.INTERPRETED:
        raise ValueError("this needs compiled kernels; unset TRITON_INTERPRET")
    device = torch.device("cuda", torch.cuda.current_device())
    if obstacle := unusable(device):
        raise ValueError(f"this needs a GPU that Triton kernels run on: {obstacle}")
    return device
