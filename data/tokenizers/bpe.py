"""Byte-level byte-pair encoding: trained on texts, and text to ids and back.

Text is cut into pieces by GPT-2's pattern; a piece's UTF-8 bytes are the first symbols, ids 0 to 255 (Radford et al.
2019, section 2.2). `merges.py` learns which pairs of symbols are joined into new ones. Special tokens take the last ids.

`encode_plain` applies the merges in the order they were learnt, in a few lines of Python. tiktoken does the real work; it chooses by
the rank of the joined bytes instead of by the pair, which is the same here: pieces that hold the same bytes between two
token borders are always in the same state of merging, so no bytes ever get two different pairs.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict

import regex

from .base import (
    END_OF_TEXT,
    MAX_SPECIAL_TOKENS,
    MAX_TOKEN,
    MAX_TOKENS,
    MAX_VOCAB_SIZE,
    TokenizerBase,
    refuse_lone_surrogates,
    require_different,
    require_size,
    training_parts,
)
from .merges import learn_merges

if TYPE_CHECKING:
    import tiktoken

logger = logging.getLogger(__name__)

# GPT-2's pieces. Its own pattern ends in `\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`; possessive repeats find the
# same pieces and do not fill the stack of tiktoken's regex engine, which panics where a repeat has kept 10^6 ways back.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Only `\s+(?!\S)` still gives a character back, so long runs of white space are cut there, at the end of their piece.
LONG_RUN = regex.compile(r"(?=\s\S)(?<=\s{1000})")
MAX_PIECE = (
    MAX_TOKEN // 4
)  # characters: in training, longer pieces are cut, so that no token gets longer than it may


class Fields(TypedDict):
    merges: list[tuple[int, int]]
    special_tokens: list[str]


class BPETokenizer(TokenizerBase):
    """Byte-level BPE: bytes, then `merges` in the order they were learnt, then special tokens.

    `merges[i]` is the pair of ids that joins into id `256 + i`. `<|endoftext|>` is always among the special tokens: last
    of them, unless `special_tokens` names it elsewhere. ValueError if a merge joins what does not exist yet or makes
    bytes that exist already, and if there are too many tokens or bytes in them.
    """

    kind = "bpe"
    Fields: ClassVar[Any] = Fields
    byte_order: ClassVar[bytes] = bytes(range(256))  # the byte that id 0, 1, ... 255 stands for

    def __init__(self, merges: Sequence[tuple[int, int]], special_tokens: Iterable[str] = ()) -> None:
        specials = _special_tokens(special_tokens)
        require_size(256 + len(merges) + len(specials))
        tokens = [bytes([byte]) for byte in self.byte_order]
        size = 0
        for a, b in merges:
            if not (0 <= a < len(tokens) and 0 <= b < len(tokens)):
                raise ValueError(
                    f"merge {len(tokens) - 256} joins {a} and {b}, of which one does not exist yet"
                )
            length = len(tokens[a]) + len(tokens[b])
            size += length
            if length > MAX_TOKEN or size > MAX_TOKENS:
                raise ValueError(
                    f"merge {len(tokens) - 256} makes a token of {length} bytes, {size} with those before; allowed are "
                    f"{MAX_TOKEN} and {MAX_TOKENS}"
                )
            tokens.append(tokens[a] + tokens[b])
        self.merges = {pair: 256 + i for i, pair in enumerate(merges)}
        self._ranks = {token: i for i, token in enumerate(tokens)}
        if len(self._ranks) < len(tokens):
            raise ValueError("two merges make the same bytes")

        self.token_bytes = tokens + [token.encode() for token in specials]
        super().__init__(len(self.token_bytes), {token: len(tokens) + i for i, token in enumerate(specials)})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str] = ()) -> Self:
        """Learn merges until there are `vocab_size` tokens, bytes and special tokens included.

        Pieces never reach from one text into the next, so a long text may come in parts. Where the texts have too few
        merges the vocabulary stays smaller and a warning is logged: what counts is the result's `vocab_size`.
        ValueError for a `vocab_size` below 256 + special tokens or above 65,536.
        """
        specials = _special_tokens(special_tokens)
        least = 256 + len(specials)
        if not least <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {vocab_size} is outside {least} to {MAX_VOCAB_SIZE}: 256 bytes and "
                f"{len(specials)} special tokens are always in, and ids are stored in 16 bits"
            )
        pieces: Counter[str] = Counter()
        for part in training_parts(texts, specials):
            pieces.update(regex.findall(PIECES, part))
        for piece in [piece for piece in pieces if len(piece) > MAX_PIECE]:
            n = pieces.pop(piece)
            for start in range(0, len(piece), MAX_PIECE):
                pieces[piece[start : start + MAX_PIECE]] += n
        merges = learn_merges({piece.encode(): n for piece, n in pieces.items()}, vocab_size - least)
        if len(merges) < vocab_size - least:
            logger.warning(
                "the text has only %d merges, so the vocabulary has %d tokens instead of %d",
                len(merges),
                least + len(merges),
                vocab_size,
            )
        return cls(merges, specials)

    def _encode(self, text: str, offset: int) -> list[int]:
        # 1,000 blanks in a row fill a block; to split every text would take up to a quarter of tiktoken's time
        blocks = range(0, len(text), 500)
        if len(text) < 1000 or not any(text[i : i + 500].isspace() for i in blocks):
            return self._encoding.encode_ordinary(text)
        return [token for part in LONG_RUN.split(text) for token in self._encoding.encode_ordinary(part)]

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        # Without special tokens: tiktoken has no order among overlapping ones, so `encode` cuts them out itself.
        return tiktoken.Encoding(self.kind, pat_str=PIECES, mergeable_ranks=self._ranks, special_tokens={})

    def encode_plain(self, text: str) -> list[int]:
        """The same ids as `encode_ordinary`, in plain Python: the definition, slow and readable.

        The same for every character that `regex` and tiktoken put into the same class: they come with different
        versions of Unicode, so letters and numbers assigned in between can begin a piece in one and not in the other.
        """
        refuse_lone_surrogates(text)
        ids: list[int] = []
        for piece in regex.findall(PIECES, text):
            symbols = [self._ranks[bytes([byte])] for byte in piece.encode()]
            while known := [pair for pair in pairwise(symbols) if pair in self.merges]:
                first_learnt = min(known, key=lambda pair: self.merges[pair])
                symbols = _replace(symbols, first_learnt, self.merges[first_learnt])
            ids += symbols
        return ids

    def _decode(self, ids: list[int]) -> str:
        return b"".join([self.token_bytes[i] for i in ids]).decode(errors="replace")

    def _fields(self) -> dict[str, Any]:
        return {"special_tokens": list(self.special_tokens), "merges": list(self.merges)}


def _replace(symbols: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`symbols` with `new` for every occurrence of `pair`, from left to right."""
    joined: list[int] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] = new
        else:
            joined.append(symbol)
    return joined


def _special_tokens(special_tokens: Iterable[str]) -> list[str]:
    specials = list(dict.fromkeys([*special_tokens, END_OF_TEXT]))
    if len(specials) > MAX_SPECIAL_TOKENS:
        raise ValueError(
            f"there are {len(specials)} special tokens; at most {MAX_SPECIAL_TOKENS} are allowed"
        )
    require_different("special tokens", specials)
    return specials
