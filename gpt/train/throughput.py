"""Throughput, model FLOPs utilisation and peak memory of a run."""

import resource
import time

import torch

from ..config import ModelConfig

# Dense bf16 peaks in FLOP/s, from the vendors' datasheets. The longest key contained in the device's name applies.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


class Speedometer:
    """Tokens per second and model FLOPs utilisation (MFU) since the last reading, without pauses.

    MFU = (6 N + 12 L C T) · tokens/s over the device's dense bf16 peak (Chowdhery et al., 2022, appendix B), N being
    the parameters without position embeddings. A device that is not in PEAK_FLOPS has no MFU.
    """

    def __init__(self, model: ModelConfig, parameters: int, device: torch.device, step: int = 0) -> None:
        self.device, self._step = device, step
        self.flops_per_token = 6 * parameters + 12 * model.n_layer * model.n_embd * model.context_length
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        matching = [key for key in PEAK_FLOPS if key in name]
        self.peak = PEAK_FLOPS[max(matching, key=len)] if matching else None
        self.start()

    def start(self) -> None:
        self._start, self._paused = time.perf_counter(), 0.0

    def pause(self, seconds: float) -> None:
        """Exclude these seconds (of an evaluation, a checkpoint) from the throughput."""
        self._paused += seconds

    def read(self, step: int, tokens_a_step: int) -> dict[str, float]:
        """The throughput of the steps since the last reading, up to `step`."""
        seconds = time.perf_counter() - self._start - self._paused
        steps, self._step = step - self._step, step
        self.start()
        record = {
            "tokens_per_second": steps * tokens_a_step / seconds,
            "seconds_per_step": seconds
            / max(steps, 1),  # none, where a resumed run writes the line that failed
        }
        if self.peak:
            record["mfu"] = self.flops_per_token * record["tokens_per_second"] / self.peak
        return record


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
