"""A trace of a few steady steps, and its summary by operator (`--profile`)."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_WARM_UP, _TRACED = 5, 3  # steps; by then a GPU has compiled and captured


class Trace:
    """Records some of a run's steps into `trace.json.gz` in a folder; ui.perfetto.dev opens it.

    In a shorter run the trace starts earlier.
    """

    def __init__(self, folder: Path, device: torch.device, steps: int) -> None:
        self.file, self.device = folder / "trace.json.gz", device.type
        self.table = ""
        traced = min(_TRACED, steps)
        self.begin = min(_WARM_UP, steps - traced)
        self.end = self.begin + traced
        self.steps = -1
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profile = profile(activities=activities)
        self.step()

    def step(self) -> None:
        """A training step has ended."""
        self.steps += 1
        if self.steps == self.begin:
            self.profile.start()
        if self.steps == self.end:
            self.profile.stop()
            self.profile.export_chrome_trace(str(self.file))
            self.table = self.profile.key_averages().table(
                sort_by=f"self_{self.device}_time_total", row_limit=20, max_name_column_width=60
            )

    def summary(self) -> str:
        """The time of each operator, and where the trace is."""
        if not self.table:
            return "no trace: the run was interrupted before the steps to trace"
        steps = f"{self.begin + 1} to {self.end}"
        return f"\n{self.table}\ntrace of steps {steps} of this run: {self.file}, for ui.perfetto.dev"
