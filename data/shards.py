"""Tokens on disk: shards in the llm.c format, written atomically, read by memory map, kept in the user's cache.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and then that many uint16 token ids
(https://github.com/karpathy/llm.c, dev/data/data_common.py). A folder of shards holds `train_000000.bin`, ...,
`val_000000.bin`, ..., the `tokenizer.json` they were made with, and `meta.json` with facts about the texts.

If a corpus has several documents, each is preceded by the end-of-text id and the last is followed by one more:
a window that starts at a document starts with end-of-text, which is also the prompt for a new document.
A single text has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .corpus import Corpus, cache_dir, download, open_corpus, split_name
from .tokenizers.base import bounded_parts

if TYPE_CHECKING:
    from .tokenizers import Tokenizer

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
SHARD_SIZE = 100_000_000  # tokens; 200 MB per file, like the public FineWeb shards
_FORMAT = 1  # version of what tokenize() writes; a new number leaves older caches unused
_CHUNK = 1 << 24  # tokens scanned in one go
_FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
_FINEWEB_SHARDS = 103


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


# ---- one shard


def open_shard(path: str | Path) -> np.ndarray:
    """The tokens of a shard: (n,) uint16, read-only, paged in from the file as they are used.

    Raises FileNotFoundError for a missing file, ValueError for a foreign, truncated or empty one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such token shard")
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    magic, version, count = struct.unpack_from("<3i", header.ljust(12, b"\0"))
    if magic != MAGIC:
        swapped = struct.unpack_from(">i", header.ljust(4, b"\0"))[0] == MAGIC
        what = (
            "a token shard in big-endian byte order"
            if swapped
            else f"not a token shard (no magic number {MAGIC})"
        )
        raise ValueError(f"{path}: {what}. Make shards from text with: gpt tokenize FILE --out FOLDER")
    if version != VERSION:
        raise ValueError(
            f"{path}: token shard of version {version}; only version {VERSION} (uint16 tokens) can be read"
        )
    expected, actual = HEADER_BYTES + 2 * count, path.stat().st_size
    if actual != expected:
        state = "truncated" if actual < expected else "too long"
        raise ValueError(
            f"{path}: token shard is {state}: {actual:,} bytes, where its header's {count:,} tokens make {expected:,}. "
            "Delete it, then copy, download or tokenise it again."
        )
    if count == 0:
        raise ValueError(f"{path}: token shard without tokens. Delete it, then tokenise its text again.")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)).view(np.ndarray)


def write_shards(
    chunks: Iterable[np.ndarray], folder: str | Path, split: str, shard_size: int = SHARD_SIZE
) -> list[Path]:
    """Write a stream of token arrays as `{split}_000000.bin`, ... of `shard_size` tokens each, the last one shorter.

    Only one chunk is held in memory. A file appears under its name only when complete, so a crash leaves no partial
    shard. Ids outside uint16 raise ValueError. Returns the files; none where there are no tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stream = (part for chunk in chunks if len(part := _as_uint16(chunk)))
    rest: np.ndarray | None = next(stream, None)
    paths: list[Path] = []
    while rest is not None:
        path = folder / f"{split}_{len(paths):06d}.bin"
        temporary = path.with_name(f".{path.name}.part")
        try:
            with temporary.open("wb") as file:
                file.write(bytes(HEADER_BYTES))
                count = 0
                while rest is not None and count < shard_size:
                    taken, rest = rest[: shard_size - count], rest[shard_size - count :]
                    file.write(taken.tobytes())
                    count += len(taken)
                    rest = rest if len(rest) else next(stream, None)
                file.seek(0)
                file.write(struct.pack("<3i", MAGIC, VERSION, count))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        paths.append(path)
    return paths


def _as_uint16(chunk: np.ndarray) -> np.ndarray:
    if chunk.dtype != np.uint16 and len(chunk) and not (chunk.min() >= 0 and chunk.max() < 1 << 16):
        raise ValueError(f"token ids {chunk.min()} to {chunk.max()}: a token shard holds 0 to 65,535")
    return chunk.astype("<u2", copy=False)


def check_range(shards: Sequence[Path], vocab_size: int) -> None:
    """Raise ValueError for the first token that is not below `vocab_size`, with its shard and position."""
    for path in shards:
        if _largest_token(path) < vocab_size:
            continue
        tokens = open_shard(path)
        for start in range(0, len(tokens), _CHUNK):
            bad = np.flatnonzero(tokens[start : start + _CHUNK] >= vocab_size)
            if len(bad):
                raise ValueError(
                    f"{path}: token {tokens[start + bad[0]]} at position {start + bad[0]:,}, but the vocabulary has "
                    f"{vocab_size:,} tokens. The shard was made with another tokenizer: give that one with --tokenizer."
                )


def _largest_token(path: Path) -> int:
    """The largest id in a shard. Scanned once: the result is cached until the file changes."""
    stat = path.stat()
    identity = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "largest_token" / identity
    if not note.exists():
        tokens = open_shard(path)
        largest = max(int(tokens[start : start + _CHUNK].max()) for start in range(0, len(tokens), _CHUNK))
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}")
        temporary.write_text(str(largest))
        os.replace(temporary, note)
    return int(note.read_text())


# ---- a corpus as a folder of shards


def token_shards(
    source: str | Path, tokenizer: Tokenizer | None = None, val_fraction: float = 0.1, progress: bool = False
) -> TokenShards:
    """The tokens of `source`: whatever `open_corpus` takes, a folder of shards, or `fineweb10B` (`:N` for N of 103 shards).

    Text is tokenised once and kept in the user's cache under a key of corpus, tokenizer and `val_fraction`. What already is
    tokens brings its tokenizer along (`stored_tokenizer`); one that is given must be the same. Let one
    of several processes go first: otherwise each tokenises or downloads for itself, safely but redundantly.
    """
    name, count = split_name(source)
    if name == "fineweb10B":
        shards = _fineweb(count or _FINEWEB_SHARDS, tokenizer)
    elif holds_tokens(source):
        shards = open_shards(source, tokenizer)
    else:
        if tokenizer is None:
            raise ValueError(f"{source}: text takes a tokenizer to become tokens; give one with --tokenizer")
        corpus = open_corpus(source, val_fraction)
        key = json.dumps([_FORMAT, corpus.fingerprint, tokenizer.fingerprint(), val_fraction])
        slug = re.sub(r"\W+", "-", Path(corpus.name).stem).strip("-") or "text"
        folder = cache_dir() / "tokens" / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not folder.exists():
            tokenize(corpus, tokenizer, folder, progress)
        return replace(open_shards(folder, tokenizer), corpus=corpus)
    check_range([*shards.train, *shards.val], shards.tokenizer.vocab_size)
    return shards


def stored_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer that the tokens of `source` were made with; None for text, which any tokenizer may encode."""
    from .tokenizers import load_tokenizer

    if split_name(source)[0] == "fineweb10B":
        return _gpt2()
    if not holds_tokens(source):
        return None
    path = Path(source) / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{source}: no tokenizer.json beside the shards. Put the tokenizer there that they were made with; "
            "for GPT-2 tokens: --tokenizer gpt2"
        )
    return load_tokenizer(path)


def holds_tokens(source: str | Path) -> bool:
    """Whether `source` is tokens already: a folder with training shards in it (`*train*.bin`), or `fineweb10B`."""
    name = split_name(source)[0]
    return name == "fineweb10B" if name else any(Path(source).glob("*train*.bin"))


def open_shards(folder: str | Path, tokenizer: Tokenizer | None = None) -> TokenShards:
    """A folder of shards: files `*train*.bin` and `*val*.bin`, with the `tokenizer.json` that `tokenize` put there.

    A given `tokenizer` must be that one; it is not checked if the folder has none.
    """
    folder = Path(folder)
    train, val = (sorted(folder.glob(f"*{part}*.bin")) for part in ("train", "val"))
    if not train or not val:
        missing = "training shards (*train*.bin)" if not train else "validation shards (*val*.bin)"
        raise ValueError(f"{folder}: no {missing}. Make both from text with: gpt tokenize FILE --out FOLDER")
    if tokenizer is None or (folder / "tokenizer.json").exists():
        stored = stored_tokenizer(folder)
        assert stored is not None  # a folder with training shards names its tokenizer or raises
        tokenizer = _same(tokenizer, stored, f"the shards in {folder}")
    meta_file = folder / "meta.json"
    meta = json.loads(meta_file.read_text(encoding="utf-8")) if meta_file.exists() else {}
    return TokenShards(
        train=train,
        val=val,
        train_tokens=sum(len(open_shard(path)) for path in train),
        val_tokens=sum(len(open_shard(path)) for path in val),
        tokenizer=tokenizer,
        val_bytes=meta.get("val_bytes"),
    )


def tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: str | Path, progress: bool = False) -> None:
    """Write both parts of `corpus` as shards into `folder`, which appears only when all is in it.

    Raises FileExistsError where `folder` holds something already, ValueError for a part
    without text. `progress` shows a bar on a terminal.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists already and is left alone; choose another --out, or remove it first"
        )
    from rich.console import Console
    from rich.progress import Progress

    part_folder = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    meta: dict[str, object] = {
        "format": _FORMAT,
        "source": corpus.name,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "separated": corpus.separated,
    }
    shutil.rmtree(part_folder, ignore_errors=True)  # a process that was killed may have had the same id
    try:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
            task = bar.add_task(f"tokenising {corpus.name}", total=corpus.n_bytes)
            for split, texts in (("train", corpus.train_texts()), ("val", corpus.val_texts())):
                encoding = _Encoding(tokenizer, corpus.separated, lambda n_bytes: bar.advance(task, n_bytes))
                if not write_shards(encoding.tokens(texts), part_folder, split):
                    part = "training" if split == "train" else "validation"
                    raise ValueError(
                        f"{corpus.name}: nothing is left for the {part} part; give more text, or another --val-fraction"
                    )
                meta |= {
                    f"{split}_tokens": encoding.n_tokens,
                    f"{split}_bytes": encoding.n_bytes,
                    f"{split}_chars": encoding.n_chars,
                }
        tokenizer.save(part_folder / "tokenizer.json")
        (part_folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        try:
            os.replace(part_folder, folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process finished the same folder first
                raise
    finally:
        shutil.rmtree(part_folder, ignore_errors=True)


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
    if count > _FINEWEB_SHARDS:
        raise ValueError(f"fineweb10B:{count}: there are {_FINEWEB_SHARDS} training shards")
    tokenizer = _same(tokenizer, _gpt2(), "fineweb10B")
    folder = cache_dir() / "fineweb10B"
    train = [folder / f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]
    val = [folder / "fineweb_val_000000.bin"]
    missing = [path for path in val + train if not path.exists()]
    largest = HEADER_BYTES + 2 * SHARD_SIZE
    if missing:
        print(
            f"fineweb10B: {len(missing)} files, about {len(missing) * largest / 1e9:.1f} GB, go into {folder}",
            file=sys.stderr,
        )
    for path in missing:
        download(f"{_FINEWEB_URL}/{path.name}", path, max_bytes=largest, check=open_shard)
    return TokenShards(
        train=train,
        val=val,
        train_tokens=sum(len(open_shard(path)) for path in train),
        val_tokens=len(open_shard(val[0])),
        tokenizer=tokenizer,
    )


def _gpt2() -> Tokenizer:
    from .tokenizers import make_tokenizer

    try:
        return make_tokenizer("gpt2")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"fineweb10B takes shards of tokens, 0.2 GB each, from {_FINEWEB_URL} (or put into {cache_dir() / 'fineweb10B'} "
            f"by hand), and GPT-2's vocabulary. To train on text of your own: --data FILE. {error}"
        ) from None


def _same(given: Tokenizer | None, stored: Tokenizer, what: str) -> Tokenizer:
    if given is not None and given.fingerprint() != stored.fingerprint():
        raise ValueError(
            f"{what}: made with a {stored.kind} tokenizer of {stored.vocab_size:,} tokens, which is not the given one "
            f"({given.kind}, {given.vocab_size:,} tokens). Leave --tokenizer out to take theirs."
        )
    return stored
