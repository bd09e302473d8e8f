"""Words and characters: the numbers known for The Verdict, and what is lost and kept on the way back."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedgpt.data.tokenizers import CharTokenizer, WordTokenizer
from fusedgpt.data.tokenizers.word import split_items


def test_the_verdict_in_words(shared_data: Path) -> None:
    text = (shared_data / "the-verdict.txt").read_text("utf-8")
    words = WordTokenizer.train([text])
    assert len(split_items(text)) == len(words.encode(text)) == 4690
    assert len(set(words.encode(text))) == 1130
    assert words.vocab_size == 1132
    assert words.end_of_text == 1130
    assert words.encode("Hello <|endoftext|> <unk>", allowed_special="all") == [1131, 1130, 1131]
    sentence = '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
    assert words.decode(words.encode(sentence)) == sentence.replace("'s", "' s").replace('"It', '" It')


def test_words_are_sorted_and_specials_come_last() -> None:
    words = WordTokenizer.train(["b--a, (b)\n", "B 'c'? <unk> <|unk|><|endoftext|>a"])
    assert split_items("b--a, (b)\n") == ["b", "--", "a", ",", "(", "b", ")"]
    assert [words.decode([i]) for i in range(words.vocab_size)] == [
        *["'", "(", ")", ",", "--", "?", "B", "a", "b", "c"],
        *["<|endoftext|>", "<unk>"],
    ]
    unknown = words.vocab_size - 1
    assert words.encode("never <unk> <|unk|>") == [unknown] * 3
    assert words.encode_ordinary("<|endoftext|>") == [unknown]
    assert words.decode(words.encode("a, b -- c? <unk>")) == "a, b -- c? <unk>"


@given(st.text("ab ,.:;?_!\"()'-\n"))
def test_words_and_marks_keep_their_ids_through_a_decode(text: str) -> None:
    words = WordTokenizer.train([text, "a"])
    ids = words.encode(text)
    assert words.encode(words.decode(ids)) == ids
    assert words.vocab_size - 1 not in ids


def test_a_vocabulary_size_keeps_the_most_frequent_words() -> None:
    words = WordTokenizer.train(["d d d c c b b a"], vocab_size=4)
    assert [words.decode([i]) for i in range(words.vocab_size)] == ["b", "d", "<|endoftext|>", "<unk>"]
    assert words.encode("a b c d") == [3, 0, 3, 1]
    many = [str(i) for i in range(65_535)]
    with pytest.raises(ValueError, match="65535 different words"):
        WordTokenizer.train(many)
    assert WordTokenizer.train(many, 65_536).vocab_size == 65_536
    assert WordTokenizer.train(many[1:]).vocab_size == 65_536


def test_characters_are_sorted_and_end_of_text_comes_last() -> None:
    chars = CharTokenizer.train(["hé", "llo\n", "<|endoftext|>"])
    assert [chars.decode([i]) for i in range(chars.vocab_size)] == ["\n", "h", "l", "o", "é", "<|endoftext|>"]
    assert chars.encode("hello".replace("e", "é")) == [1, 4, 2, 2, 3]


@given(st.text(min_size=1))
def test_a_text_comes_back_from_its_characters(text: str) -> None:
    chars = CharTokenizer.train([text])
    assert chars.decode(chars.encode(text)) == text
    assert chars.vocab_size == len(set(text)) + 1


def test_an_unknown_character_is_named_with_its_position() -> None:
    chars = CharTokenizer.train(["abc"])
    with pytest.raises(ValueError, match=r"position 4 .*'d' \(U\+0064\).* 3 characters"):
        chars.encode("abcadd")
    with pytest.raises(ValueError, match=r"position 15 .*'\\n'"):
        chars.encode("ab<|endoftext|>\n", allowed_special="all")
    with pytest.raises(ValueError, match=r"position 0 .*'<'"):
        chars.encode_ordinary("<|endoftext|>")
