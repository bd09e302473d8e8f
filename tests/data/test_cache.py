"""Where the cache is, and what happens without one."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusedgpt.data import cache
from fusedgpt.data.cache import cache_dir, cached, identity, remembered, writable_cache
from fusedgpt.data.untrusted import InputError


@dataclass
class Size:
    size: int


@pytest.fixture(autouse=True)
def fresh():
    cache._temporary.cache_clear()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == writable_cache() == tmp_path / "cache"
    monkeypatch.delenv("FUSEDGPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/fusedgpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_dir() == Path("/h/.cache/fusedgpt")


def test_a_cache_that_cannot_be_written_is_read_and_a_temporary_one_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path))
    (tmp_path / "there").write_text("x")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    assert cached("there") == tmp_path / "there"
    folder = writable_cache()
    assert folder == writable_cache() == cached("new").parent != tmp_path
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1  # once
    assert f"the cache {tmp_path} cannot be written (Permission denied); {folder} takes its place" in warning
    assert "Set FUSEDGPT_CACHE" in warning


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        (
            {"FUSEDGPT_CACHE": "/dev/null/cache"},
            "the cache /dev/null/cache cannot be written (Not a directory)",
        ),
        (
            {"FUSEDGPT_CACHE": "/proc/cache"},
            "the cache /proc/cache cannot be written (No such file or directory)",
        ),
        ({"FUSEDGPT_CACHE": "~nobody-of-this-name/cache"}, "there is no home folder for the cache"),
        ({"FUSEDGPT_CACHE": "/" + "x" * 300}, "cannot be written (File name too long)"),
    ],
)
def test_without_a_cache_there_is_a_warning_and_nothing_is_left(tmp_path, variables, why):
    code = (
        "import fusedgpt.data.corpus as c, fusedgpt.data.cache as k, pathlib\n"
        "pathlib.Path('a.txt').write_text('some text')\n"
        "k.SETTLED = 0\n"
        "assert c.open_corpus('a.txt').fingerprint == c.open_corpus('a.txt').fingerprint\n"
        "print(k.writable_cache(), len(list(k.writable_cache().rglob('*.json'))))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert why in done.stderr
    folder, notes = done.stdout.split()
    assert Path(folder).parent == tmp_path
    assert notes == "1"  # it works as the cache does
    assert os.listdir(tmp_path) == ["a.txt"]


def test_without_any_folder_the_error_says_what_to_set(monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", "/dev/null/cache")
    monkeypatch.setattr(cache.tempfile, "tempdir", "/dev/null/tmp")
    with pytest.raises(InputError, match="and neither can this folder; set FUSEDGPT_CACHE to a folder"):
        writable_cache()


def test_without_a_home_there_is_a_warning(monkeypatch, capsys):
    for name in ("FUSEDGPT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # the system knows no home of this user
    assert cache_dir() == cache_dir() == writable_cache()
    assert capsys.readouterr().err.count("there is no home folder") == 1


def test_what_is_remembered_holds_until_a_file_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SETTLED", 0)
    file, scans = tmp_path / "a", []

    def scan():
        scans.append(1)
        return Size(file.stat().st_size)

    def look():
        return remembered(Size, [identity(file, file.stat())], scan)

    file.write_bytes(b"12")
    assert look() == look() == Size(2)
    assert len(scans) == 1
    os.utime(file, ns=(10**18, 10**18))
    assert look() == Size(2)
    assert len(scans) == 2
    file.unlink()
    file.write_bytes(b"34")
    os.utime(file, ns=(10**18, 10**18))  # another file of that name, size and time
    assert look() == look()
    assert len(scans) == 3


def test_a_full_disk_only_forgets(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SETTLED", 0)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "write_file", full)
    assert remembered(Size, [identity(tmp_path, tmp_path.stat())], lambda: Size(3)) == Size(3)
