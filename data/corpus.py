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
import http.client
import json
import math
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

TALES_TRAIN = 20_000
TALES_VAL = 500
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
_COUNTED = {"tales": "tales:20000", "fineweb10B": "fineweb10B:8"}  # names that take a number, with an example


def open_corpus(source: str | Path, val_fraction: float = 0.1) -> Corpus:
    """The documents of `source`: a .txt, .jsonl or .parquet file, a folder of them, or a name out of `NAMES`.

    `tales:N` asks for N training tales. A name wins over a file of that name; `./tales` is always the file.
    Raises FileNotFoundError or ValueError with the remedy in its message: for what is missing, empty, binary, not UTF-8
    or of an unknown kind, and where a download fails. Errors in a folder's
    later files are raised when these are read.
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
        raise ValueError(f"{source!r}: {name} takes no number, write just {name}")
    if not (number.isascii() and number.isdigit() and int(number) > 0):
        raise ValueError(f"{source!r}: after the colon comes a positive number, as in {_COUNTED[name]}")
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


def _from_files(name: str, path: Path, val_fraction: float) -> Corpus:
    files = _files(path)

    def documents() -> Iterator[str]:
        for file in files:
            yield from (text for text in _READERS[file.suffix.lower()](file) if text and not text.isspace())

    count = sum(1 for _ in islice(documents(), math.ceil(1 / val_fraction)))
    if not count:
        raise ValueError(f"{path} is empty: there is no text in it to train on")

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

    stats = [(file, file.stat()) for file in files]
    identity = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return Corpus(
        name=name,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        separated=count > 1,
        train_texts=lambda: part(held_out=False),
        val_texts=lambda: part(held_out=True),
        n_bytes=None
        if any(f.suffix.lower() == ".parquet" for f in files)
        else sum(s.st_size for _, s in stats),
    )


def _existing(source: str) -> Path:
    """The existing file or folder; otherwise an error that suggests what was meant."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if path.suffix.lower() in _READERS or len(path.parts) > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path."
        raise FileNotFoundError(f"{source}: no such file or folder; {hint}")
    near = difflib.get_close_matches(source.partition(":")[0], NAMES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{source!r} is neither a file, nor a folder, nor a named corpus.{hint} Names: {', '.join(NAMES)}."
    )


def _files(path: Path) -> list[Path]:
    supported = ", ".join(_READERS)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            what = f"files ending in {path.suffix}" if path.suffix else "files without an ending"
            raise ValueError(f"{path}: {what} are not supported; give one that ends in {supported}")
        return [path]
    found = [f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path))]
    files = sorted(f for f in found if f.suffix.lower() in _READERS)
    if not files:
        endings = sorted({f.suffix or f.name for f in found})
        holds = (
            f"only {', '.join(endings[:5])}{', ...' if len(endings) > 5 else ''}" if endings else "nothing"
        )
        raise ValueError(f"{path}: the folder holds no texts ({supported}), {holds}")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


# ---- readers by file extension: a file -> its documents


def _read_txt(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    nul = data.find(0)
    if nul >= 0:
        raise ValueError(
            f"{path}: binary, not text (NUL byte at position {nul:,}). "
            "If it is UTF-16, convert it: iconv -f UTF-16 -t UTF-8 IN.txt > OUT.txt"
        )
    try:
        yield data.decode("utf-8").removeprefix("\ufeff")  # a byte-order mark is not text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not valid UTF-8 at byte {error.start:,} (0x{data[error.start]:02x}). "
            "If it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 IN.txt > OUT.txt"
        ) from None


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not valid UTF-8 at byte {error.start:,} of the line") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not JSON ({error.msg}); each line takes one object with a field 'text'"
                ) from None
            if not isinstance(record, dict) or "text" not in record:
                holds = (
                    f"the fields {', '.join(map(repr, record))}"
                    if isinstance(record, dict)
                    else type(record).__name__
                )
                raise ValueError(
                    f"{where}: no field 'text' in it, but {holds}; rename the field that holds the text"
                )
            yield _checked(record["text"], where)


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"{path}: reading .parquet needs pyarrow: pip install pyarrow, or from a clone pip install -e '.[parquet]'"
        ) from None
    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    with table:
        if "text" not in table.schema_arrow.names:
            raise ValueError(
                f"{path}: no column 'text', but {', '.join(map(repr, table.schema_arrow.names))}"
            )
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for value in batch.column(0):
                row += 1
                yield _checked(value.as_py(), f"{path}, row {row}")


def _checked(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: 'text' is {type(text).__name__}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: a lone surrogate at character {error.start:,} of 'text', which no UTF-8 can hold"
            ) from None
    return text


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# ---- the user's cache and what is downloaded into it


def cache_dir() -> Path:
    """`$FUSEDGPT_CACHE`, else `$XDG_CACHE_HOME/fusedgpt`, else `~/.cache/fusedgpt`. Safe to delete at any time."""
    if own := os.environ.get("FUSEDGPT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedgpt"


def _fetch_text(name: str) -> Path:
    """The named text in the cache, downloaded if necessary. A file put there by hand is checked like a download."""
    remote, path = _DOWNLOADS[name], cache_dir() / f"{name}.txt"
    if not path.exists():
        download(remote.url, path, max_bytes=remote.size, sha256=remote.sha256)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != remote.sha256:
        raise ValueError(
            f"{path}: this is not the {name} that is known here (sha256 {found}, expected {remote.sha256}). "
            "Delete it to have it downloaded again, or give your own file by its path."
        )
    return path


def download(
    url: str,
    path: Path,
    max_bytes: int,
    sha256: str | None = None,
    check: Callable[[Path], object] | None = None,
    timeout: float = 30,
) -> None:
    """Download `url` to `path`, which appears only when complete and verified.

    More than `max_bytes`, another `sha256`, or a `check(file)` that raises: ValueError. No network: FileNotFoundError that
    names where to put the file by hand. Progress is shown on a terminal. Several processes may do this at once.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    digest = hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(url, timeout=timeout) as response,
            part.open("wb") as file,
            Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        ):
            promised = int(response.headers.get("Content-Length") or 0)
            free = shutil.disk_usage(path.parent).free
            if promised > free:
                raise ValueError(
                    f"{path.parent}: {promised / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free; set FUSEDGPT_CACHE"
                )
            task = progress.add_task(path.name, total=promised or None)
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                progress.advance(task, len(block))
                if max(promised, file.tell()) > max_bytes:
                    raise ValueError(
                        f"{url} is larger than the {max_bytes:,} bytes it may have; nothing was kept"
                    )
            if file.tell() < promised:
                raise ConnectionError(f"the connection ended after {file.tell():,} of {promised:,} bytes")
            file.flush()
            os.fsync(file.fileno())
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(
                f"{url}: what came has sha256 {digest.hexdigest()}, expected {sha256}; nothing was kept. "
                f"Something between here and there changes it: fetch it another way and put it at {path}"
            )
        if check:
            check(part)
        os.replace(part, path)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        checksum = f" (sha256 {sha256})" if sha256 else ""
        why = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise FileNotFoundError(
            f"could not download {url}: {why}. "
            f"Without a network, put that file at {path}{checksum}, or train on a file of your own: --data FILE"
        ) from None
    finally:
        part.unlink(missing_ok=True)
