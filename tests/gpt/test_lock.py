"""The lock of a run folder: one process at a time, released however its owner ends."""

import os
import signal
from pathlib import Path

import pytest

from fusedgpt.data.untrusted import InputError
from fusedgpt.gpt.lock import lock_run


def child_with_lock(run: Path) -> int:
    """A process that holds the lock until it is killed."""
    here, there = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with lock_run(run):
                os.write(there, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(there)
    assert os.read(here, 1) == b"x"
    os.close(here)
    return pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_second_process_is_refused_until_the_first_has_ended(tmp_path: Path, number: int) -> None:
    pid = child_with_lock(tmp_path)
    with pytest.raises(InputError, match=f"process {pid} on .* is training in it"), lock_run(tmp_path):
        pytest.fail("there are two")
    os.kill(pid, number)
    os.waitpid(pid, 0)
    with lock_run(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with lock_run(tmp_path):
        pass


def test_what_the_lock_says_is_printable(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        (tmp_path / ".lock").write_bytes(b"\x1b[2J\xff" * 1000)
        with pytest.raises(InputError) as caught, lock_run(tmp_path):
            pass
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 400


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(InputError, match=r"\.lock: it is a symbolic link"), lock_run(tmp_path):
        pytest.fail("it is written")
    assert precious.read_text() == "mine"
