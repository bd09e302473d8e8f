"""A corpus as a folder of token shards, verified by sha256; text is tokenised into one in the user's cache.

A folder holds shards (token_file.py) `train_000000.bin`, ..., `val_000000.bin`, ..., the `tokenizer.json` they were made
with, and `meta.json` with facts about the texts and the shards' sha256.

If a corpus has several documents, each is preceded by the end-of-text id and the last is followed by one more:
a window that starts at a document starts with end-of-text, which is also the prompt for a new document.
A single text has none.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .cache import cached, writable_cache
from .corpus import FINEWEB_SHARDS, Corpus, open_corpus, split_name
from .download import download
from .files import new_folder, remove_folder, write_file
from .token_file import HEADER_BYTES, SHARD_SIZE, check_range, open_shard, write_shards
from .tokenizers.base import bounded_parts
from .untrusted import InputError, printable, read_bytes, read_json

if TYPE_CHECKING:
    from .tokenizers import Tokenizer

_FORMAT = 2  # version of what tokenize() writes; a new number leaves older caches unused
_FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"


@dataclass(frozen=True)
class TokenShards:
    """A tokenised corpus: the shard files of its two parts and the tokenizer whose ids they hold.

    `val_bytes`: UTF-8 bytes of the validation texts, so that a loss can be given per byte; None where only tokens are known.
    `corpus`: the text that was tokenised; None for a folder of shards or `fineweb10B`.
    """

    train: list[Path]
    val: list[Path]
    train_tokens: int
    val_tokens: int
    tokenizer: Tokenizer
    val_bytes: int | None = None
    corpus: Corpus | None = None

    @property
    def val_bytes_per_token(self) -> float | None:
        return self.val_bytes / self.val_tokens if self.val_bytes else None


# ---- a corpus as a folder of shards


def token_shards(
    source: str | Path, tokenizer: Tokenizer | None = None, val_fraction: float = 0.1, progress: bool = False
) -> TokenShards:
    """The tokens of `source`: whatever `open_corpus` takes, a folder of shards, or `fineweb10B` (`:N` for N of 103 shards).

    Text is tokenised once and kept in the user's cache under a key of corpus, tokenizer and `val_fraction`; if it was
    damaged there, it is tokenised anew. What already is tokens brings its tokenizer along (`stored_tokenizer`); one that is
    given must be the same. Let one of several processes go first: otherwise each tokenises or downloads for itself,
    safely but redundantly.
    """
    name, count = split_name(source)
    if name == "fineweb10B":
        shards = _fineweb(count or FINEWEB_SHARDS, tokenizer)
    elif holds_tokens(source):
        shards = open_shards(source, tokenizer)
    else:
        if tokenizer is None:
            raise ValueError(
                f"{printable(source, 100)}: text takes a tokenizer to become tokens; give one with --tokenizer"
            )
        return _cached_shards(open_corpus(source, val_fraction), tokenizer, val_fraction, progress)
    check_range([*shards.train, *shards.val], shards.tokenizer.vocab_size)
    return shards


def _cached_shards(corpus: Corpus, tokenizer: Tokenizer, val_fraction: float, progress: bool) -> TokenShards:
    key = json.dumps([_FORMAT, corpus.fingerprint, tokenizer.fingerprint(), val_fraction])
    slug = re.sub(r"\W+", "-", Path(corpus.name).stem).strip("-")[:60] or "text"
    name = f"tokens/{slug}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = cached(name)
    if folder.exists():
        try:
            return replace(_open(folder, tokenizer, own=True), corpus=corpus)
        except (ValueError, OSError) as error:
            print(f"warning: tokens in the cache are damaged and are made anew: {error}", file=sys.stderr)
        folder = writable_cache() / name
        with suppress(FileNotFoundError):  # another process was faster, or the damaged one cannot be written
            remove_folder(folder)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        if (
            time.time() - left.stat().st_mtime > 86_400
        ):  # without a new shard for a day: of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    tokenize(corpus, tokenizer, folder, progress)
    return replace(open_shards(folder, tokenizer), corpus=corpus)


def stored_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer that the tokens of `source` were made with; None for text, which any tokenizer may encode."""
    from .tokenizers import load_tokenizer

    if split_name(source)[0] == "fineweb10B":
        return _gpt2()
    if not holds_tokens(source):
        return None
    path = Path(source) / "tokenizer.json"
    if not path.exists():
        remedy = "put the tokenizer there that they were made with; for GPT-2 tokens: --tokenizer gpt2"
        raise InputError(source, "no tokenizer.json beside the shards", remedy)
    return load_tokenizer(path)


def holds_tokens(source: str | Path) -> bool:
    """Whether `source` is tokens already: a folder with training shards in it (`*train*.bin`), or `fineweb10B`."""
    name = split_name(source)[0]
    try:
        return name == "fineweb10B" if name else any(Path(source).glob("*train*.bin"))
    except (OSError, ValueError):  # a name that is too long, or has a NUL in it
        return False


@dataclass
class _Meta:
    """What `meta.json` beside shards says, as far as it is read. That of other programs may lack any of it."""

    format: int | None = None
    val_bytes: int | None = None
    sha256: dict[str, str] = field(default_factory=dict)


def open_shards(folder: str | Path, tokenizer: Tokenizer | None = None) -> TokenShards:
    """A folder of shards: files `*train*.bin` and `*val*.bin`, with the `tokenizer.json` that `tokenize` put there.

    A given `tokenizer` must be that one; it is not checked if the folder has none.

    Raises:
        InputError: a part is missing, a shard is damaged or is not what `meta.json` says was written, or the tokenizer differs.
    """
    return _open(Path(folder), tokenizer)


def _open(folder: Path, tokenizer: Tokenizer | None, own: bool = False) -> TokenShards:
    """`open_shards`; `own` shards were written by `tokenize` for sure, so that none of their facts may be missing."""
    train, val = (sorted(folder.glob(f"*{part}*.bin")) for part in ("train", "val"))
    if not train or not val:
        missing = "training shards (*train*.bin)" if not train else "validation shards (*val*.bin)"
        raise InputError(folder, f"no {missing}", "make both from text with: gpt tokenize FILE --out FOLDER")
    if tokenizer is None or own or (folder / "tokenizer.json").exists():
        stored = stored_tokenizer(folder)
        assert stored is not None  # a folder with training shards names its tokenizer or raises
        tokenizer = _same(tokenizer, stored, folder)
    counts = {path.name: len(open_shard(path)) for path in (*train, *val)}
    meta = _read_meta(folder, counts) if own or (folder / "meta.json").exists() else _Meta()
    if own and meta.format is None:
        raise InputError(folder / "meta.json", "it has no format", "tokenise the text again")
    return TokenShards(
        train=train,
        val=val,
        train_tokens=sum(counts[path.name] for path in train),
        val_tokens=sum(counts[path.name] for path in val),
        tokenizer=tokenizer,
        val_bytes=meta.val_bytes,
    )


def _read_meta(folder: Path, shards: Iterable[str]) -> _Meta:
    """`meta.json`; InputError where these shards of the folder are not those that it describes."""
    file, remedy = folder / "meta.json", "tokenise the text again, or delete this file"
    meta = read_json(file, _Meta, remedy)
    if meta.val_bytes is not None and meta.val_bytes < 1:
        raise InputError(file, f"val_bytes is {meta.val_bytes}", remedy)
    if meta.format is None:  # of another program
        return meta
    if meta.format != _FORMAT:
        raise InputError(file, f"it has format {meta.format}; only {_FORMAT} can be read", remedy)
    if meta.val_bytes is None:
        raise InputError(file, "it lacks val_bytes", remedy)
    for name in sorted({*meta.sha256, *shards}):
        if name not in meta.sha256 or name not in shards:
            raise InputError(file, f"{printable(name, 60)} is not both there and described in it", remedy)
        if open_shard(folder / name).content().sha256 != meta.sha256[name]:
            what = "its sha256 is not the one in meta.json: it was changed or damaged"
            raise InputError(folder / name, what, "tokenise the text again, or delete meta.json")
    return meta


def tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: str | Path, progress: bool = False) -> None:
    """Write both parts of `corpus` as shards into `folder`, which appears only when all is in it, on disk.

    `progress` shows a bar on a terminal.

    Raises:
        FileExistsError: `folder` holds something already.
        ValueError: a part has no text.
        OSError: a file cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists already and is left alone; choose another --out, or remove it first"
        )
    try:
        with new_folder(folder) as unfinished:
            _tokenize(corpus, tokenizer, unfinished, progress)
    except OSError:
        if not (folder / "meta.json").exists():  # else another process finished the same folder first
            raise


def _tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    sha256: dict[str, str] = {}
    meta: dict[str, object] = {
        "format": _FORMAT,
        "source": corpus.name,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "separated": corpus.separated,
        "sha256": sha256,
    }
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(f"tokenising {escape(printable(corpus.name, 60))}", total=corpus.n_bytes)
        for split, texts in (("train", corpus.train_texts()), ("val", corpus.val_texts())):
            encoding = _Encoding(tokenizer, corpus.separated, lambda n_bytes: bar.advance(task, n_bytes))
            paths = write_shards(encoding.tokens(texts), folder, split)
            if not paths:
                what = f"nothing is left for the {'training' if split == 'train' else 'validation'} part"
                raise InputError(corpus.name, what, "give more text, or another --val-fraction")
            sha256 |= {path.name: open_shard(path).scan().sha256 for path in paths}
            meta |= {
                f"{split}_tokens": encoding.n_tokens,
                f"{split}_bytes": encoding.n_bytes,
                f"{split}_chars": encoding.n_chars,
            }
    tokenizer.save(folder / "tokenizer.json")
    write_file(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


class _Encoding:
    """Documents -> token arrays, counting what passes."""

    def __init__(self, tokenizer: Tokenizer, separated: bool, advance: Callable[[int], object]) -> None:
        self.tokenizer, self.separated, self.advance = tokenizer, separated, advance
        self.n_tokens = self.n_bytes = self.n_chars = 0

    def tokens(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        for text in texts:
            if self.separated:
                yield self._count([self.tokenizer.end_of_text])
            for part in bounded_parts(text):
                yield self._count(self.tokenizer.encode_ordinary(part))
                n_bytes = len(part.encode())
                self.n_bytes += n_bytes
                self.n_chars += len(part)
                self.advance(n_bytes)
        if self.separated:
            yield self._count([self.tokenizer.end_of_text])

    def _count(self, ids: list[int]) -> np.ndarray:
        self.n_tokens += len(ids)
        return np.array(ids, dtype=np.uint16)


# ---- tokens that others made


def _fineweb(count: int, tokenizer: Tokenizer | None) -> TokenShards:
    """The first `count` of the 103 public shards of 10 B GPT-2 tokens of FineWeb, and the validation shard."""
    tokenizer = _same(tokenizer, _gpt2(), "fineweb10B")
    numbers = range(1, count + 1)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in numbers)]
    paths = [cached(f"fineweb10B/{name}") for name in names]
    missing = [path for path in paths if not path.exists()]
    largest = HEADER_BYTES + 2 * SHARD_SIZE
    if missing:
        print(
            f"fineweb10B: {len(missing)} files, about {len(missing) * largest / 1e9:.1f} GB, go into {missing[0].parent}",
            file=sys.stderr,
        )
    for path in missing:
        download(f"{_FINEWEB_URL}/{path.name}", path, max_bytes=largest, check=open_shard)
    counts = [_recorded(path) for path in paths]
    return TokenShards(paths[1:], paths[:1], sum(counts[1:]), counts[0], tokenizer)


def _recorded(path: Path) -> int:
    """The tokens of a shard whose sha256, unknown to this program, is recorded beside it when it is first seen."""
    tokens, record = open_shard(path), path.with_name(f"{path.name}.sha256")
    sha256, remedy = tokens.content().sha256, "delete both to have it downloaded again"
    if not record.exists():
        with suppress(OSError):  # in a cache that can only be read
            write_file(record, f"{sha256}  {path.name}\n")  # as sha256sum -c takes it
    elif read_bytes(record, 1000, remedy).split()[:1] != [sha256.encode()]:
        what = f"its sha256 is not the one recorded in {record.name}: it was changed or damaged"
        raise InputError(path, what, remedy)
    return len(tokens)


def _gpt2() -> Tokenizer:
    from .tokenizers import make_tokenizer

    try:
        return make_tokenizer("gpt2")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"fineweb10B takes shards of tokens, 0.2 GB each, from {_FINEWEB_URL} (or put into {cached('fineweb10B')} "
            f"by hand), and GPT-2's vocabulary. To train on text of your own: --data FILE. {error}"
        ) from None


def _same(given: Tokenizer | None, stored: Tokenizer, where: str | Path) -> Tokenizer:
    if given is not None and given.fingerprint() != stored.fingerprint():
        what = (
            f"made with a {stored.kind} tokenizer of {stored.vocab_size:,} tokens, which is not the given one "
            f"({given.kind}, {given.vocab_size:,} tokens)"
        )
        raise InputError(where, what, "leave --tokenizer out to take theirs")
    return stored
