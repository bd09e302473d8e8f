"""One token shard: a file in the llm.c format, written durably, read in pieces, and noticed when it changes.

It is 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) and then that many uint16 token ids
(https://github.com/karpathy/llm.c, dev/data/data_common.py).
"""

import hashlib
import os
import struct
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from .cache import identity, remembered
from .files import make_folder, replacing
from .untrusted import InputError, open_file, reason

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024
SHARD_SIZE = 100_000_000  # tokens; 200 MB per file, like the public FineWeb shards
_UINT16 = np.dtype("<u2")
_CHUNK = 1 << 24  # tokens scanned in one go
_FROM_TEXT = "make shards from text with: gpt tokenize FILE --out FOLDER"
_AGAIN = "delete it, then copy, download or tokenise it again"


@dataclass(frozen=True)
class Content:
    """What is known of a shard once all of it has been read."""

    sha256: str
    largest: int


class TokenFile:
    """The tokens of a shard on disk: `len(shard)` of them, and `shard[a:b]` reads some as a read-only array (b - a,) uint16.

    Nothing is mapped into memory, where a file that becomes shorter ends the process with SIGBUS. A read after which the
    file is no longer what was opened raises InputError with the position, whether it was changed, shortened or removed.
    """

    dtype = _UINT16

    def __init__(self, path: Path) -> None:
        self.path = path
        file = open_file(path, f"check the path, or {_FROM_TEXT}")
        weakref.finalize(self, file.close)
        self._descriptor = file.fileno()
        self._status = os.fstat(self._descriptor)
        self._header = os.pread(self._descriptor, HEADER_BYTES, 0)
        self._count = self._checked_count()
        self._content: Content | None = None

    def _checked_count(self) -> int:
        magic, version, count = struct.unpack_from("<3i", self._header.ljust(12, b"\0"))
        if magic != MAGIC:
            swapped = struct.unpack_from(">i", self._header.ljust(4, b"\0"))[0] == MAGIC
            kind = (
                "a token shard in big-endian byte order"
                if swapped
                else f"not a token shard (no magic number {MAGIC})"
            )
            raise InputError(self.path, kind, _FROM_TEXT)
        if version != VERSION:
            only = f"only version {VERSION} (uint16 tokens) can be read"
            raise InputError(self.path, f"token shard of version {version}; {only}", "tokenise its text here")
        expected, actual = HEADER_BYTES + 2 * count, self._status.st_size
        if actual != expected:
            state = "truncated" if actual < expected else "too long"
            what = f"token shard is {state}: {actual:,} bytes, where its header's {count:,} tokens make {expected:,}"
            raise InputError(self.path, what, _AGAIN)
        if count < 1:
            raise InputError(
                self.path, "token shard without tokens", "delete it, then tokenise its text again"
            )
        return count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"{part!r}: a shard gives its tokens as shard[start:stop]")
        start, stop, _ = part.indices(self._count)
        tokens = self.read(start, stop)
        self.check(start)
        return tokens

    def check(self, position: int) -> None:
        """Raise InputError with the position of a token where the file is no longer what was opened."""
        now, before = os.fstat(self._descriptor), self._status
        if (
            now.st_ctime_ns != before.st_ctime_ns
            or now.st_mtime_ns != before.st_mtime_ns
            or now.st_size != before.st_size
        ):
            self._accept(now, position)

    def __reduce__(self) -> "tuple[type[Self], tuple[Path]]":
        return type(self), (self.path,)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Like `shard[start:stop]` within its length, without the check: who reads much calls `check` once for all."""
        size, offset = 2 * max(0, stop - start), HEADER_BYTES + 2 * start
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size:  # one read gives 2 GB at most
                more = os.pread(self._descriptor, size - len(data), offset + len(data))
                if not more:
                    raise self._error(start, "it was truncated while it was in use")
                data += more
        except OSError as error:
            raise self._error(start, f"it cannot be read ({reason(error)})") from None
        return np.frombuffer(data, _UINT16)

    def _error(self, start: int, what: str) -> InputError:
        return InputError(f"{self.path}, token {start:,}", what, "put the file back as it was, then resume")

    def _accept(self, now: os.stat_result, start: int) -> None:
        """Raise InputError unless the content is the known one all the same, as after chmod or with a further link."""
        before = self._status
        if now.st_nlink == 0:
            raise self._error(start, "it was removed or replaced while it was in use")
        if now.st_size != before.st_size:
            what = f"it went from {before.st_size:,} to {now.st_size:,} bytes while it was in use"
            raise self._error(start, what)
        self._status = now
        if self._content is None or self.scan() != self._content:
            self._status = before
            raise self._error(start, "it was changed while it was in use")

    def content(self) -> Content:
        """The file's sha256 and its largest token, from the cache where they are known."""
        if self._content is None:
            self._content = remembered(Content, [identity(self.path, self._status)], self.scan)
        return self._content

    def scan(self) -> Content:
        """Read the whole file for what `content` gives."""
        digest, largest = hashlib.sha256(self._header), 0
        for start in range(0, self._count, _CHUNK):
            tokens = self.read(start, min(start + _CHUNK, self._count))
            digest.update(tokens.data)
            largest = max(largest, int(tokens.max()))
        if os.fstat(self._descriptor).st_ctime_ns != self._status.st_ctime_ns:
            raise self._error(0, "it was changed while it was read")
        return Content(digest.hexdigest(), largest)


def open_shard(path: str | Path) -> TokenFile:
    """The tokens of a shard, read from the file as they are used.

    Raises:
        MissingFile: there is no such file.
        InputError: it is foreign, truncated or empty, or cannot be read.
    """
    return TokenFile(Path(path))


def checksum(shards: Iterable[TokenFile | np.ndarray]) -> str:
    """sha256 over the whole content of shards, in their order; that of an array is the one of the file it would make."""
    digest = hashlib.sha256()
    for tokens in shards:
        if isinstance(tokens, TokenFile):
            digest.update(tokens.content().sha256.encode())
        else:
            data = tokens.astype("<u2") if tokens.dtype == np.uint16 else np.ascontiguousarray(tokens)
            digest.update(hashlib.sha256(_header(len(tokens)) + data.tobytes()).hexdigest().encode())
    return digest.hexdigest()


def _header(count: int) -> bytes:
    return struct.pack("<3i", MAGIC, VERSION, count).ljust(HEADER_BYTES, b"\0")


def write_shards(
    chunks: Iterable[np.ndarray], folder: str | Path, split: str, shard_size: int = SHARD_SIZE
) -> list[Path]:
    """Write a stream of token arrays as `{split}_000000.bin`, ... of `shard_size` tokens each, the last one shorter.

    Only one chunk is held in memory. A file appears under its name only when complete. Returns the files; none where there
    are no tokens.

    Raises:
        ValueError: an id is outside uint16.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    make_folder(folder)
    stream = (part for chunk in chunks if len(part := _as_uint16(chunk)))
    rest: np.ndarray | None = next(stream, None)
    paths: list[Path] = []
    while rest is not None:
        path = folder / f"{split}_{len(paths):06d}.bin"
        with replacing(path) as file:
            file.write(_header(0))
            count = 0
            while rest is not None and count < shard_size:
                taken, rest = rest[: shard_size - count], rest[shard_size - count :]
                file.write(taken.tobytes())
                count += len(taken)
                rest = rest if len(rest) else next(stream, None)
            file.seek(0)
            file.write(_header(count))
        paths.append(path)
    return paths


def _as_uint16(chunk: np.ndarray) -> np.ndarray:
    if chunk.dtype != np.uint16 and len(chunk) and not (chunk.min() >= 0 and chunk.max() < 1 << 16):
        raise ValueError(f"token ids {chunk.min()} to {chunk.max()}: a token shard holds 0 to 65,535")
    return chunk.astype("<u2", copy=False)


def check_range(shards: Sequence[Path], vocab_size: int) -> None:
    """Raise InputError for the first token that is not below `vocab_size`, with its shard and position."""
    for path in shards:
        tokens = open_shard(path)
        if tokens.content().largest < vocab_size:
            continue
        for start in range(0, len(tokens), _CHUNK):
            part = tokens[start : start + _CHUNK]
            bad = np.flatnonzero(part >= vocab_size)
            if len(bad):
                what = (
                    f"token {part[bad[0]]} at position {start + bad[0]:,}, "
                    f"but the vocabulary has {vocab_size:,} tokens"
                )
                raise InputError(path, what, "name the tokenizer that the shard was made with: --tokenizer")
