"""Durable writes: what fails leaves what was there, and a record is whole or absent."""

import errno
import os

import pytest

from fusedgpt.data import files
from fusedgpt.data.files import AppendedFile, make_folder, new_folder, remove_folder, replacing, write_file
from fusedgpt.data.untrusted import InputError


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_fails_leaves_the_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "config.toml"
    write_file(file, "one")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_file(file, "two")
    assert caught.value.filename == str(file)
    assert file.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_the_file_appears_only_when_it_is_whole(tmp_path):
    file = tmp_path / "big.bin"
    with replacing(file) as out:
        out.write(b"part")
        out.flush()
        assert not file.exists()
    assert file.read_bytes() == b"part"


def test_file_and_folder_are_flushed_in_order(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")))
    rename = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
    write_file(tmp_path / "a", "x")
    assert [event.rpartition("/")[2] for event in events] == [
        f".a.{os.getpid()}.tmp",
        "rename",
        tmp_path.name,
    ]
    events.clear()
    with new_folder(tmp_path / "new" / "run") as folder:
        (folder / "config.toml").write_text("x")
        assert not (tmp_path / "new" / "run").exists()
    assert [event.rpartition("/")[2] for event in events[-4:]] == [
        "config.toml",
        f".run.{os.getpid()}.tmp",
        "rename",
        "new",
    ]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    with new_folder(tmp_path / "run") as folder:  # an empty one is taken
        (folder / "a").write_text("x")
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "a").read_text() == "x"


def test_a_removed_folder_is_never_half_there(tmp_path, monkeypatch):
    folder = tmp_path / "step-000001"
    make_folder(folder / "deep")
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # killed after the rename
    remove_folder(folder)
    assert not folder.exists()


def test_a_record_is_whole_or_absent(tmp_path, monkeypatch):
    log = AppendedFile(tmp_path / "metrics.jsonl")
    log.append("one\n")

    class Short:
        """Writes three bytes at a time, and fails at the third write."""

        def __init__(self, file, fails):
            self.file, self.calls, self.fails = file, 0, fails

        def write(self, data):
            self.calls += 1
            if self.fails and self.calls == 3:
                full()
            return self.file.write(data[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    whole = log._file
    log._file = Short(whole, fails=True)
    with pytest.raises(OSError, match="No space left") as caught:
        log.append("a long record\n")
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    log._file = Short(whole, fails=False)
    log.append("a long record\n")
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "one\na long record\n"
    kept = AppendedFile(tmp_path / "metrics.jsonl")
    kept.cut(4)
    kept.append("two\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\n"


def test_records_go_into_a_file_only(tmp_path):
    """Opening a pipe would wait for a reader, for good."""
    os.mkfifo(tmp_path / "samples.txt")
    reader = os.open(tmp_path / "samples.txt", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(InputError, match=r"samples\.txt: it is no regular file"):
        AppendedFile(tmp_path / "samples.txt")
    os.close(reader)
    with pytest.raises(InputError, match="it is no regular file"):
        AppendedFile(tmp_path)


def test_nothing_is_written_through_a_symbolic_link(tmp_path):
    """A run folder of a stranger can hold a link to any file of the user."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    link = tmp_path / "metrics.jsonl"
    link.symlink_to(precious)
    with pytest.raises(InputError, match=r"metrics\.jsonl: it is a symbolic link"):
        AppendedFile(link)
    unfinished = tmp_path / f".state.json.{os.getpid()}.tmp"
    unfinished.symlink_to(precious)
    with pytest.raises(InputError, match="it is a symbolic link"):
        write_file(tmp_path / "state.json", "theirs")
    write_file(link, "{}")  # takes the place of the link
    assert (precious.read_text(), link.read_text(), link.is_symlink()) == ("mine", "{}", False)
