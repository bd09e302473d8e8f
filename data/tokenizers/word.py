"""Whole words and punctuation marks as tokens: the simplest vocabulary to look at, and to see the limits of.

Words that training did not see become `<unk>`, and white space is not kept, so unlike the other kinds this one gives
back a text that reads the same, not the same text.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Self, TypedDict

from .base import (
    END_OF_TEXT,
    MAX_TOKEN,
    MAX_VOCAB_SIZE,
    TokenizerBase,
    require_different,
    require_size,
    training_parts,
)

UNKNOWN = "<unk>"
UNKNOWN_NAMES = (UNKNOWN, "<|unk|>")
ITEMS = re.compile(r"""([,.:;?_!"()']|--|\s)""")
SPACE_BEFORE_MARK = re.compile(r""" ([,.:;?!"()'])""")


class Fields(TypedDict):
    words: list[str]


class WordTokenizer(TokenizerBase):
    """Ids of `words` in their order, then `<|endoftext|>`, then `<unk>`, for which `<|unk|>` is read too."""

    kind = "word"
    Fields = Fields

    def __init__(self, words: list[str]) -> None:
        require_size(len(words) + 2)
        require_different("words", words)
        self._tokens = [*words, END_OF_TEXT, UNKNOWN]
        self._unknown = len(words) + 1
        self._ids = {word: i for i, word in enumerate(words)}
        super().__init__(len(self._tokens), {END_OF_TEXT: len(words)})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int | None = None) -> Self:
        """Take every different word of the texts in sorted order, or the most frequent ones that `vocab_size` allows.

        Of words that are equally frequent the first in sorted order stay; one that is too long for a token is unknown. ValueError if the texts hold no word, or more
        words than ids and no `vocab_size` was given.
        """
        if vocab_size is not None and not 3 <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size {vocab_size} is outside 3 to {MAX_VOCAB_SIZE}")
        counts: Counter[str] = Counter()
        for part in training_parts(texts):
            counts.update(split_items(part))
        words = sorted(word for word in counts.keys() - set(UNKNOWN_NAMES) if len(word.encode()) <= MAX_TOKEN)
        if not words:
            raise ValueError("there is no word in the text to make a vocabulary of; give another text")
        if vocab_size is not None:
            words = sorted(sorted(words, key=lambda word: -counts[word])[: vocab_size - 2])
        elif len(words) + 2 > MAX_VOCAB_SIZE:
            raise ValueError(
                f"the text has {len(words)} different words, more than ids: give a vocab_size of at most "
                f"{MAX_VOCAB_SIZE}, and the rarest become {UNKNOWN}"
            )
        return cls(words)

    def _encode(self, text: str, offset: int) -> list[int]:
        return [self._ids.get(item, self._unknown) for item in split_items(text)]

    def _decode(self, ids: list[int]) -> str:
        return SPACE_BEFORE_MARK.sub(r"\1", " ".join([self._tokens[i] for i in ids]))

    def _fields(self) -> dict[str, Any]:
        return {"words": self._tokens[:-2]}


def split_items(text: str) -> list[str]:
    """Words and punctuation marks in order, white space dropped."""
    return [item for item in ITEMS.split(text) if item.strip()]
