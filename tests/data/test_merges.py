"""Merges of byte-pair encoding, against a trainer that recounts everything and against Hugging Face's."""

import random
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from fusedgpt.data.corpus import open_corpus
from fusedgpt.data.tokenizers import merges
from fusedgpt.data.tokenizers.bpe import PIECES
from fusedgpt.data.tokenizers.gpt2 import GPT2Tokenizer
from fusedgpt.data.tokenizers.merges import learn_merges

TEXT = Path(__file__).read_text("utf-8")


def recounting_merges(words: Mapping[bytes, int], count: int) -> list[tuple[int, int]]:
    """The definition: count all pairs, join the most frequent (then smallest) one everywhere, start again."""
    sequences = [(list(word), n) for word, n in words.items()]
    merges: list[tuple[int, int]] = []
    while len(merges) < count:
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, n in sequences:
            for pair in pairwise(ids):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in sequences:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [256 + len(merges)]
                i += 1
        merges.append(best)
    return merges


def random_words(seed: int, n: int, letters: int) -> dict[bytes, int]:
    """Different words of 1 to 20 bytes, the k-th of which occurs about 1 / k times as often as the first."""
    draw = random.Random(seed)
    alphabet = draw.sample(range(256), letters)
    weights = [1 / (1 + i) for i in range(letters)]
    words = {bytes(draw.choices(alphabet, weights, k=draw.randint(1, 20))) for _ in range(n)}
    return {word: n // (1 + draw.randrange(n)) for word in sorted(words)}


@given(st.dictionaries(st.text("ab", max_size=12).map(str.encode), st.integers(1, 3), max_size=6))
def test_merges_equal_a_trainer_that_recounts(words: dict[bytes, int]) -> None:
    assert learn_merges(words, 30) == recounting_merges(words, 30)


@given(st.dictionaries(st.text("abcdef", max_size=9).map(str.encode), st.integers(0, 40), max_size=40))
def test_merges_of_more_letters(words: dict[bytes, int]) -> None:
    words = {word: n for word, n in words.items() if n}
    assert learn_merges(words, 40) == recounting_merges(words, 40)


@pytest.mark.parametrize("kept", [1, 8, 1000])
@pytest.mark.parametrize("letters", [2, 5, 30, 250])
def test_merges_of_random_words(letters: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "KEPT", kept)
    words = random_words(letters, 150, letters)
    assert learn_merges(words, 400) == recounting_merges(words, 400)


def test_a_run_of_one_letter_goes_on_before_a_rarer_pair() -> None:
    assert learn_merges({b"aaaaaaaa": 10, b"bc": 25}, 3) == [(97, 97), (256, 256), (98, 99)]


def test_merges_of_a_real_text() -> None:
    words = {word.encode(): n for word, n in Counter(regex.findall(PIECES, TEXT)).items()}
    assert learn_merges(words, 250) == recounting_merges(words, 250)


def test_a_full_vocabulary() -> None:
    """65,279 merges: the last id is the one below BORDER."""
    words = random_words(0, 20_000, 250)
    found = learn_merges(words, 65_536 - 257)
    assert len(set(found)) == 65_279
    assert 256 + len(found) - 1 == merges.BORDER - 1
    assert max(map(max, found)) < 256 + len(found)


def test_memory_is_bounded_by_the_bytes_of_the_words() -> None:
    words = random_words(0, 20_000, 40)
    tracemalloc.start()
    try:
        learn_merges(words, 5_000)
        assert tracemalloc.get_traced_memory()[1] < 75 * sum(map(len, words))
    finally:
        tracemalloc.stop()


def hugging_faces(texts: Iterable[str], vocab_size: int) -> list[str]:
    """The vocabulary that their trainer makes, in the order of its ids."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    return [token for token, _ in sorted(theirs.get_vocab().items(), key=lambda item: item[1])]


def languages() -> str:
    """Words of many scripts: each of 60 letters that begin at another code point."""
    draw = random.Random(0)
    words = []
    for first in range(0x41, 0xD000, 0x333):
        letters = [c for c in map(chr, range(first, first + 60)) if c.isalpha()] or ["x"]
        words += ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(100)]
    return " ".join(draw.choices(words, k=20_000))


@pytest.mark.parametrize(
    ("name", "vocab_size"), [("this file", 1000), ("tales", 2000), ("shakespeare", 8192), ("languages", 8192)]
)
def test_merges_equal_hugging_faces(name: str, vocab_size: int, request: pytest.FixtureRequest) -> None:
    """Its trainer breaks ties alike, but its ids 0 to 255 are GPT-2's order of bytes."""
    if name == "shakespeare":
        texts = [(request.getfixturevalue("shared_data") / "tinyshakespeare.txt").read_text("utf-8")]
    elif name == "tales":
        texts = list(open_corpus("tales:300").train_texts())
    else:
        texts = [TEXT if name == "this file" else languages()]
    theirs = hugging_faces(texts, vocab_size)
    order = GPT2Tokenizer.byte_order
    words = Counter(piece for text in texts for piece in regex.findall(PIECES, text))
    ours = learn_merges(
        {bytes(order.index(b) for b in word.encode()): n for word, n in words.items()}, vocab_size - 256
    )
    written = theirs[:256]
    for a, b in ours:
        written.append(written[a] + written[b])
    assert written == theirs
