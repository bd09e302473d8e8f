"""GPT-2's own tokenizer: 256 bytes, 50,000 merges published by OpenAI as `vocab.bpe`, and `<|endoftext|>` = 50256.

The merges are not part of this program. They come from tiktoken's cache, from a folder, or from the network into
the user's cache; a saved tokenizer carries them (about half a megabyte), so a run works on a machine that has none of these.
`encoder.json`, published beside `vocab.bpe`, only lists the ids that follow from it and is not read.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Self, TypedDict

from ..cache import cache_dir, writable_cache
from ..untrusted import InputError, MissingFile, printable, read_bytes, reason
from .bpe import BPETokenizer

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
MAX_BYTES = 1 << 20  # it has 456,318
NAMES = ("vocab.bpe", hashlib.sha1(URL.encode()).hexdigest())  # the second is what tiktoken's cache calls it


def _byte_order() -> bytes:
    """Printable bytes of Latin-1 first, then the others: GPT-2's ids 0 to 255."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    return bytes(printable + [b for b in range(256) if b not in printable])


class Fields(TypedDict):
    vocab_bpe: str


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's tokenizer from the text of its `vocab.bpe`; ValueError if it is another file's text."""

    kind = "gpt2"
    Fields = Fields
    byte_order = _byte_order()

    def __init__(self, vocab_bpe: str) -> None:
        if hashlib.sha256(vocab_bpe.encode()).hexdigest() != SHA256:
            raise ValueError("its text is not that of GPT-2's vocab.bpe (the sha256 differs)")
        self._vocab_bpe = vocab_bpe
        # The file writes a printable byte as its Latin-1 character, the other 68 as U+0100 and what follows.
        ids = {chr(b if i < 188 else 256 + i - 188): i for i, b in enumerate(self.byte_order)}
        merges = []
        for line in vocab_bpe.split("\n")[1:-1]:
            a, b = line.split(" ")
            merges.append((ids[a], ids[b]))
            ids[a + b] = len(ids)
        super().__init__(merges)

    @classmethod
    def find(cls, folder: str | Path | None = None) -> Self:
        """Read `vocab.bpe` from `folder`; without one, from tiktoken's cache, the user's, or else the network.

        FileNotFoundError says where to get the file and where to put it; ValueError if another file has its name.
        """
        places = (_tiktokens_cache(), cache_dir()) if folder is None else (Path(folder),)
        files = (place / name for place in places if place for name in NAMES)
        file = next(filter(os.path.isfile, files), None)
        if file is None and folder is not None:
            raise MissingFile(folder, "it holds no vocab.bpe of GPT-2", f"fetch {URL}")
        data = read_bytes(file, MAX_BYTES, f"fetch {URL}") if file else _download()
        try:
            return cls(data.decode())
        except ValueError:
            raise InputError(
                file or URL, f"it is not GPT-2's vocab.bpe, whose sha256 is {SHA256}", f"fetch {URL}"
            ) from None

    def _fields(self) -> dict[str, Any]:
        return {"vocab_bpe": self._vocab_bpe}


def _tiktokens_cache() -> Path | None:
    """The folder in which tiktoken keeps what it fetched; None if its cache is turned off."""
    default = str(Path(tempfile.gettempdir(), "data-gym-cache"))
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) if folder else None


def _download() -> bytes:
    from ..download import download  # late, as it is hardly ever needed

    file = writable_cache() / NAMES[0]
    remedy = "put that file there as vocab.bpe"
    try:
        download(URL, file, MAX_BYTES, SHA256)
        return read_bytes(file, MAX_BYTES, remedy)
    except (OSError, InputError) as error:
        why = error.what if isinstance(error, InputError) else reason(error)
        raise FileNotFoundError(
            f"GPT-2's vocabulary is not on this machine and cannot be fetched ({printable(why, 100)}). Put {URL} as vocab.bpe "
            "into a folder here; then set TIKTOKEN_CACHE_DIR to that folder, or name the tokenizer gpt2:FOLDER. Text of your "
            "own can do without: --tokenizer bpe trains one on it"
        ) from None
