"""What all tokenizers promise alike: special tokens, ids, files, names; and what they say to wrong input."""

import json
import tracemalloc
from pathlib import Path

import pytest

from fusedgpt.data.tokenizers import (
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    WordTokenizer,
    base,
    load_tokenizer,
    make_tokenizer,
)
from fusedgpt.data.untrusted import InputError

TEXTS = ["The cat sat on the mat, and the hat sat on the cat.", "<|endoftext|>A cat! 'Tis the cat's mat.\n"]


@pytest.fixture(params=["gpt2", "bpe", "word", "char"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "gpt2":
        return make_tokenizer(f"gpt2:{request.getfixturevalue('gpt2_tokenizer_cache')}")
    return make_tokenizer(request.param, TEXTS, 300 if request.param == "bpe" else None)


def test_special_tokens_follow_tiktokens_rules(tokenizer: Tokenizer) -> None:
    text = "cat<|endoftext|>the"
    cat, the, end = tokenizer.encode("cat"), tokenizer.encode("the"), tokenizer.end_of_text
    assert tokenizer.encode(text, allowed_special="all") == [*cat, end, *the]
    assert tokenizer.encode(text, allowed_special={"<|endoftext|>"}) == [*cat, end, *the]
    assert tokenizer.decode([end]) == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"position 3 .*'<\|endoftext\|>'.*allowed_special"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"position 1 .*'a'"):
        tokenizer.encode("cat", disallowed_special={"a"})
    if tokenizer.kind != "char":  # to a char tokenizer "<" would be an unknown character
        assert tokenizer.encode(text, disallowed_special=()) == tokenizer.encode_ordinary(text)
        assert end not in tokenizer.encode_ordinary(text)


def test_ids_reach_exactly_to_vocab_size(tokenizer: Tokenizer) -> None:
    assert all(isinstance(tokenizer.decode([i]), str) for i in range(tokenizer.vocab_size))
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=f"id {wrong} .* 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, wrong, 1])
    with pytest.raises(TypeError):
        tokenizer.decode([1.0])  # type: ignore[list-item]


def test_the_empty_string(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == tokenizer.encode_ordinary("") == []
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", ["the \ud800 cat", "the \udc00\ud800"])
def test_lone_surrogates_are_refused_with_their_position(tokenizer: Tokenizer, text: str) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_ordinary):
        with pytest.raises(ValueError, match=rf"position 4 .*U\+{ord(text[4]):04X}"):
            encode(text)


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "tok.json")
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "new" / "tok.json").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))
    for loaded in (
        load_tokenizer(tmp_path),
        make_tokenizer(tmp_path / "new" / "tok.json"),
        tokenizer.load(tmp_path),
    ):
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.special_tokens == tokenizer.special_tokens
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["kind"] == tokenizer.kind


@pytest.mark.parametrize("name", ["bpe", "word", "char"])
def test_the_fingerprint_tells_tokenizers_apart(name: str) -> None:
    one, same, other = (make_tokenizer(name, texts) for texts in (TEXTS, iter(TEXTS), ["cat"]))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


BAD_FILES = {
    "truncated": (b'{"kind": "bpe", "mer', "damaged or no JSON"),
    "binary": (b"\x80\x00\xff", "damaged or no JSON"),
    "a list": (b"[1, 2]", "Expected `object`"),
    "another program's": (
        b'{"version": "1.0", "model": {}}',
        "missing required field `kind`.*gpt tokenizer train",
    ),
    "kind of another type": (b'{"kind": ["bpe"]}', r"Expected `str`.*\$\.kind"),
    "unknown kind": (b'{"kind": "sentence"}', 'kind "sentence".*gpt2, bpe, word, char'),
    "gpt2 with other merges": (
        b'{"kind":"gpt2","vocab_bpe":"#version: 0.2\\na b\\n"}',
        "damaged: .*vocab.bpe",
    ),
    "gpt2 without merges": (b'{"kind":"gpt2"}', "missing required field `vocab_bpe`"),
    "bpe without merges": (b'{"kind":"bpe","special_tokens":[]}', "missing required field `merges`"),
    "bpe with strings": (b'{"kind":"bpe","special_tokens":[],"merges":["ab"]}', r"\$\.merges\[0\]"),
    "bpe with floats": (b'{"kind":"bpe","special_tokens":[],"merges":[[1.5,2.0]]}', r"\$\.merges\[0\]\[0\]"),
    "bpe ahead of itself": (b'{"kind":"bpe","special_tokens":[],"merges":[[97,256]]}', "does not exist yet"),
    "bpe negative": (b'{"kind":"bpe","special_tokens":[],"merges":[[97,-1]]}', "does not exist yet"),
    "bpe twice": (b'{"kind":"bpe","special_tokens":[],"merges":[[97,98],[97,98]]}', "same bytes"),
    "bpe's special tokens": (b'{"kind":"bpe","special_tokens":"ab","merges":[]}', r"\$\.special_tokens"),
    "words that repeat": (b'{"kind":"word","words":["a","a"]}', "all differ"),
    "an empty word": (b'{"kind":"word","words":["a",""]}', "is empty"),
    "words that are numbers": (b'{"kind":"word","words":[1]}', r"\$\.words\[0\]"),
    "characters that repeat": (b'{"kind":"char","characters":"aba"}', "twice"),
    "characters in a list": (b'{"kind":"char","characters":["a"]}', r"\$\.characters"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_what_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "none", tmp_path / "file" / "tokenizer.json"):
        for load in (load_tokenizer, make_tokenizer, CharTokenizer.load):
            with pytest.raises(FileNotFoundError, match=path.name + ".*: there is no such file"):
                load(path)


def test_a_class_loads_its_own_kind_only(tmp_path: Path) -> None:
    CharTokenizer("ab").save(tmp_path)
    for other in (WordTokenizer, BPETokenizer, GPT2Tokenizer):
        with pytest.raises(ValueError, match=f"holds a char tokenizer, not a {other.kind} one"):
            other.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "nearest"), [("gpt-2", "gpt2"), ("BPE", "bpe"), ("words", "word"), ("chr", "char")]
)
def test_an_unknown_name_gets_the_nearest_one(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown tokenizer '{name}', did you mean '{nearest}'"):
        make_tokenizer(name, TEXTS)


@pytest.mark.parametrize(
    ("name", "texts", "vocab_size", "message"),
    [
        ("bpe", None, None, "none was given"),
        ("word", None, None, "none was given"),
        ("char", None, None, "none was given"),
        ("char", TEXTS, 100, "bpe and word only"),
        ("gpt2", None, 50257, "bpe and word only"),
        ("bpe", TEXTS, 256, "256 is outside 257 to 65536"),
        ("bpe", TEXTS, 0, "0 is outside"),
        ("bpe", TEXTS, 65537, "65537 is outside"),
        ("word", TEXTS, 2, "2 is outside 3 to 65536"),
        ("word", TEXTS, 65537, "65537 is outside"),
        ("word", [" \n"], None, "no word"),
        ("char", ["", ""], None, "no character"),
        ("char", map(chr, range(0x4E00, 0x4E00 + 70_000)), None, "at most 65536"),
        ("bpe", ["a", "bc\ud800"], None, "position 2 .*lone surrogate"),
    ],
)
def test_what_cannot_be_made_says_why(name: str, texts: list[str], vocab_size: int, message: str) -> None:
    if name == "char" and isinstance(texts, map):
        texts = ["".join(c for c in texts if not "\ud800" <= c <= "\udfff")]
    with pytest.raises(ValueError, match=message):
        make_tokenizer(name, texts, vocab_size)


@pytest.mark.parametrize("name", ["bpe", "word", "char"])
def test_one_string_is_not_taken_for_many_texts(name: str) -> None:
    with pytest.raises(TypeError, match=r"\[text\]"):
        make_tokenizer(name, "the cat")


def test_a_file_called_like_a_kind_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CharTokenizer("ab").save("tok")
    CharTokenizer("ab").save("bpe")
    assert make_tokenizer("tok").kind == "char"
    assert make_tokenizer(f"{tmp_path}/bpe").kind == "char"
    assert make_tokenizer("bpe", TEXTS).kind == "bpe"


def doubled(count: int) -> list[tuple[int, int]]:
    """Merges of which each doubles a token: as many bytes as 2 to the power of `count`."""
    return [(97, 97), *((i, i) for i in range(256, 255 + count))]


def many(count: int) -> list[tuple[int, int]]:
    """Merges that differ, each of a few bytes."""
    pairs = [(a, b) for a in range(256) for b in range(256)]
    return pairs[:count]


LIMITS = {
    "doubling merges": ({"kind": "bpe", "special_tokens": [], "merges": doubled(46)}, "131072 bytes"),
    "long tokens": (
        {"kind": "bpe", "special_tokens": [], "merges": [*doubled(15), *((i, 270) for i in range(2000))]},
        "allowed are 65536 and 16777216",
    ),
    "more merges than ids": ({"kind": "bpe", "special_tokens": [], "merges": many(65_400)}, "at most 65536"),
    "many special tokens": (
        {"kind": "bpe", "special_tokens": [f"<{i}>" for i in range(2000)], "merges": []},
        "at most 1024",
    ),
    "a long special token": ({"kind": "bpe", "special_tokens": ["x" * 65_537], "merges": []}, "65536 bytes"),
    "more words than ids": ({"kind": "word", "words": [f"{i}" for i in range(65_535)]}, "at most 65536"),
    "a long word": ({"kind": "word", "words": ["é" * 32_769]}, "65536 bytes"),
    "more characters than ids": ({"kind": "char", "characters": "a" * 70_000}, "at most 65536"),
}


@pytest.mark.parametrize(("fields", "message"), LIMITS.values(), ids=LIMITS)
def test_a_vocabulary_has_limits(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"tokenizer.json: .*{message}"):
            load_tokenizer(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_what_is_trained_stays_within_the_limits(tmp_path: Path) -> None:
    """A line of a million dashes would make tokens of half a million bytes."""
    text = "-" * 1_000_000 + " a b"
    for name, size in (("bpe", 300), ("word", None)):
        made = make_tokenizer(name, [text], size)
        made.save(tmp_path)
        assert load_tokenizer(tmp_path).fingerprint() == made.fingerprint()
        assert max(len(made.decode([i])) for i in range(made.vocab_size)) <= base.MAX_TOKEN
