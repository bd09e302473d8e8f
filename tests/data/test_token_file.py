"""One shard against bytes built by hand, damaged in every way, and changed in every way while it is in use."""

import hashlib
import os
import struct
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fusedgpt.data import cache, token_file
from fusedgpt.data.loader import TokenLoader
from fusedgpt.data.token_file import Content, check_range, open_shard, write_shards
from fusedgpt.data.untrusted import InputError
from fusedgpt.data.windows import EvalWindows, WindowDataset


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_hand(tokens: list[int], magic=20240520, version=1, count=None, order="<") -> bytes:
    """A shard as llm.c writes it, by struct alone."""
    header = struct.pack(f"{order}256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + struct.pack(f"{order}{len(tokens)}H", *tokens)


def joined(paths) -> list[int]:
    return np.concatenate([open_shard(path)[:] for path in paths]).tolist()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_shard_is_read_as_llm_c_writes_it(tmp_path):
    tokens = [50256, 0, 1, 65535, 300]
    (tmp_path / "a.bin").write_bytes(by_hand(tokens))
    read = open_shard(tmp_path / "a.bin")[:]
    assert read.dtype == np.uint16
    assert read.tolist() == tokens
    assert not read.flags.writeable


def test_a_shard_is_written_as_llm_c_reads_it(tmp_path):
    paths = write_shards([np.array([5, 65535]), np.array([], dtype=int), np.array([7])], tmp_path, "val")
    assert [path.name for path in paths] == ["val_000000.bin"]
    assert paths[0].read_bytes() == by_hand([5, 65535, 7])


@pytest.mark.parametrize("chunk", [1, 3, 10, 23, 100])
def test_a_stream_becomes_shards_of_equal_size(tmp_path, chunk):
    tokens = np.random.default_rng(0).integers(0, 1 << 16, 23).astype(np.uint16)
    chunks = (tokens[i : i + chunk] for i in range(0, 23, chunk))
    paths = write_shards(chunks, tmp_path, "train", shard_size=10)
    assert [path.name for path in paths] == [f"train_{i:06d}.bin" for i in range(3)]
    assert [len(open_shard(path)) for path in paths] == [10, 10, 3]
    assert joined(paths) == tokens.tolist()


def test_no_tokens_make_no_shard(tmp_path):
    assert write_shards([], tmp_path, "train") == []
    assert everything(tmp_path) == []


def test_a_crash_leaves_whole_shards_only(tmp_path):
    def chunks():
        yield np.arange(15)
        assert everything(tmp_path) == [
            f".train_000001.bin.{os.getpid()}.tmp",
            "train_000000.bin",
        ]  # half of the second one
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(chunks(), tmp_path, "train", shard_size=10)
    assert everything(tmp_path) == ["train_000000.bin"]


@pytest.mark.parametrize("bad", [[-1, 5], [5, 65536]])
def test_ids_that_do_not_fit_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="a token shard holds 0 to 65,535"):
        write_shards([np.array(bad)], tmp_path, "train")


GOOD = by_hand(list(range(100)))
DAMAGED = {
    "truncated": (GOOD[:-2], r"truncated: 1,222 bytes, where its header's 100 tokens make 1,224"),
    "half a token": (GOOD[:-1], "truncated: 1,223 bytes"),
    "half a header": (GOOD[:500], "truncated: 500 bytes"),
    "appended": (GOOD + b"xx", "too long: 1,226 bytes"),
    "empty file": (b"", "not a token shard"),
    "no tokens": (by_hand([]), "without tokens"),
    "text": (b"Once upon a time" * 100, "not a token shard .*gpt tokenize"),
    "no header": (np.arange(600, dtype=np.uint16).tobytes(), "not a token shard"),
    "big-endian": (by_hand([1, 2], order=">"), "big-endian byte order"),
    "version": (by_hand([1, 2], version=7), "version 7; only version 1"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_shard_is_named(tmp_path, content, message):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        open_shard(path)
    assert str(path) in str(raised.value)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.bin: there is no such file; .*gpt tokenize"):
        open_shard(tmp_path / "b.bin")


def test_a_token_out_of_range_is_found_and_looked_for_once(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_CHUNK", 64)
    tokens = [i % 50 for i in range(1000)]
    (tmp_path / "a.bin").write_bytes(by_hand(tokens))
    tokens[777] = tokens[900] = 50
    (tmp_path / "b.bin").write_bytes(by_hand(tokens))
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    check_range(paths, 51)
    with pytest.raises(
        ValueError, match=r"b\.bin: token 50 at position 777, but the vocabulary has 50 tokens"
    ):
        check_range(paths, 50)

    monkeypatch.setattr(cache, "SETTLED", 0)  # as if the files were old
    scanned: list[Path] = []
    scan = token_file.TokenFile.scan
    monkeypatch.setattr(token_file.TokenFile, "scan", lambda self: scanned.append(self.path) or scan(self))
    for _ in range(2):
        check_range(paths, 51)
    assert scanned == paths
    tokens[5] = 60
    (tmp_path / "a.bin").write_bytes(by_hand([*tokens, 0]))
    with pytest.raises(ValueError, match=r"a\.bin: token 60 at position 5"):
        check_range(paths, 51)


def test_a_change_at_equal_size_and_time_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", 0)
    path = tmp_path / "a.bin"
    path.write_bytes(by_hand([*range(2000), 7]))
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    first = open_shard(path).content()
    assert first == open_shard(path).content() == Content(hashlib.sha256(path.read_bytes()).hexdigest(), 1999)
    path.write_bytes(by_hand([*range(2000), 9]))
    os.utime(path, ns=times)
    assert path.stat().st_mtime_ns == times[1]
    assert open_shard(path).content() != first


def test_what_changed_just_now_is_not_remembered(tmp_path, home, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(by_hand([1, 2]))
    open_shard(path).content()
    assert everything(home) == []
    monkeypatch.setattr(cache, "SETTLED", 0)
    open_shard(path).content()
    (note,) = (home / "known").iterdir()
    before = note.read_bytes()
    for damage in (b"", b"[]", b'{"sha256": 3}', before[:-4]):
        note.write_bytes(damage)
        assert open_shard(path).content().largest == 2
        assert note.read_bytes() == before


def rewrite_in_place(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(b"\xff")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_whole(path: Path) -> None:
    other = path.with_name("new")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


CHANGES = {
    "written over": (lambda path: os.utime(path) or path.write_bytes(by_hand([0] * 100)), "it was changed"),
    "at the same time": (rewrite_in_place, "it was changed"),
    "truncated": (lambda path: os.truncate(path, 1100), "from 1,224 to 1,100 bytes|truncated"),
    "emptied": (lambda path: os.truncate(path, 0), "truncated"),
    "longer": (lambda path: os.truncate(path, 9000), "from 1,224 to 9,000 bytes"),
    "removed": (Path.unlink, "it was removed or replaced"),
    "replaced": (replace_whole, "it was removed or replaced"),
}
READERS = {
    "shard": lambda path: partial(open_shard(path).__getitem__, slice(40, 60)),
    "training": lambda path: TokenLoader([path], 8, 2).__next__,
    "validation": lambda path: partial(list, EvalWindows([path], 8, 2)),
    "dataset": lambda path: partial(WindowDataset(open_shard(path), 8).__getitem__, 4),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_shard_that_changes_while_it_is_in_use_is_named(tmp_path, reader, change, message):
    path = tmp_path / "a.bin"
    path.write_bytes(GOOD)
    os.utime(path, ns=(10**18, 10**18))
    read = READERS[reader](path)
    read()
    change(path)
    for _ in range(2):  # and for ever after
        with pytest.raises(InputError, match=rf"a\.bin, token \d+: .*({message}).*; put the file back"):
            read()


@pytest.mark.parametrize(
    "touch",
    [lambda path: os.utime(path), lambda path: path.chmod(0o600), lambda path: os.link(path, f"{path}2")],
)
def test_a_shard_that_is_touched_but_the_same_goes_on_being_read(tmp_path, touch):
    path = tmp_path / "a.bin"
    path.write_bytes(GOOD)
    os.utime(path, ns=(10**18, 10**18))
    loader = TokenLoader([path], 8, 2)
    same = TokenLoader([np.arange(100, dtype=np.uint16)], 8, 2)
    for _ in range(3):
        touch(path) if loader.position == 4 else None
        assert torch.equal(next(loader)[0], next(same)[0])
    assert loader.state_dict() == same.state_dict()


def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "train.bin")
    with pytest.raises(InputError, match=r"train\.bin: it is no file"):
        open_shard(tmp_path / "train.bin")


def test_a_large_stream_stays_out_of_memory(tmp_path):
    import tracemalloc

    tracemalloc.start()
    write_shards((np.full(1 << 16, i, np.uint16) for i in range(64)), tmp_path, "train", shard_size=3_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # 8 MB passed through
    digest = [hashlib.sha256(open_shard(p)[:].tobytes()).hexdigest() for p in sorted(tmp_path.glob("*.bin"))]
    whole = np.repeat(np.arange(64, dtype=np.uint16), 1 << 16)
    cuts = [*range(0, len(whole), 3_000_000), len(whole)]
    assert digest == [hashlib.sha256(whole[a:b].tobytes()).hexdigest() for a, b in pairwise(cuts)]
