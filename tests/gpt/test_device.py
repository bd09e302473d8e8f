"""How much memory there is: the machine's, within the limits of cgroup and ulimit."""

import resource
from pathlib import Path

import pytest
import torch

from fusedgpt.gpt import device

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file system in which there is no cgroup yet."""
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_limits_it_is_the_machines(root: Path) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    machine = int(next(line.split()[1] for line in lines if line.startswith("MemTotal"))) << 10
    assert device.total_memory(CPU) == machine
    write(root / "proc/self/cgroup", "0::/a/b\n")
    write(root / "sys/fs/cgroup/a/b/memory.max", "max\n")
    assert device.total_memory(CPU) == machine


@pytest.mark.parametrize("place", ["a/b", "a", "."])
def test_the_smallest_limit_of_a_cgroup_and_those_above_it_counts(root: Path, place: str) -> None:
    write(root / "proc/self/cgroup", "3:cpuset:/\n0::/a/b\n")
    write(root / "sys/fs/cgroup" / place / "memory.max", "70000000\n")
    assert device.total_memory(CPU) == 70_000_000


def test_the_first_version_of_cgroups_has_another_file(root: Path) -> None:
    write(root / "proc/self/cgroup", "4:cpu,memory:/job\n")
    write(root / "sys/fs/cgroup/memory/job/memory.limit_in_bytes", "60000000\n")
    write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert device.total_memory(CPU) == 60_000_000


def test_ulimit_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (50_000_000, resource.RLIM_INFINITY))
    assert device.total_memory(CPU) == 50_000_000


def test_what_needs_more_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "total_memory", lambda _: 3 << 30)
    device.require_memory(CPU, 3 << 30, "a model", "")
    with pytest.raises(
        ValueError, match=r"a model needs 4\.0 GiB of memory, and this machine has 3\.0 GiB; buy more"
    ):
        device.require_memory(CPU, 4 << 30, "a model", "buy more")
