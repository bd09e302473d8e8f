"""Text to ids and back: `Tokenizer`, the contract, and the two functions by which the rest of the program gets one.

Four kinds: `gpt2` (OpenAI's vocabulary, run by tiktoken), `bpe` (byte-level BPE trained here), `word` and `char`. A
tokenizer is one JSON file that holds all it needs; a run carries its own as `tokenizer.json`.
"""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Protocol, Self

from ..untrusted import InputError
from .base import END_OF_TEXT, FILE_NAME, MAX_VOCAB_SIZE, REMEDY, saved_kind, tokenizer_file
from .bpe import BPETokenizer
from .char import CharTokenizer
from .gpt2 import GPT2Tokenizer
from .word import WordTokenizer

TRAINED = ("bpe", "word", "char")  # made from text; gpt2 has a vocabulary of its own

__all__ = [
    "END_OF_TEXT",
    "FILE_NAME",
    "MAX_VOCAB_SIZE",
    "TRAINED",
    "BPETokenizer",
    "CharTokenizer",
    "GPT2Tokenizer",
    "Tokenizer",
    "WordTokenizer",
    "load_tokenizer",
    "make_tokenizer",
]


class Tokenizer(Protocol):
    """Text to ids and back. Ids are 0 to `vocab_size - 1`, and `vocab_size` is at most 65,536."""

    @property
    def kind(self) -> str:
        """ "gpt2", "bpe", "word" or "char"."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""

    @property
    def end_of_text(self) -> int:
        """The id of `<|endoftext|>`."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""

    def encode(
        self,
        text: str,
        allowed_special: Collection[str] | Literal["all"] = frozenset(),
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> list[int]:
        """Ids of `text`, with tiktoken's rules for special tokens.

        The text of an allowed special token becomes its one id, the longest first where several begin at the same
        place. The text of a disallowed one ("all": every special token that is not allowed) raises ValueError, so that
        nobody's text can pose as a control token; what is in neither set is plain text. ValueError also for a lone
        surrogate, its position named, and in a `char` tokenizer for an unknown character.
        """

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` as plain text, special tokens' names included: what a corpus is encoded with."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError names an id outside the vocabulary."""

    def save(self, path: str | Path) -> None:
        """Write the file `path`, or `tokenizer.json` inside the folder `path`."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a tokenizer of this very kind; `load_tokenizer` reads any."""

    def fingerprint(self) -> str:
        """sha256 of the saved form in hex: equal for tokenizers that give equal ids, a key for caches."""


KINDS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (GPT2Tokenizer, BPETokenizer, WordTokenizer, CharTokenizer)
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved at `path`: its JSON file, or a run folder that holds `tokenizer.json`.

    MissingFile if there is none; InputError for a damaged file or one that another program wrote.
    """
    file = tokenizer_file(path)
    kind = saved_kind(file)
    if kind not in KINDS:
        raise InputError(file, f'it has the kind "{kind}", not one of {", ".join(KINDS)}', REMEDY)
    return KINDS[kind].load(file)


def make_tokenizer(
    name: str | Path, texts: Iterable[str] | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """A tokenizer by name; `bpe`, `word` and `char` are made from `texts`.

    Args:
        name: `gpt2`, `gpt2:FOLDER` (the folder of its `vocab.bpe`), `bpe`, `word`, `char`, or the path of a saved one.
            A file that is called like a name is reached as `./bpe`.
        texts: training texts, read once. Not looked at for `gpt2` or a saved tokenizer.
        vocab_size: wanted for `bpe` (4,096 if left out), the most allowed for `word`; the other kinds have a size of
            their own and take none. The result's `vocab_size` is what counts: a small text can give fewer.

    Raises ValueError for an unknown name (the nearest one is named), missing texts or an impossible size, and
    FileNotFoundError for a missing file.
    """
    name = str(name)
    if vocab_size is not None and name not in ("bpe", "word"):
        raise ValueError(f"vocab_size is for bpe and word only: the tokenizer {name} has a size of its own")
    if name in TRAINED:
        if texts is None:
            raise ValueError(f"a {name} tokenizer is made from text, and none was given")
        if name == "bpe":
            return BPETokenizer.train(texts, 4096 if vocab_size is None else vocab_size)
        return WordTokenizer.train(texts, vocab_size) if name == "word" else CharTokenizer.train(texts)
    kind, colon, folder = name.partition(":")
    if kind == "gpt2":
        return GPT2Tokenizer.find(folder if colon else None)
    path = Path(name)
    if path.exists() or path.suffix == ".json" or path.name != name:
        return load_tokenizer(path)
    nearest = get_close_matches(name.lower(), KINDS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown tokenizer {name!r}, did you mean {nearest!r}? It takes {', '.join(KINDS)}, gpt2:FOLDER or the "
        "path of a saved tokenizer"
    )
