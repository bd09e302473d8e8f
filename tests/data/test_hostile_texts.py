"""Texts made to harm: each is refused in one line within the limits of time and memory, or read like any other."""

import gc
import json
import os
import resource
import signal
import socket
from itertools import chain, islice
from pathlib import Path

import pytest

from fusedgpt.data import corpus
from fusedgpt.data.corpus import MAX_LINE, MAX_TALES, open_corpus, split_name
from fusedgpt.data.untrusted import InputError

MEMORY = 300 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def nothing_hangs():
    def stop(number, frame):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(path: Path, count: int | None = None) -> str:
    """The outcome of reading the documents of a corpus, in a child that may take 300 MB: their number, or the error."""
    gc.collect()
    results, out = os.pipe()
    child = os.fork()
    if not child:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            texts = open_corpus(path)
            outcome = str(sum(1 for _ in islice(chain(texts.train_texts(), texts.val_texts()), count)))
        except InputError as error:
            outcome = str(error)
        except BaseException as error:
            outcome = repr(error)[:1000]
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
        os.write(out, (outcome if grown < MEMORY else f"{grown:,} bytes").encode())
        os._exit(0)
    os.close(out)
    with open(results, encoding="utf-8") as file:
        outcome = file.read()
    os.waitpid(child, 0)
    assert outcome.isprintable()
    assert len(outcome) <= 400
    return outcome


LINES = {
    "gigantic": b'{"text": "' + b"a" * MAX_LINE + b'"}',
    "gigantic and unknown": b'{"text": "a", "more": "' + b"a" * MAX_LINE + b'"}',
    "deep": b'{"text": "a", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"text": "a", "more": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001,
    "surrogate": b'{"text": "\\udc00"}',
    "NUL": b'{"text": "a\0"}',
    "NULs": bytes(1000),
    "escapes": b'{"\x1b[31m": "a"}',
    "number": b'{"text": 1' + b"0" * 100_000 + b"}",
    "not a number": b'{"text": "a", "more": NaN}',
    "two": b'{"text": "a"} {"text": "b"}',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_hostile_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 2 + line + b"\n")
    outcome = read(path)
    assert outcome.startswith(f"{path}, line 3: ")
    assert "; " in outcome
    assert ("it has more than 16 MB" in outcome) == (len(line) > MAX_LINE)


def test_a_line_of_the_largest_size_is_read(tmp_path):
    line = json.dumps({"text": "\U0001f600" + "a" * (MAX_LINE - 30)}).encode()
    (tmp_path / "a.jsonl").write_bytes(line.ljust(MAX_LINE - 1) + b"\n")
    assert read(tmp_path / "a.jsonl", 2) == "2"


def test_a_text_names_the_line_and_binary_data_are_not_read_to_their_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\xff\n")
    assert read(path).startswith(f"{path}, line 3: not valid UTF-8 at byte 8 (0xff)")
    path.write_bytes(b"one\n")
    os.truncate(path, 2 << 30)  # a hole: two gigabytes of NUL
    assert read(path).startswith(f"{path}, line 2: binary, not text (NUL byte at position 4)")
    os.truncate(path, 1 << 40)
    assert "1,099.5 GB in one document, where 4.3 GB are the most; split it" in read(path)


# ---- what is no file


def test_loops_pipes_and_sockets_of_a_folder_are_passed_over(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    (folder / "up").symlink_to(folder)
    (folder / "self.txt").symlink_to("self.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(folder)  # a socket's path has at most 108 bytes
        listener.bind("socket.txt")
        assert read(folder) == "2"
    (folder / "a.txt").unlink()
    with pytest.raises(InputError, match="the folder holds no texts"):
        open_corpus(folder)


@pytest.mark.parametrize(
    "name", ["pipe.txt", "pipe.jsonl", "pipe.parquet", "/dev/zero", "/dev/tty", "loop.txt"]
)
def test_a_source_that_is_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.startswith("pipe"):
        os.mkfifo(name)
    elif name == "loop.txt":
        Path(name).symlink_to(name)
    with pytest.raises(InputError, match=name):
        open_corpus(name)


@pytest.mark.parametrize(
    "source", ["x" * 5000, "x" * 5000 + ".txt", "a\0b.txt", "~no-such-user/a.txt", "\x1b[31m.txt"]
)
def test_a_name_that_cannot_be_is_refused_in_one_line(source):
    with pytest.raises(InputError) as caught:
        open_corpus(source)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 400


# ---- parquet


@pytest.fixture
def pq():
    pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    import pyarrow.parquet

    return pyarrow.parquet


def table(**columns):
    import pyarrow as pa

    return pa.table(columns)


def test_a_bomb_is_refused_by_what_it_claims(tmp_path, pq):
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    pq.write_table(table(text=["a" * (80 << 20)]), path, compression="zstd")
    assert path.stat().st_size < 1 << 20
    assert "row group 0 claims 83,8" in read(path)
    pq.write_table(table(text=pa.repeat("", 3_000_000)), path)
    assert "it claims 3,000,000 rows in " in read(path)


def test_a_large_row_named_often_takes_no_memory(tmp_path, pq):
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    often = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), 2000), ["a" * (4 << 20)])
    pq.write_table(table(text=often), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 20  # of 8 GB
    assert read(path, 30) == "30"


def test_text_of_another_type_is_refused(tmp_path, pq):
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    for column, named in (
        (pa.array([1]), "int64"),
        (pa.array([b"\xff"]), "binary"),
        (pa.array([["a"]]), "list"),
        (pa.array([{"text": "a"}]), "struct"),
        (pa.array([None]), "null"),
    ):
        pq.write_table(table(text=column), path)
        assert f": its column 'text' is {named}" in read(path)
    pq.write_table(table(**{"\x1b[31m" + "x" * 1000: [1], **{f"column{i}": [1] for i in range(50)}}), path)
    assert read(path).startswith(f"{path}: no column 'text', but '\\\\x1b[31mxxx")
    for column in (pa.array(["a", "b"]).dictionary_encode(), pa.array(["a", "b"], pa.large_string())):
        pq.write_table(table(text=column), path)
        assert read(path) == "4"


def test_text_that_is_no_utf8_is_named_with_its_row(tmp_path, pq):
    path = tmp_path / "a.parquet"
    pq.write_table(table(text=["good", "bad!"]), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"bad!", b"ba\xff!"))
    assert read(path).startswith(f"{path}, row 2: not a readable parquet file ")


def test_every_shortened_file_is_refused(tmp_path, pq):
    path = tmp_path / "a.parquet"
    pq.write_table(table(text=[f"text {i}" for i in range(50)]), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"a\.parquet"):
            open_corpus(path)


def test_flipped_bytes_are_read_or_refused(tmp_path, pq):
    path = tmp_path / "a.parquet"
    pq.write_table(table(text=[f"text {i}" for i in range(50)]), path)
    whole, refused = path.read_bytes(), []
    for position in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            list(open_corpus(path).train_texts())
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(
        "a.parquet" in message and message.isprintable() and len(message) <= 400 for message in refused
    )


# ---- numbers


@pytest.mark.parametrize("name", ["tales", "fineweb10B"])
@pytest.mark.parametrize(
    "number", ["1000000000000000000000000000000", "9" * 5000, "100000001", "0000000000000104"]
)
def test_absurd_numbers_are_refused_with_the_limit(name, number):
    if name == "tales" and number.endswith("104"):
        number += "000000"
    limit = MAX_TALES if name == "tales" else 103
    with pytest.raises(ValueError, match=rf"{name} takes at most {limit:,}") as caught:
        split_name(f"{name}:{number}")
    assert len(str(caught.value)) <= 400


def test_the_limits_themselves_are_taken():
    assert split_name(f"tales:{MAX_TALES}") == ("tales", MAX_TALES)
    assert next(open_corpus(f"tales:{MAX_TALES}").train_texts())
    assert split_name("fineweb10B:103") == ("fineweb10B", 103)
    assert corpus.FINEWEB_SHARDS == 103
