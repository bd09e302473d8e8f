"""Tensor files: what safetensors itself wrote and reads, damaged headers, and tensors that are not those expected."""

import json
import os
import resource
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusedgpt.data.untrusted import InputError, MissingFile
from fusedgpt.gpt.tensors import MAX_HEADER, describe_tensors, read_tensors, write_tensors

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "step": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "ids": torch.arange(5),
}
EXPECTED = {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def header(**entries: Any) -> bytes:
    """A file with these entries in its header and 16 bytes of data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reading_gives_what_safetensors_wrote_and_writing_what_it_reads(file: Path, tmp_path: Path) -> None:
    assert describe_tensors(file, "") == EXPECTED
    for expected in (None, EXPECTED):
        found = read_tensors(file, expected, "")
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    write_tensors(TENSORS, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as theirs:
        assert all(torch.equal(theirs.get_tensor(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("weight", ((3, 2), torch.float32), r"weight has shape \(2, 3\) instead of \(3, 2\); fetch"),
        ("weight", ((2, 3), torch.float16), "weight is float32 instead of float16; fetch"),
        ("weight", None, "weight does not belong there; fetch"),
        ("bias", ((2,), torch.float32), "bias is missing; fetch"),
    ],
)
def test_a_tensor_that_is_not_the_one_expected_is_named_before_any_is_read(
    file: Path, name: str, spec: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {**EXPECTED, name: spec}
    if spec is None:
        del expected[name]
    with pytest.raises(InputError, match=message) as caught:
        read_tensors(file, expected, "fetch it again")
    assert str(file) in str(caught.value)


def test_tensors_are_compared_before_memory_is_taken_for_them(tmp_path: Path) -> None:
    file, size = tmp_path / "huge.safetensors", 1 << 40
    data = header(a=entry(shape=(size // 4,), offsets=(0, size)))[:-16]
    file.write_bytes(data)
    os.truncate(file, len(data) + size)  # 1 TB, of which none is on the disk
    with pytest.raises(InputError, match=r"a has shape \(274877906944,\) instead of \(4,\)"):
        read_tensors(file, {"a": ((4,), torch.float32)}, "fetch it again")


def test_many_differences_are_counted_and_the_first_listed(file: Path) -> None:
    expected = {f"layer.{i}": ((1,), torch.float32) for i in range(10)}
    with pytest.raises(InputError, match=r"15 tensors do not fit: layer\.0 is missing; layer\.1") as caught:
        read_tensors(file, expected, "fetch it again")
    assert len(str(caught.value)) <= 400


GOOD = header(a=entry())
DAMAGED = {
    "nothing": b"",
    "cut header": GOOD[:20],
    "cut data": GOOD[:-1],
    "more data": GOOD + b"x",
    "header larger than the file": struct.pack("<Q", MAX_HEADER) + GOOD[8:],
    "header larger than the limit": struct.pack("<Q", MAX_HEADER + 1) + GOOD[8:],
    "header of 2^63": struct.pack("<Q", 1 << 63) + GOOD[8:],
    "a list": struct.pack("<Q", 2) + b"[]",
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe{}" + bytes(16),
    "negative shape": header(a=entry(shape=(-4,))),
    "a size above 2^64": header(a=entry(shape=(1 << 62, 1 << 62))),
    "a shape of more than its bytes": header(a=entry(shape=(5,))),
    "offsets outside": header(a=entry(offsets=(16, 32))),
    "overlapping": header(a=entry(), b=entry()),
    "a float of 4 bits": header(a=entry("F4", (32,))),
    "an unknown dtype": header(a=entry("F31")),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(GOOD)
    assert read_tensors(file, None, "")["a"].shape == (4,)
    file.write_bytes(data)
    for read in (
        lambda: read_tensors(file, None, "fetch it again"),
        lambda: describe_tensors(file, "fetch it again"),
    ):
        with pytest.raises(InputError, match=r"bad\.safetensors: .*; fetch it again$") as caught:
            read()
        assert str(caught.value).isprintable()


def test_a_header_of_more_than_8_mib_is_not_parsed(tmp_path: Path) -> None:
    file = tmp_path / "long.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"note": "x" * MAX_HEADER})
    with pytest.raises(InputError, match=r"its header would have 8,388,\d+ bytes; it is damaged"):
        describe_tensors(file, "fetch it again")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="there is no such file"):
        read_tensors(tmp_path / "absent", None, "fetch it")
    with pytest.raises(InputError, match="it cannot be read"):
        read_tensors(tmp_path / ("x" * 300), None, "fetch it")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="it is no file"):
            read_tensors(path, None, "fetch it")


def test_a_file_cut_after_reading_leaves_the_tensors(file: Path) -> None:
    found = read_tensors(file, EXPECTED, "")
    os.truncate(file, 10)
    assert torch.equal(found["weight"], TENSORS["weight"])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_tensors(TENSORS, tmp_path / "absent" / "a.safetensors")
    assert caught.value.filename == str(tmp_path / "absent" / "a.safetensors")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # as a quota does, in the middle of the file
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_tensors(TENSORS, tmp_path / "full.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(tmp_path / "full.safetensors")
    assert list(tmp_path.iterdir()) == []
