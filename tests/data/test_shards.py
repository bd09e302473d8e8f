"""Whole corpora on their way into shards, folders of shards, and what the cache keeps of them."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fusedgpt.data import cache, files, shards, token_file
from fusedgpt.data.corpus import open_corpus
from fusedgpt.data.shards import open_shards, stored_tokenizer, token_shards, tokenize
from fusedgpt.data.token_file import open_shard
from fusedgpt.data.tokenizers import base, load_tokenizer, make_tokenizer
from fusedgpt.data.untrusted import InputError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    return path


def shard_of(tokens: list[int]) -> bytes:
    return token_file._header(len(tokens)) + np.array(tokens, "<u2").tobytes()


def joined(paths) -> list[int]:
    return np.concatenate([open_shard(path)[:] for path in paths]).tolist()


def noted(made, key: str) -> object:
    """What meta.json beside the shards says."""
    return json.loads((made.val[0].parent / "meta.json").read_text())[key]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- a corpus as shards


def test_the_verdict_has_the_known_numbers_of_tokens(shared_data, gpt2_tokenizer_cache):
    import tiktoken

    made = token_shards(shared_data / "the-verdict.txt", make_tokenizer("gpt2"))
    assert (made.train_tokens, made.val_tokens) == (4612, 534)
    text = (shared_data / "the-verdict.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    gpt2 = tiktoken.get_encoding("gpt2")
    assert joined(made.train) == gpt2.encode(text[:cut])
    assert joined(made.val) == gpt2.encode(text[cut:])
    assert (made.val_bytes, noted(made, "val_chars")) == (len(text) - cut,) * 2
    assert made.val_bytes_per_token == (len(text) - cut) / 534
    assert not noted(made, "separated")


@pytest.mark.parametrize(("kind", "train", "val"), [("gpt2", 301_966, 36_059), ("char", 1_003_854, 111_540)])
def test_shakespeare_has_the_numbers_that_nanogpt_reports(
    shared_data, gpt2_tokenizer_cache, kind, train, val
):
    path = shared_data / "tinyshakespeare.txt"
    made = token_shards(path, make_tokenizer(kind, open_corpus(path).train_texts()))
    assert (made.train_tokens, made.val_tokens) == (train, val)


def test_documents_stand_between_end_of_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("ab", "é", "ba", "b")), encoding="utf-8")
    tokenizer = make_tokenizer("char", ["abé"])
    made = token_shards(path, tokenizer, val_fraction=0.5)
    eot = tokenizer.end_of_text
    assert joined(made.train) == [eot, 0, 1, eot, 1, 0, eot]
    assert joined(made.val) == [eot, 2, eot, 1, eot]
    assert (made.train_tokens, made.val_tokens, made.val_bytes, noted(made, "val_chars")) == (7, 5, 3, 2)
    assert noted(made, "separated")


def test_tales_start_with_end_of_text():
    tokenizer = make_tokenizer("char", open_corpus("tales:60").train_texts())
    made = token_shards("tales:20", tokenizer)
    ids = joined(made.train)
    tales = list(open_corpus("tales:20").train_texts())
    assert ids[0] == ids[-1] == tokenizer.end_of_text
    assert tokenizer.decode(ids) == "<|endoftext|>" + "".join(tale + "<|endoftext|>" for tale in tales)
    assert made.corpus.name == "tales:20"
    assert noted(made, "val_chars") == sum(map(len, open_corpus("tales:20").val_texts()))


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "word", "char"])
def test_cutting_a_long_text_changes_no_token(kind, monkeypatch, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_tokenizer_cache")
    text = (
        "It's  \n\n\t a -- long\u00a0text ,\r\n with \x1c;\x1c marks,  numbers 1 234 \u2028 and  trailing spaces  \n"
        * 7
    )
    tokenizer = make_tokenizer(kind, [text])
    for size in range(1, 60):
        monkeypatch.setattr(base, "PART", size)
        parts = list(base.bounded_parts(text))
        assert "".join(parts) == text
        assert len(parts) > len(text) // (size + 40)
        assert [i for part in parts for i in tokenizer.encode_ordinary(part)] == tokenizer.encode_ordinary(
            text
        )
        if kind != "gpt2":
            assert make_tokenizer(kind, [text]).fingerprint() == tokenizer.fingerprint()


def test_tokens_are_made_once_and_again_for_what_differs(text, home, monkeypatch):
    made = []
    monkeypatch.setattr(shards, "tokenize", lambda *a, **k: made.append(1) or tokenize(*a, **k))
    tokenizer = make_tokenizer("char", [text.read_text()])
    first = token_shards(text, tokenizer)
    again = token_shards(text, load_tokenizer(first.train[0].parent))
    assert first.train == again.train
    assert len(made) == 1
    assert token_shards(text, make_tokenizer("word", [text.read_text()])).train != first.train
    assert token_shards(text, tokenizer, val_fraction=0.2).val_tokens == 2 * first.val_tokens
    text.write_text(text.read_text() + "x")
    assert token_shards(text, make_tokenizer("char", [text.read_text()])).train != first.train
    assert len(made) == 4


def test_a_half_made_folder_is_never_taken_for_a_whole_one(text, tmp_path, home):
    class Breaks:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def save(self, path):
            raise KeyboardInterrupt

    tokenizer = make_tokenizer("char", [text.read_text()])
    with pytest.raises(KeyboardInterrupt):
        token_shards(text, Breaks(tokenizer))
    assert everything(home / "tokens") == []
    left_by_a_kill = home / "tokens" / f".x.{os.getpid()}.part"
    left_by_a_kill.mkdir()
    (left_by_a_kill / "train_000009.bin").write_bytes(shard_of([1, 2, 3]))
    tokenize(open_corpus(text), tokenizer, home / "tokens" / "x")
    assert everything(home / "tokens" / "x") == [
        "meta.json",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_what_a_kill_left_of_the_same_tokens_is_removed_after_a_day(text, home):
    tokenizer = make_tokenizer("char", [text.read_text()])
    folder = token_shards(text, tokenizer).train[0].parent
    shutil.rmtree(folder)
    old, new = (folder.with_name(f".{folder.name}.{pid}.tmp") for pid in (1, 2))
    for left in (old, new):
        left.mkdir()
    os.utime(old, (10**9, 10**9))
    token_shards(text, tokenizer)
    assert sorted(path.name for path in folder.parent.iterdir()) == [new.name, folder.name]


def test_the_slower_of_two_processes_takes_what_is_there(text, home, monkeypatch):
    tokenizer = make_tokenizer("char", [text.read_text()])
    corpus, folder = open_corpus(text), home / "tokens" / "x"
    replace, raced = os.replace, []

    def faster(source, target):
        if Path(target) == folder and not raced:
            raced.append(1)
            tokenize(corpus, tokenizer, home / "tokens" / "y")
            replace(home / "tokens" / "y", folder)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", faster)
    tokenize(corpus, tokenizer, folder)
    assert raced
    assert everything(home / "tokens") == ["x", *(f"x/{name}" for name in everything(folder))]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit": lambda folder: flip(folder / "train_000000.bin"),
    "a bit of the validation part": lambda folder: flip(folder / "val_000000.bin"),
    "truncated": lambda folder: os.truncate(folder / "train_000000.bin", 1500),
    "emptied by a power cut": lambda folder: os.truncate(folder / "val_000000.bin", 0),
    "a shard is gone": lambda folder: (folder / "val_000000.bin").unlink(),
    "a shard too much": lambda folder: (folder / "train_000001.bin").write_bytes(shard_of([1, 2, 3])),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "empty meta": lambda folder: (folder / "meta.json").write_text(""),
    "meta without all": lambda folder: (folder / "meta.json").write_text("{}"),
    "meta without a shard": lambda folder: edit(folder, sha256={}),
    "meta of the future": lambda folder: edit(folder, format=99),
    "bytes that are none": lambda folder: edit(folder, val_bytes=-5),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "empty tokenizer": lambda folder: os.truncate(folder / "tokenizer.json", 0),
    "empty folder": lambda folder: shutil.rmtree(folder) or folder.mkdir(),
}


def edit(folder: Path, **fields: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | fields))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_tokens_in_the_cache_are_made_anew(text, home, capsys, monkeypatch, damage):
    monkeypatch.setattr(cache, "SETTLED", 0)
    tokenizer = make_tokenizer("char", [text.read_text()])
    made = token_shards(text, tokenizer)
    folder = made.train[0].parent
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert token_shards(text, tokenizer).train == made.train
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
    assert everything(home / "tokens") == [folder.name, *(f"{folder.name}/{name}" for name in sorted(good))]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert re.match(r"warning: tokens in the cache are damaged and are made anew: .*" + folder.name, warning)
    token_shards(text, tokenizer)
    assert capsys.readouterr().err == ""


def test_damaged_tokens_in_a_cache_that_is_only_read_are_made_elsewhere(text, home, capsys, monkeypatch):
    tokenizer = make_tokenizer("char", [text.read_text()])
    folder = token_shards(text, tokenizer).train[0].parent
    flip(folder / "train_000000.bin")
    damaged = {path: path.read_bytes() for path in folder.iterdir()}
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != home and real(path, mode))
    made = token_shards(text, tokenizer)
    assert not made.train[0].is_relative_to(home)
    assert tokenizer.decode(joined(made.train) + joined(made.val)) == text.read_text()
    assert {path: path.read_bytes() for path in folder.iterdir()} == damaged
    assert "cannot be written" in capsys.readouterr().err


def test_kills_while_tokenising_leave_nothing_that_is_used(text, home):
    text.write_text(text.read_text() * 200)
    tokenizer = make_tokenizer("char", [text.read_text()])
    folder, corpus, delays = home / "tokens" / "x", open_corpus(text), random.Random(0)
    start = time.monotonic()
    tokenize(corpus, tokenizer, folder)
    whole = time.monotonic() - start
    shutil.rmtree(folder)
    outcomes = set()
    for _ in range(12):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                tokenize(corpus, tokenizer, folder)
            os._exit(0)
        time.sleep(delays.uniform(0, whole))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcomes.add(folder.exists())
        if folder.exists():
            assert (
                tokenizer.decode(joined(open_shards(folder).train + open_shards(folder).val))
                == text.read_text()
            )
            shutil.rmtree(folder)
    assert False in outcomes
    tokenize(corpus, tokenizer, folder)
    open_shards(folder)


def test_nothing_is_written_over(text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    tokenizer = make_tokenizer("char", [text.read_text()])
    tokenize(open_corpus(text), tokenizer, out)  # an empty folder is in nobody's way
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="exists already and is left alone"):
        tokenize(open_corpus(text), tokenizer, out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_part_without_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="nothing is left for the training part"):
        token_shards(tmp_path / "a.txt", make_tokenizer("char", ["x"]))


def test_text_takes_a_tokenizer(text):
    assert stored_tokenizer(text) is None
    with pytest.raises(ValueError, match="--tokenizer"):
        token_shards(text)


# ---- folders of shards


def test_a_folder_of_shards_is_a_source_and_brings_its_tokenizer(text, tmp_path):
    tokenizer = make_tokenizer("bpe", [text.read_text()], 270)
    tokenize(open_corpus(text), tokenizer, tmp_path / "out")
    made = token_shards(str(tmp_path / "out"))
    assert made.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert stored_tokenizer(tmp_path / "out").fingerprint() == tokenizer.fingerprint()
    assert made.tokenizer.decode(joined(made.train) + joined(made.val)) == text.read_text()
    assert (made.val_bytes, made.corpus, noted(made, "separated")) == (225, None, False)
    with pytest.raises(ValueError, match=r"made with a bpe tokenizer of .* not the given one .char"):
        token_shards(tmp_path / "out", make_tokenizer("char", ["a"]))


def test_a_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "train.bin").write_bytes(shard_of([1, 2, 3]))
    assert stored_tokenizer("tales") is None
    with pytest.raises(ValueError, match="no validation shards"):
        token_shards("./tales", make_tokenizer("char", ["a"]))


def test_shards_of_others_take_a_tokenizer_that_fits(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "tiny_train.bin").write_bytes(shard_of([0, 1, 2]))
    with pytest.raises(ValueError, match=r"no validation shards \(\*val\*\.bin\)"):
        token_shards(folder, make_tokenizer("char", ["ab"]))
    (folder / "tiny_val.bin").write_bytes(shard_of([0, 1]))
    with pytest.raises(ValueError, match=r"no tokenizer\.json beside the shards.*--tokenizer gpt2"):
        token_shards(folder)
    made = token_shards(folder, make_tokenizer("char", ["ab"]))  # a, b, end of text
    assert (made.train_tokens, made.val_tokens, made.val_bytes) == (3, 2, None)
    assert made.val_bytes_per_token is None
    with pytest.raises(
        ValueError, match=r"tiny_train\.bin: token 2 at position 2, but the vocabulary has 2 tokens"
    ):
        token_shards(folder, make_tokenizer("char", ["a"]))


def test_a_truncated_shard_in_a_folder_is_named(text, tmp_path):
    tokenize(open_corpus(text), make_tokenizer("char", [text.read_text()]), tmp_path / "out")
    shard = tmp_path / "out" / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"train_000000\.bin: token shard is truncated"):
        open_shards(tmp_path / "out")


def test_fineweb_is_downloaded_shard_by_shard(gpt2_tokenizer_cache, home, monkeypatch, capsys):
    asked = []

    def fake(url, path, max_bytes, check):
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shard_of([50256, len(asked)]))
        check(path)

    monkeypatch.setattr(shards, "download", fake)
    made = token_shards("fineweb10B:2")
    assert "3 files, about 0.6 GB" in capsys.readouterr().err
    assert asked == [
        "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/" + name
        for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin")
    ]
    assert [joined([path])[1] for path in made.train] == [2, 3]
    assert (made.train_tokens, made.val_tokens, made.tokenizer.kind) == (4, 2, "gpt2")
    assert token_shards("fineweb10B:3", stored_tokenizer("fineweb10B:3")).train_tokens == 6
    assert len(asked) == 4  # the fourth alone was missing
    with pytest.raises(ValueError, match="fineweb10B takes at most 103"):
        token_shards("fineweb10B:104")
    with pytest.raises(ValueError, match="fineweb10B: made with a gpt2 tokenizer"):
        token_shards("fineweb10B:2", make_tokenizer("char", ["a"]))


def test_a_shard_of_fineweb_that_changes_is_refused(gpt2_tokenizer_cache, home, monkeypatch):
    for name in ("val_000000", "train_000001"):
        (home / "fineweb10B").mkdir(parents=True, exist_ok=True)
        (home / f"fineweb10B/fineweb_{name}.bin").write_bytes(shard_of([1, 2, 3]))
    assert token_shards("fineweb10B:1").train_tokens == 3
    record = home / "fineweb10B/fineweb_train_000001.bin.sha256"
    path = record.with_suffix("")
    assert record.read_text() == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
    token_shards("fineweb10B:1")
    path.write_bytes(shard_of([1, 2, 4]))
    with pytest.raises(
        InputError, match=r"train_000001\.bin: its sha256 is not the one recorded in .*; delete both"
    ):
        token_shards("fineweb10B:1")
    path.write_bytes(shard_of([1, 2, 3]))
    for damage in (b"", b"\xff" * 50, b"0" * 2000):
        record.write_bytes(damage)
        with pytest.raises(InputError, match=r"train_000001\.bin.*; delete both"):
            token_shards("fineweb10B:1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 1}, r"meta\.json: it has format 1; only 2 can be read; tokenise the text again"),
        ({"format": "2"}, r"meta\.json: Expected `int \| null`"),
        ({"val_bytes": 0}, "val_bytes is 0"),
        ({"val_bytes": None}, "lacks val_bytes"),
        ({"sha256": {}}, r"train_000000\.bin is not both there and described"),
        ({"sha256": []}, "Expected `object`, got `array`"),
        ({"sha256": {"../x\x1b[31m": "0"}}, r"\.\./x\\x1b\[31m is not both there"),
    ],
)
def test_facts_that_do_not_fit_the_shards_are_refused(text, tmp_path, fields, message):
    tokenize(open_corpus(text), make_tokenizer("char", [text.read_text()]), tmp_path / "out")
    edit(tmp_path / "out", **fields)
    with pytest.raises(InputError, match=message):
        open_shards(tmp_path / "out")


def test_a_shard_that_is_not_the_one_that_was_tokenised_is_refused(text, tmp_path):
    tokenize(open_corpus(text), make_tokenizer("char", [text.read_text()]), tmp_path / "out")
    flip(tmp_path / "out" / "val_000000.bin")
    with pytest.raises(InputError, match=r"val_000000\.bin: its sha256 is not the one in meta\.json"):
        token_shards(tmp_path / "out")
    (tmp_path / "out" / "meta.json").unlink()  # the way out that the message names
    token_shards(tmp_path / "out")
