"""One token a character: the vocabulary of small experiments such as the characters of Shakespeare."""

from collections.abc import Iterable
from typing import Any, Self, TypedDict

from .base import END_OF_TEXT, TokenizerBase, require_size, training_parts


class Fields(TypedDict):
    characters: str


class CharTokenizer(TokenizerBase):
    """Ids of `characters` in their order, then `<|endoftext|>`. A character that is not among them is a ValueError."""

    kind = "char"
    Fields = Fields

    def __init__(self, characters: str) -> None:
        require_size(len(characters) + 1)
        self._tokens = [*characters, END_OF_TEXT]
        self._ids = {character: i for i, character in enumerate(characters)}
        if len(self._ids) < len(characters):
            raise ValueError("a character occurs twice in the vocabulary")
        super().__init__(len(self._tokens), {END_OF_TEXT: len(characters)})

    @classmethod
    def train(cls, texts: Iterable[str]) -> Self:
        """Take every different character of the texts, in the order of code points. ValueError without any."""
        characters: set[str] = set()
        for part in training_parts(texts):
            characters.update(part)
        if not characters:
            raise ValueError("there is no character in the text to make a vocabulary of; give another text")
        return cls("".join(sorted(characters)))

    def _encode(self, text: str, offset: int) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            unknown = error.args[0]
            raise ValueError(
                f"position {offset + text.index(unknown)} of the text holds {unknown!r} (U+{ord(unknown):04X}), which "
                f"is not among the {len(self._ids)} characters this tokenizer was made from"
            ) from None

    def _decode(self, ids: list[int]) -> str:
        return "".join([self._tokens[i] for i in ids])

    def _fields(self) -> dict[str, Any]:
        return {"characters": "".join(self._tokens[:-1])}
