"""Sources of text: files, folders and named corpora, each as streams of training and validation documents.

`open_corpus("novel.txt")`, `open_corpus("tales:20000")`, `open_corpus("tinyshakespeare")` all give a `Corpus`;
tokenizers, shards and evaluation see its documents, whatever the source. Named texts are downloaded
once into the user's cache, checked by size and sha256. A folder may be larger than memory: documents are read one at a time.

The split depends on the documents and `val_fraction` alone, so every run on the same data holds out the same text:

- fewer than 1 / val_fraction documents (a single file above all): each gives its last `val_fraction` characters;
- more: whole documents, every (1 / val_fraction)-th one;
- `tales`: another seed, since the grammar generates any amount.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .cache import cached, identity, remembered
from .download import download
from .untrusted import InputError, MissingFile, open_file, parse_json, printable, reason

TALES_TRAIN = 20_000
TALES_VAL = 500
MAX_TALES = 100_000_000  # 20 GB of text
MAX_LINE = 16 << 20  # bytes of a line of .jsonl
MAX_GROUP = 64 << 20  # bytes of text in a row group of .parquet, or 50 times the file's size
MAX_TEXT = 4 << 30  # bytes of a .txt file, which is one document
_TALES_TRAIN_SEED, _TALES_VAL_SEED = 1, 2


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, as documents.

    `train_texts()` and `val_texts()` start from the first document at every call. `fingerprint` changes whenever the
    documents may have changed (it does not cover `val_fraction`). `separated`: there are several documents,
    separated by end-of-text once tokenised. `n_bytes`: approximate number of bytes to read, None if unknown. `log_prob`:
    the natural logarithm of a document's probability, -inf for one that the source cannot write; from it follows the best
    possible loss. None for text of unknown distribution.
    """

    name: str
    fingerprint: str
    separated: bool
    train_texts: Callable[[], Iterator[str]]
    val_texts: Callable[[], Iterator[str]]
    n_bytes: int | None = None
    log_prob: Callable[[str], float] | None = None


@dataclass(frozen=True)
class _Download:
    url: str
    size: int
    sha256: str


_DOWNLOADS = {
    "the-verdict": _Download(
        "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/"
        "28c65cdfbc3338e2e040016eea4b7fdf556e4d57/ch02/01_main-chapter-code/the-verdict.txt",
        20_479,
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    ),
    "tinyshakespeare": _Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/"
        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
NAMES = ("tales", *_DOWNLOADS, "fineweb10B")
FINEWEB_SHARDS = 103
_COUNTED = {"tales": (20_000, MAX_TALES), "fineweb10B": (8, FINEWEB_SHARDS)}  # an example, and the limit


def open_corpus(source: str | Path, val_fraction: float = 0.1) -> Corpus:
    """The documents of `source`: a .txt, .jsonl or .parquet file, a folder of them, or a name out of `NAMES`.

    `tales:N` asks for N training tales. A name wins over a file of that name; `./tales` is always the file.

    Raises:
        InputError: with the remedy in its message, for what is missing, empty, binary, not UTF-8 or of an unknown kind, and
            where a download fails. Errors in a folder's later files are raised when these are read.
        ValueError: `val_fraction` or a number after a name makes no sense.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: it takes a share between 0 and 1, such as 0.1")
    name, count = split_name(source)
    if name == "tales":
        return _tales(TALES_TRAIN if count is None else count)
    if name == "fineweb10B":
        raise ValueError("fineweb10B holds GPT-2 tokens, not text: train on it with --tokenizer gpt2")
    path = _fetch_text(name) if name else _existing(str(source))
    return _from_files(name or str(source), path, val_fraction)


def split_name(source: str | Path) -> tuple[str | None, int | None]:
    """`"tales:500"` -> `("tales", 500)`, `"the-verdict"` -> `("the-verdict", None)`, a file or folder -> `(None, None)`."""
    name, colon, number = str(source).partition(":")
    if isinstance(source, Path) or name not in NAMES:
        return None, None
    if not colon:
        return name, None
    if name not in _COUNTED:
        raise ValueError(f"{printable(source, 60)!r}: {name} takes no number, write just {name}")
    example, limit = _COUNTED[name]
    if not (number.isascii() and number.isdigit() and number.strip("0")):
        raise ValueError(
            f"{printable(source, 60)!r}: after the colon comes a positive number, as in {name}:{example}"
        )
    if len(number) > 12 or int(number) > limit:
        raise ValueError(f"{printable(source, 60)!r}: {name} takes at most {limit:,}, as in {name}:{limit}")
    return name, int(number)


# ---- what the documents of a source are


def _tales(count: int) -> Corpus:
    from . import tales

    source = Path(tales.__file__).read_bytes()  # any change of the grammar makes another corpus
    return Corpus(
        name="tales" if count == TALES_TRAIN else f"tales:{count}",
        fingerprint=hashlib.sha256(source + f"{count} {TALES_VAL}".encode()).hexdigest(),
        separated=True,
        train_texts=lambda: islice(tales.stream(_TALES_TRAIN_SEED), count),
        val_texts=lambda: islice(tales.stream(_TALES_VAL_SEED), TALES_VAL),
        log_prob=tales.log_prob,
    )


@dataclass(frozen=True)
class _Contents:
    """What is known of a corpus's files once all of them have been read."""

    sha256: str


def _from_files(name: str, path: Path, val_fraction: float) -> Corpus:
    files = _files(path)
    identities = [identity(file, file.stat()) for file in files]
    for file, (_, size, *_) in zip(files, identities, strict=True):
        if file.suffix.lower() == ".txt" and size > MAX_TEXT:
            what = f"{size / 1e9:,.1f} GB in one document, where {MAX_TEXT / 1e9:.1f} GB are the most"
            raise InputError(file, what, "split it into a folder of several")

    def documents() -> Iterator[str]:
        for file, known in zip(files, identities, strict=True):
            yield from (text for text in _READERS[file.suffix.lower()](file) if text and not text.isspace())
            if not file.exists() or identity(file, file.stat()) != known:
                raise InputError(file, "it was changed while it was in use", "begin again")

    count = sum(1 for _ in islice(documents(), math.ceil(1 / val_fraction)))
    if not count:
        raise InputError(path, "it is empty: there is no text in it to train on", "give more text")

    if count * val_fraction < 1:

        def part(held_out: bool) -> Iterator[str]:
            for text in documents():
                cut = int(len(text) * (1 - val_fraction))
                yield text[cut:] if held_out else text[:cut]

    else:

        def part(held_out: bool) -> Iterator[str]:
            for i, text in enumerate(documents()):
                if (int((i + 1) * val_fraction) > int(i * val_fraction)) == held_out:
                    yield text

    def scan() -> _Contents:
        digest = hashlib.sha256()
        for file in files:
            with open_file(file, "check it") as data:
                digest.update(file.suffix.lower().encode())
                digest.update(hashlib.file_digest(data, "sha256").digest())
        return _Contents(digest.hexdigest())

    return Corpus(
        name=name,
        fingerprint=remembered(_Contents, identities, scan).sha256,
        separated=count > 1,
        train_texts=lambda: part(held_out=False),
        val_texts=lambda: part(held_out=True),
        n_bytes=None
        if any(f.suffix.lower() == ".parquet" for f in files)
        else sum(size for _, size, *_ in identities),
    )


def _existing(source: str) -> Path:
    """The existing file or folder; otherwise an error that suggests what was meant."""
    path = Path(source)
    try:
        path = path.expanduser()
        if path.exists():
            return path
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, RuntimeError) as error:  # no permission, a name that is too long, no such user
        raise InputError(source, f"it cannot be read ({reason(error)})", "check the path") from None
    if path.suffix.lower() in _READERS or len(path.parts) > 1:
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise MissingFile(source, "no such file or folder", hint)
    near = difflib.get_close_matches(source.partition(":")[0], NAMES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        source,
        "neither a file, nor a folder, nor a named corpus",
        f"{hint}names: {', '.join(NAMES)}",
    )


def _files(path: Path) -> list[Path]:
    supported = ", ".join(_READERS)
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            what = f"files ending in {path.suffix}" if path.suffix else "files without an ending"
            raise InputError(path, f"{what} are not supported", f"give one that ends in {supported}")
        open_file(path, "give a file or a folder").close()
        return [path]
    found = [f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path))]
    files = sorted(f for f in found if f.suffix.lower() in _READERS)
    if not files:
        endings = sorted({f.suffix or f.name for f in found})
        holds = (
            f"only {', '.join(endings[:5])}{', ...' if len(endings) > 5 else ''}" if endings else "nothing"
        )
        raise InputError(path, f"the folder holds no texts ({supported}), {holds}", "give another folder")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# ---- readers by file extension: a file -> its documents


def _read_txt(path: Path) -> Iterator[str]:
    data = bytearray()
    with open_file(path, "check the file") as file:
        while block := _read(
            path, file.read, 1 << 24
        ):  # a NUL is found before all of a large binary file is in memory
            data += block
            nul = data.find(0, len(data) - len(block))
            if nul >= 0:
                what = f"binary, not text (NUL byte at position {nul:,})"
                remedy = "if it is UTF-16, convert it: iconv -f UTF-16 -t UTF-8 IN.txt > OUT.txt"
                raise InputError(_line(path, data, nul), what, remedy)
    try:
        yield data.decode("utf-8").removeprefix("\ufeff")  # a byte-order mark is not text
    except UnicodeDecodeError as error:
        what = f"not valid UTF-8 at byte {error.start:,} (0x{data[error.start]:02x})"
        remedy = "if it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 IN.txt > OUT.txt"
        raise InputError(_line(path, data, error.start), what, remedy) from None


def _line(path: Path, data: bytearray, position: int) -> str:
    return f"{path}, line {data.count(10, 0, position) + 1:,}"


def _read(path: Path, read: Callable[[int], bytes], size: int) -> bytes:
    """What `read` of a file gives, its OSError as one that names the file."""
    try:
        return read(size)
    except OSError as error:
        raise InputError(path, f"it cannot be read ({reason(error)})", "check the disk") from None


@dataclass
class _Record:
    """A line of .jsonl, as far as it is read."""

    text: str


def _read_jsonl(path: Path) -> Iterator[str]:
    remedy = "each line takes one object with a string 'text' in it, without lone surrogates"
    number = 0
    with open_file(path, "check the file") as file:
        while line := _read(path, file.readline, MAX_LINE + 1):
            number += 1
            where = f"{path}, line {number:,}"
            if len(line) > MAX_LINE:
                raise InputError(where, f"it has more than {MAX_LINE / 1e6:.0f} MB", "split that document")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                blank = line.decode().isspace()
            except UnicodeDecodeError as error:
                what = f"not valid UTF-8 at byte {error.start:,} of the line"
                raise InputError(where, what, "convert the file to UTF-8") from None
            if not blank:
                yield parse_json(line, _Record, where, remedy).text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        remedy = "pip install pyarrow, or from a clone pip install -e '.[parquet]'"
        raise InputError(path, "reading .parquet needs pyarrow", remedy) from None
    remedy, row = "write it again, with the text in a column 'text' of strings", 0
    try:
        with open_file(path, remedy) as file, pq.ParquetFile(file) as table:
            _check_parquet(path, table)
            # few rows at a time: a row of the dictionary may be large and named often
            for batch in table.iter_batches(batch_size=16, columns=["text"]):
                for value in batch.column(0):
                    text = value.as_py()
                    row += 1
                    if text is None:
                        raise InputError(f"{path}, row {row:,}", "there is no text in it", remedy)
                    yield text
    except InputError:
        raise
    except Exception as error:  # whatever pyarrow raises of a damaged file; there are a dozen kinds
        what = f"not a readable parquet file ({str(error).splitlines()[0] if str(error) else error!r})"
        raise InputError(f"{path}, row {row + 1:,}" if row else path, what, remedy) from None


def _check_parquet(path: Path, table: Any) -> None:
    """Raise InputError where a table has no text in it, or claims more of it than a file of its size holds."""
    remedy = "write it again, with the text in a column 'text' of strings"
    schema, metadata, size = table.schema_arrow, table.metadata, path.stat().st_size
    if "text" not in schema.names:
        names = ", ".join(repr(printable(name, 20)) for name in schema.names[:5])
        raise InputError(path, f"no column 'text', but {names}", remedy)
    kind = schema.field("text").type
    of_values = getattr(kind, "value_type", kind) if hasattr(kind, "index_type") else kind  # of a dictionary
    if str(of_values) not in ("string", "large_string", "string_view"):
        raise InputError(path, f"its column 'text' is {printable(kind, 40)}, not string", remedy)
    if metadata.num_rows > 100 * size:
        raise InputError(path, f"it claims {metadata.num_rows:,} rows in {size:,} bytes", remedy)
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for column in map(group.column, range(group.num_columns)):
            claimed = column.total_uncompressed_size
            if column.path_in_schema == "text" and not 0 <= claimed <= max(MAX_GROUP, 50 * size):
                what = f"row group {i} claims {claimed:,} bytes of text in a file of {size:,} bytes"
                raise InputError(path, what, remedy)


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# ---- what is downloaded


def _fetch_text(name: str) -> Path:
    """The named text in the cache, downloaded if necessary. A file put there by hand is checked like a download."""
    remote, path = _DOWNLOADS[name], cached(f"{name}.txt")
    if not path.exists():
        download(remote.url, path, max_bytes=remote.size, sha256=remote.sha256)
    with open_file(path, "put the text there") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != remote.sha256:
        what = f"not the {name} that is known here (sha256 {found[:16]}..., expected {remote.sha256[:16]}...)"
        raise InputError(path, what, "delete it to have it downloaded again, or name a file of your own")
    return path
