"""Sources of text: what is read, how it is split, and which mistakes are named."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fusedgpt.data import cache as cache_module
from fusedgpt.data import corpus
from fusedgpt.data.corpus import open_corpus, split_name
from fusedgpt.data.untrusted import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# ---- what is read and how it is split


def test_a_single_text_is_split_by_characters(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(1000))
    one = open_corpus(write(tmp_path / "a.txt", text))
    assert list(one.train_texts()) == [text[:900]]
    assert list(one.val_texts()) == [text[900:]]
    assert not one.separated
    assert one.n_bytes == 1000
    assert list(one.train_texts()) == [text[:900]]  # from the start again


def test_the_verdict_is_split_as_the_book_splits_it(shared_data):
    text = (shared_data / "the-verdict.txt").read_text(encoding="utf-8")
    verdict = open_corpus(shared_data / "the-verdict.txt")
    assert list(verdict.train_texts()) == [text[: int(0.9 * len(text))]]
    assert list(verdict.val_texts()) == [text[int(0.9 * len(text)) :]]


def test_many_documents_are_split_whole_and_each_goes_to_one_part(tmp_path):
    texts = [f"document {i}" for i in range(100)]
    many = open_corpus(write(tmp_path / "a.jsonl", jsonl(*texts)), val_fraction=0.2)
    train, val = list(many.train_texts()), list(many.val_texts())
    assert sorted(train + val) == sorted(texts)
    assert len(val) == 20
    assert many.separated
    gaps = [int(b.split()[1]) - int(a.split()[1]) for a, b in pairwise(val)]
    assert set(gaps) == {5}  # spread over the file, not its end


def test_few_documents_each_give_their_end(tmp_path):
    three = open_corpus(write(tmp_path / "a.jsonl", jsonl("a" * 100, "b" * 10, "c" * 50)))
    assert list(three.train_texts()) == ["a" * 90, "b" * 9, "c" * 45]
    assert list(three.val_texts()) == ["a" * 10, "b", "c" * 5]
    assert three.separated


@pytest.mark.parametrize(
    ("count", "fraction"), [(10, 0.1), (9, 0.1), (3, 1 / 3), (2, 0.5), (20, 0.07), (7, 0.9)]
)
def test_neither_part_is_ever_empty(tmp_path, count, fraction):
    some = open_corpus(write(tmp_path / "a.jsonl", jsonl(*["some words here"] * count)), fraction)
    assert "".join(some.train_texts())
    assert "".join(some.val_texts())


def test_a_folder_is_read_in_order_and_its_blank_and_hidden_files_are_passed_over(tmp_path):
    folder = tmp_path / "texts"
    write(folder / "b.txt", "second")
    write(folder / "a" / "x.TXT", "first")
    write(folder / "c.jsonl", jsonl("third", "", " \n", "fourth"))
    write(folder / "blank.txt", " \n")
    write(folder / "notes.md", "no text for us")
    write(folder / ".git" / "x.txt", "hidden")
    documents = list(open_corpus(folder, val_fraction=0.5).train_texts()) + list(
        open_corpus(folder, 0.5).val_texts()
    )
    assert documents == ["first", "third", "second", "fourth"]


def test_a_folder_is_read_one_file_at_a_time(tmp_path):
    for i in range(20):
        write(tmp_path / "texts" / f"{i:02}.txt", f"text {i}")
    write(tmp_path / "texts" / "99.txt", b"\xff")
    texts = open_corpus(tmp_path / "texts", val_fraction=0.5).train_texts()  # 99.txt is not looked at yet
    assert next(texts) == "text 0"
    with pytest.raises(ValueError, match=r"99\.txt, line 1: not valid UTF-8"):
        list(texts)


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path):
    two = open_corpus(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"), val_fraction=0.5)
    assert "".join([*two.train_texts(), *two.val_texts()]) == "one\r\ntwo\r\n"


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    import pyarrow.parquet as pq

    texts = [f"row {i}, é" for i in range(3000)]
    pq.write_table(pa.table({"text": texts, "id": range(3000)}), tmp_path / "a.parquet")
    rows = open_corpus(tmp_path / "a.parquet")
    assert sorted([*rows.train_texts(), *rows.val_texts()]) == sorted(texts)
    pq.write_table(pa.table({"body": texts}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="no column 'text', but 'body'"):
        open_corpus(tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet, row 2: there is no text in it"):
        open_corpus(tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": [["x"], ["y"]]}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"'text' is list<\w+: string>, not string"):
        open_corpus(tmp_path / "e.parquet")
    pq.write_table(
        pa.table({"text": pa.array(["words " * 9] * 2).dictionary_encode()}), tmp_path / "f.parquet"
    )
    assert "".join(open_corpus(tmp_path / "f.parquet").train_texts())
    write(tmp_path / "d.parquet", "text")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        open_corpus(tmp_path / "d.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"pip install pyarrow, or from a clone pip install -e '\.\[parquet\]'"
    ):
        open_corpus(write(tmp_path / "a.parquet", "x"))


def test_the_fingerprint_follows_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SETTLED", 0)  # as if the files were old
    path = write(tmp_path / "a.txt", "some text")
    os.utime(path, ns=(10**18, 10**18))
    first = open_corpus(path).fingerprint
    assert open_corpus(path, 0.5).fingerprint == first
    write(path, "SOME TEXT")  # as long, and as old
    os.utime(path, ns=(10**18, 10**18))
    second = open_corpus(path).fingerprint
    write(tmp_path / "texts" / "b.txt", "SOME TEXT")
    assert open_corpus(tmp_path / "texts").fingerprint == second  # the same text
    write(tmp_path / "texts" / "c.jsonl", jsonl("more"))
    third = open_corpus(tmp_path / "texts").fingerprint
    write(tmp_path / "texts" / "c.jsonl", jsonl("most"))
    assert len({first, second, third, open_corpus(tmp_path / "texts").fingerprint}) == 4


def test_a_text_is_read_once_for_its_fingerprint(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.txt", "some text")
    open_corpus(path)
    assert not list(cache.rglob("*.json"))  # it has just been written, and may be again within the same tick
    monkeypatch.setattr(cache_module, "SETTLED", 0)
    first = open_corpus(path).fingerprint
    monkeypatch.setattr(corpus.hashlib, "file_digest", None)
    assert open_corpus(path).fingerprint == first


@pytest.mark.parametrize("name", ["a.txt", "texts/a.jsonl"])
def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, name):
    path = write(tmp_path / name, jsonl("one", "two"))
    texts = open_corpus(path, 0.5).train_texts()
    next(texts)
    os.utime(write(path, jsonl("owe", "two")), ns=(10**18, 10**18))
    with pytest.raises(InputError, match=rf"{name}: it was changed while it was in use; begin again"):
        list(texts)


def test_tales_hold_out_other_tales(monkeypatch):
    short = open_corpus("tales:40")
    train, val = list(short.train_texts()), list(short.val_texts())
    assert len(train) == 40
    assert len(val) == corpus.TALES_VAL
    assert train == list(short.train_texts())
    assert train != val[:40]
    assert short.separated
    assert short.name == "tales:40"
    assert short.fingerprint != open_corpus("tales:41").fingerprint


def test_names():
    assert split_name("tales") == ("tales", None)
    assert split_name("fineweb10B:8") == ("fineweb10B", 8)
    assert split_name("tales.txt") == (None, None)
    assert split_name(Path("tales")) == (None, None)


# ---- mistakes

MISTAKES = {
    "empty": ("a.txt", b"", "a.txt: it is empty"),
    "blank": ("a.txt", b" \n\t\n", "a.txt: it is empty"),
    "binary": ("a.txt", b"abc\0def", r"binary, not text \(NUL byte at position 3\)"),
    "latin-1": ("a.txt", b"caf\xe9 au lait", r"not valid UTF-8 at byte 3 \(0xe9\).*iconv"),
    "ending": (
        "a.pdf",
        b"x",
        r"files ending in \.pdf are not supported; give one that ends in \.txt, \.jsonl, \.parquet",
    ),
    "no ending": ("a", b"x", "files without an ending are not supported"),
    "json": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: it is damaged or no JSON"),
    "field": (
        "a.jsonl",
        b'{"body": "a", "id": 1}\n',
        r"line 1: Object missing required field `text`; each line takes one object with a string 'text'",
    ),
    "no object": ("a.jsonl", b'"text"\n', "line 1: Expected `object`, got `str`"),
    "no string": ("a.jsonl", b'{"text": 5}\n', r"line 1: Expected `str`, got `int` - at `\$.text`"),
    "surrogate": ("a.jsonl", b'{"text": "a\\ud800"}\n', "line 1: .* without lone surrogates"),
    "bytes": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        "line 2: not valid UTF-8 at byte 10 of the line",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_bad_file_is_named_with_place_and_remedy(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        open_corpus(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(raised.value)


def test_what_is_not_there_is_named_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "novel.txt", "text")
    with pytest.raises(
        FileNotFoundError, match=r"novl\.txt: no such file or folder; did you mean novel\.txt\?"
    ):
        open_corpus("novl.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere/at/all: no such file or folder; check the path"):
        open_corpus("nowhere/at/all")
    with pytest.raises(
        ValueError, match=r"neither a file.*did you mean tinyshakespeare\?.*names: tales, the-verdict"
    ):
        open_corpus("tinyshakspeare")
    with pytest.raises(ValueError, match=r"neither a file.*names:"):
        open_corpus("qqqq")
    with pytest.raises(ValueError, match="did you mean fineweb10B"):
        open_corpus("fineweb10b:3")


def test_a_folder_without_texts_says_what_it_holds(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no texts.*nothing"):
        open_corpus(tmp_path / "none")
    write(tmp_path / "some" / "a.docx", "x")
    with pytest.raises(ValueError, match=r"no texts.*only \.docx"):
        open_corpus(tmp_path / "some")


@pytest.mark.parametrize(
    "source", ["tales:", "tales:0", "tales:-3", "tales:many", "tales:²", "the-verdict:3"]
)
def test_a_number_that_makes_no_sense(source):
    with pytest.raises(ValueError, match="number"):
        open_corpus(source)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_that_makes_no_sense(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        open_corpus("tales", fraction)


def test_fineweb_is_no_text():
    with pytest.raises(ValueError, match="tokens, not text"):
        open_corpus("fineweb10B")


# ---- named texts


@pytest.mark.parametrize("name", ["the-verdict", "tinyshakespeare"])
def test_the_known_checksums_are_those_of_the_public_texts(shared_data, name):
    body = (shared_data / f"{name}.txt").read_bytes()
    known = corpus._DOWNLOADS[name]
    assert (len(body), hashlib.sha256(body).hexdigest()) == (known.size, known.sha256)


def test_text_is_read_without_torch_and_numpy():
    code = "import sys, fusedgpt.data.corpus as c; c.open_corpus('tales:1'); assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
