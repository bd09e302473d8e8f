"""Byte-level BPE: ids against the plain encoder's, tiktoken's and Hugging Face's. Its merges: test_merges.py."""

import logging
import random
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.data.tokenizers import BPETokenizer, base
from fusedgpt.data.tokenizers.bpe import PIECES

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
UNICODE = "Ünïcödé café cafe\u0301 naïve 😉😉👩‍👩‍👧 日本語日本 Привет привет １２３ ½ ﷺ \u00a0x \u200b\u2003 \r\n\t\n\n   a  \x00\x1c"
TEXT = (Path(__file__).read_text("utf-8") + UNICODE * 5).replace("<|", "<")
SPECIALS = ["<|a|>", "<|a|> and b", "<|a|><|b|>", " <x y> ", "<|é|>"]

# Characters of every version of Unicode in use: what is not assigned in Python's may be a letter in another.
known = st.text(st.characters(exclude_categories=("Cs", "Cn")))
spaced = st.text("ab'sl1 \t\n\r\u00a0\u2003é\u0301😉日-<|>")
anything = st.text()
samples = st.lists(st.sampled_from(regex.findall(r"\X", UNICODE) + TEXT.split() + [" ", "\n", "   "])).map(
    "".join
)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 1200, SPECIALS)


def test_wikipedias_example() -> None:
    bpe = BPETokenizer.train(["aaabdaaabac"], 256 + 3 + 1)
    assert bpe.encode("aaabdaaabac") == bpe.encode_plain("aaabdaaabac") == [258, 100, 258, 97, 99]
    assert (bpe.vocab_size, bpe.end_of_text) == (260, 259)


def test_training_on_a_long_text_keeps_no_list_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PART", 1 << 16)
    text = "ab cd " * 200_000
    tracemalloc.start()
    try:
        assert BPETokenizer.train([text], 260).vocab_size == 260
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()


def test_training_reads_texts_one_by_one() -> None:
    parts = TEXT.splitlines(keepends=True)
    one, many = BPETokenizer.train(parts, 400), BPETokenizer.train((part for part in parts), 400)
    doubled = BPETokenizer.train(parts + parts, 400)
    assert one.fingerprint() == many.fingerprint() == doubled.fingerprint()
    assert BPETokenizer.train(reversed(parts), 400).fingerprint() == one.fingerprint()


def test_special_tokens_do_not_shape_the_merges() -> None:
    plain = BPETokenizer.train(["ab", "cd"], 260)
    assert BPETokenizer.train(["ab<|endoftext|>cd"], 260).fingerprint() == plain.fingerprint()


def test_a_small_text_gives_a_small_vocabulary_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bpe = BPETokenizer.train(["abab"], 4096)
    assert bpe.vocab_size == 256 + 2 + 1
    assert bpe.encode("abab") == [257]
    assert "only 2 merges" in caplog.text
    assert "259 tokens instead of 4096" in caplog.text
    assert BPETokenizer.train([], 257).encode("é") == [0xC3, 0xA9]


@given(st.one_of(spaced, anything))
def test_pieces_are_those_of_gpt2s_pattern(text: str) -> None:
    assert regex.findall(PIECES, text) == regex.findall(GPT2_PATTERN, text)
    assert "".join(regex.findall(PIECES, text)) == text


@settings(deadline=None, max_examples=300)
@given(st.one_of(spaced, known, samples))
def test_tiktoken_and_the_plain_encoder_give_equal_ids(bpe: BPETokenizer, text: str) -> None:
    assert bpe.encode_ordinary(text) == bpe.encode_plain(text)


def test_equal_ids_on_the_training_text(bpe: BPETokenizer) -> None:
    assert bpe.encode_ordinary(TEXT) == bpe.encode_plain(TEXT)
    assert len(bpe.encode_ordinary(TEXT)) < len(TEXT) / 2


@settings(deadline=None)
@given(st.one_of(spaced, samples, st.text(st.characters(max_codepoint=0x2FF))))
def test_ids_equal_hugging_faces(bpe: BPETokenizer, text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    written = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else "" for b in range(256)]
    others = iter(range(256, 512))
    written = [character or chr(next(others)) for character in written]
    merges = []
    for a, b in bpe.merges:
        merges.append((written[a], written[b]))
        written.append(written[a] + written[b])
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(written)}, merges=merges)
    )
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert bpe.encode_ordinary(text) == theirs.encode(text).ids


@settings(deadline=None)
@given(st.one_of(anything, samples))
def test_every_string_comes_back(bpe: BPETokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode_ordinary(text)) == text
    assert bpe.decode(bpe.encode(text, allowed_special="all")) == text
    assert bpe.decode(bpe.encode_plain(text)) == text


def test_half_a_character_decodes_to_the_replacement_mark(bpe: BPETokenizer) -> None:
    assert bpe.decode([0xC3]) == "\ufffd"
    assert bpe.decode([0xC3, 0xA9]) == "é"


def test_special_tokens_with_spaces_and_overlaps(bpe: BPETokenizer) -> None:
    first = bpe.vocab_size - len(SPECIALS) - 1
    assert bpe.special_tokens == {token: first + i for i, token in enumerate([*SPECIALS, "<|endoftext|>"])}
    a, a_and_b, a_b, x_y, e, end = range(first, bpe.vocab_size)
    cases = {
        "<|a|>": [a],
        "<|a|> and b": [a_and_b],
        "<|a|> and c": [a, *bpe.encode(" and c")],
        "<|a|><|b|>": [a_b],
        "<|a|><|a|><|b|><|b|>": [a, a_b, *bpe.encode("<|b|>")],
        "1 <x y> 2<|é|>": [*bpe.encode("1"), x_y, *bpe.encode("2"), e],
        "1 <x y>": bpe.encode("1 <x y>"),
        "a<|endoftext|>  b": [*bpe.encode("a"), end, *bpe.encode("  b")],
    }
    for text, ids in cases.items():
        assert bpe.encode(text, allowed_special="all") == ids
        assert bpe.decode(ids) == text
    assert bpe.encode("<|a|><|b|>", allowed_special={"<|a|>"}, disallowed_special=()) == [
        a,
        *bpe.encode("<|b|>"),
    ]
    assert bpe.encode_ordinary("<|a|> and b") == bpe.encode_plain("<|a|> and b")
    for text in SPECIALS:
        with pytest.raises(ValueError, match="special token"):
            bpe.encode(f"x{text}y")


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["<|p|>", "<q r>", "<|endoftext|>", " ", "  ", "the", "é", "<|", "\n"])).map(
        "".join
    ),
    st.one_of(st.just("all"), st.sets(st.sampled_from(["<|p|>", "<q r>", "<|endoftext|>", "<|other|>"]))),
    st.one_of(st.just("all"), st.sets(st.sampled_from(["<|p|>", "<q r>", "the"]))),
)
def test_special_tokens_equal_tiktokens(text: str, allowed: set[str], disallowed: set[str]) -> None:
    ours = BPETokenizer.train(["the the <| <|"], 270, ["<|p|>", "<q r>"])
    ranks = {ours.token_bytes[i]: i for i in range(ours.vocab_size - 3)}
    theirs = tiktoken.Encoding(
        "x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=ours.special_tokens
    )
    try:
        ids = theirs.encode(text, allowed_special=allowed, disallowed_special=disallowed)
    except ValueError:
        with pytest.raises(ValueError, match="special token"):
            ours.encode(text, allowed, disallowed)
    else:
        assert ours.encode(text, allowed, disallowed) == ids


def test_special_tokens_of_its_own() -> None:
    assert BPETokenizer([], ["<|endoftext|>", "<|x|>", "<|x|>"]).special_tokens == {
        "<|endoftext|>": 256,
        "<|x|>": 257,
    }
    for wrong in ("", "\ud800"):
        with pytest.raises(ValueError, match=r"is empty|lone surrogate"):
            BPETokenizer.train(["a"], 300, [wrong])
    with pytest.raises(ValueError, match="outside 259 to 65536"):
        BPETokenizer.train(["a"], 258, ["<|x|>", "<|y|>"])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(990, 1010),
    st.text(" \n\t\u2003", min_size=1, max_size=3),
    st.sampled_from(["", "x", " x", "1é"]),
)
def test_long_white_space_is_cut_where_its_piece_ends(
    bpe: BPETokenizer, length: int, blank: str, after: str
) -> None:
    text = f"a{blank * length}{after} b"
    assert bpe.encode(text) == bpe.encode_plain(text)


@pytest.mark.parametrize("character", [" ", "\n", "x", "^", "é", "7"])
def test_a_million_times_the_same_character(bpe: BPETokenizer, character: str) -> None:
    text = f"{character * 1_100_000}z"  # tiktoken's regex engine panics on this much white space
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("blank", [" ", "\n", "\u2003"])
@pytest.mark.parametrize("start", [0, 1, 499, 500, 501, 999])
def test_a_thousand_blanks_are_cut_wherever_they_begin(
    bpe: BPETokenizer, blank: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    ids = bpe._encoding.encode_ordinary
    monkeypatch.setattr(
        bpe, "_encoding", SimpleNamespace(encode_ordinary=lambda t: parts.append(t) or ids(t))
    )
    text = f"{'x' * start}{blank * 1000} y"
    assert bpe.encode(text) == bpe.encode_plain(text)
    assert parts == [f"{'x' * start}{blank * 1000}", " y"]


def test_training_is_fast_even_without_white_space() -> None:
    """One piece of 10^5 letters: anything quadratic in a piece's length takes minutes."""
    letters = "".join(random.Random(0).choices("etaoinshrdlu", k=100_000))
    begin = time.perf_counter()
    assert BPETokenizer.train([letters], 2048).vocab_size == 2048
    assert time.perf_counter() - begin < 10


def test_a_megabyte_trains_and_encodes_in_time(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text("utf-8")
    begin = time.perf_counter()
    bpe = BPETokenizer.train([text], 4096)
    trained = time.perf_counter()
    ids = bpe.encode(text)
    encoded = time.perf_counter()
    assert bpe.vocab_size == 4096
    assert bpe.decode(ids) == text
    assert trained - begin < 20
    assert encoded - trained < 2
