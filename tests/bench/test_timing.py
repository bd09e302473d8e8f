"""Sides take turns, each gets its own median, and on a device the time is that between its events."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fusedgpt.bench.timing import copy_bandwidth, medians, require_gpu
from fusedgpt.kernels import _triton

CPU = torch.device("cpu")


def test_sides_take_turns_to_begin_and_none_gets_the_inputs_of_the_one_before() -> None:
    seen: list[tuple[str, int]] = []
    calls = [lambda i: seen.append(("a", i)), lambda i: seen.append(("b", i))]
    medians(calls, CPU, rounds=2, warm_up=1)
    assert seen[2:] == [("a", 0), ("b", 1), ("b", 2), ("a", 1)]


def test_medians_in_milliseconds() -> None:
    outlier = iter([0, 0, 0, 0.001, 0.001, 0.03])
    fast, slow = medians([lambda _: time.sleep(next(outlier)), lambda _: time.sleep(0.01)], CPU, rounds=3)
    assert 1 <= fast < 8
    assert 10 <= slow < 20


def test_on_a_device_the_events_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    slept: list[int] = []
    fake = {"Event": Event, "synchronize": lambda: None, "_sleep": slept.append, "device": nullcontext}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def work(milliseconds: float):
        return lambda i: clock.__setitem__(0, clock[0] + milliseconds)

    device = SimpleNamespace(type="cuda")
    assert medians([work(3.0), work(0.5)], device, rounds=7) == [3.0, 0.5]
    assert len(slept) == 2, "a head start before each burst"


def test_a_copy_moves_gigabytes_a_second() -> None:
    assert 1e8 < copy_bandwidth(CPU) < 1e13


@pytest.mark.parametrize(
    ("available", "missing", "interpreted", "obstacle", "said"),
    [
        (False, None, False, None, "there is none here"),
        (True, "No module named 'triton'", False, None, "needs Triton: No module"),
        (True, None, True, None, "unset TRITON_INTERPRET"),
        (True, None, False, "too old", "that Triton kernels run on: too old"),
    ],
)
def test_without_a_gpu_for_kernels_the_reason_is_said(
    available: bool,
    missing: str | None,
    interpreted: bool,
    obstacle: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_triton, "MISSING", missing)
    monkeypatch.setattr(_triton, "INTERPRETED", interpreted)
    monkeypatch.setattr("fusedgpt.bench.timing.unusable", lambda device: obstacle)
    with pytest.raises(ValueError, match=said):
        require_gpu()
