"""What every tokenizer shares: special tokens, refusal of lone surrogates, checked ids, one JSON file on disk.

A tokenizer class says how plain text becomes ids and back and what of it is saved; the rules around that stand here
once, so that the four kinds cannot drift apart.
"""

import hashlib
import json
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypedDict

from ..files import make_folder, write_file
from ..untrusted import MAX_JSON, InputError, read_json

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
MAX_VOCAB_SIZE = 65536  # token shards hold ids as uint16
MAX_SPECIAL_TOKENS = 1024  # every text is searched for each of them
# A few merges that each double a token would fill any memory. GPT-2's longest token has 128 bytes, all together 0.3 MB.
MAX_TOKEN = 1 << 16  # bytes
MAX_TOKENS = 16 << 20  # bytes of all tokens of a BPE
PART = 1 << 20  # characters of a text that are worked on in one go
BOUNDARY = re.compile(r"(?<=\S)[ \n]")
REMEDY = "take the tokenizer.json of a run, or one that `gpt tokenizer train` wrote"


class Saved(TypedDict):
    """What every saved tokenizer holds."""

    kind: str


class TokenizerBase(ABC):
    """Shared half of every tokenizer; the contract is `Tokenizer` in this package's `__init__`.

    A subclass sets `kind` and `Fields`, calls `__init__` with its sizes and fills in the three abstract methods.
    """

    kind: str
    Fields: ClassVar[Any]
    """A TypedDict: what the saved file holds beside the kind, and the arguments of the class."""

    def __init__(self, vocab_size: int, special_tokens: dict[str, int]) -> None:
        require_size(vocab_size)
        self.vocab_size = vocab_size
        self.special_tokens = special_tokens
        self.end_of_text = special_tokens[END_OF_TEXT]

    @abstractmethod
    def _encode(self, text: str, offset: int) -> list[int]:
        """Ids of text without special tokens; `offset` is its place in the caller's text, for messages."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that all lie inside the vocabulary."""

    @abstractmethod
    def _fields(self) -> dict[str, Any]:
        """What the saved file holds beside the kind."""

    def encode(
        self,
        text: str,
        allowed_special: Collection[str] | Literal["all"] = frozenset(),
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> list[int]:
        known = set(self.special_tokens)
        allowed = known if allowed_special == "all" else known & set(allowed_special)
        disallowed = known - allowed if disallowed_special == "all" else set(disallowed_special)
        refuse_lone_surrogates(text)
        if len(found := split_at(disallowed, text)) > 1:
            raise ValueError(
                f"position {len(found[0])} of the text holds the special token {found[1]!r}: pass "
                f"allowed_special={{{found[1]!r}}} to encode it as one token, or call encode_ordinary to take "
                "it as plain text"
            )
        ids: list[int] = []
        offset = 0
        for i, part in enumerate(split_at(allowed, text)):
            ids.extend([self.special_tokens[part]] if i % 2 else self._encode(part, offset))
            offset += len(part)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        refuse_lone_surrogates(text)
        return self._encode(text, 0)

    def decode(self, ids: Iterable[int]) -> str:
        checked = [operator.index(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is not in this vocabulary: its ids are 0 to {self.vocab_size - 1}")
        return self._decode(checked)

    def _saved_form(self) -> bytes:
        fields = {"kind": self.kind, **self._fields()}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    def fingerprint(self) -> str:
        return hashlib.sha256(self._saved_form()).hexdigest()

    def save(self, path: str | Path) -> None:
        path, data = tokenizer_file(path), self._saved_form()
        if len(data) > MAX_JSON:
            raise ValueError(
                f"this vocabulary takes {len(data):,} bytes, and {MAX_JSON:,} can be read back; make a smaller one"
            )
        make_folder(path.parent)
        write_file(path, data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        file = tokenizer_file(path)
        if (kind := saved_kind(file)) != cls.kind:
            raise InputError(file, f"it holds a {kind} tokenizer, not a {cls.kind} one", REMEDY)
        fields = read_json(file, cls.Fields, REMEDY)
        try:
            return cls(**fields)
        except ValueError as error:
            raise InputError(file, f"its {kind} tokenizer is damaged: {error}", REMEDY) from None


def require_size(vocab_size: int) -> None:
    """Raise ValueError where there are more tokens than ids."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens is too large: ids are stored in 16 bits, "
            f"so there can be at most {MAX_VOCAB_SIZE}"
        )


def require_different(name: str, texts: Collection[str]) -> None:
    """Raise ValueError unless the texts of tokens differ, none is empty and none longer than a token may be."""
    if len(set(texts)) < len(texts):
        raise ValueError(f"its {name} do not all differ")
    refuse_lone_surrogates("".join(texts))
    if not all(0 < len(text.encode()) <= MAX_TOKEN for text in texts):
        raise ValueError(f"one of its {name} is empty or has more than {MAX_TOKEN} bytes")


def split_at(special_tokens: Collection[str], text: str) -> list[str]:
    """Text cut at special tokens: plain parts at even places, special tokens at odd ones.

    Where several tokens begin at the same character the longest one counts.
    """
    if not any(token in text for token in special_tokens):
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)


def training_parts(texts: Iterable[str], special_tokens: Collection[str] = (END_OF_TEXT,)) -> Iterator[str]:
    """The plain parts of training texts, long ones cut: a special token's own characters must not shape the vocabulary."""
    if isinstance(texts, str):
        raise TypeError("texts takes an iterable of strings, not one string: pass [text]")
    for text in texts:
        refuse_lone_surrogates(text)
        for part in split_at(special_tokens, text)[::2]:
            yield from bounded_parts(part)


def bounded_parts(text: str) -> Iterator[str]:
    """Cut a long text where no token can cross, so that a book needs no list of all its tokens.

    Every pattern in use (GPT-2's, words, characters) ends a unit where whitespace follows something else, and looks no
    further: the units of the parts are the units of the whole.
    """
    start = 0
    while (cut := BOUNDARY.search(text, start + PART)) is not None:
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def refuse_lone_surrogates(text: str) -> None:
    """Raise ValueError where text holds half a surrogate pair, which no encoding can store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"position {error.start} of the text holds U+{ord(text[error.start]):04X}, a lone surrogate and no "
            "character: read the text as UTF-8, or leave it out"
        ) from None


def tokenizer_file(path: str | Path) -> Path:
    """The file meant by `path`: itself, or `tokenizer.json` inside a folder (a run)."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def saved_kind(file: Path) -> str:
    """The kind of a saved tokenizer. MissingFile, or InputError if it is none."""
    return read_json(file, Saved, REMEDY)["kind"]
