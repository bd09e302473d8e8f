"""`python -m fusedgpt.bench data`: tokenizers beside the libraries that a user would pick instead.

Training of byte-level BPE beside Hugging Face's tokenizers, which uses all cores (tests show that the merges are equal), and encoding
with GPT-2's vocabulary beside tiktoken, which has to give equal ids. Both get the same list of documents.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from ..data.corpus import open_corpus
from ..data.tokenizers import BPETokenizer, make_tokenizer
from . import table, timing
from .ops.cases import OURS
from .record import recording

SOURCES = ("tales:20000", "languages:2", "languages:10")
CPU = torch.device("cpu")
# the first letters of scripts: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Bengali, Thai, Georgian,
# Ethiopic, Hiragana, Han, Hangul
SCRIPTS = "aαаաאاअকกაሀあ一가"
LANGUAGES = 133
Call = Callable[[], Any]


@dataclass
class Row:
    """One implementation on one corpus."""

    name: str
    case: str
    side: str
    seconds: float | None = None  # None: `note` says why
    megabytes_per_second: float | None = None
    ratio: float | None = None  # its time over ours
    note: str = ""


COLUMNS = (
    ("work", "<12", "name", "{}"),
    ("texts", "<42", "case", "{}"),
    ("implementation", "<20", "side", "{}"),
    ("seconds", ">9", "seconds", "{:.3f}"),
    ("MB/s", ">7", "megabytes_per_second", "{:.1f}"),
    ("to ours", ">7", "ratio", "{:.2f}"),
)


def run_data(
    sources: Sequence[str] = (),
    vocab_sizes: Sequence[int] = (4096, 32768),
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Measure, print a table, and write the record where asked for.

    Args:
        sources: whatever `open_corpus` takes, or `languages:N` for N megabytes made here.
        vocab_sizes: of the trained tokenizers.
        rounds: turns of each implementation.
        out: write the record there as JSON.

    Raises:
        ValueError, OSError: there is no such source.
    """
    with recording("data", CPU, out) as found:
        print(table.heading(COLUMNS), flush=True)
        found["rows"] = []
        for row in map(asdict, measure(sources or SOURCES, vocab_sizes, rounds)):
            print(table.line(COLUMNS, row), flush=True)
            found["rows"].append({"benchmark": "data", **row})


def measure(sources: Sequence[str], vocab_sizes: Sequence[int], rounds: int) -> Iterator[Row]:
    """Training at every size of the vocabulary, and encoding, on every source."""
    try:
        peer = f"tokenizers {version('tokenizers')}"
    except PackageNotFoundError:
        peer = None
        print("tokenizers is not installed and left out: pip install tokenizers")
    for source in sources:
        texts = documents(source)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        about = f"{Path(source.partition(':')[0]).name}, {megabytes:.3g} MB"
        for vocab_size in vocab_sizes:
            calls: dict[str, Call] = {OURS: partial(BPETokenizer.train, texts, vocab_size)}
            if peer:
                calls[peer] = partial(train_theirs, texts, vocab_size)
            yield from _rows("train bpe", f"{about}, {vocab_size:,} tokens", megabytes, calls, rounds)
        try:
            yield from _rows("encode gpt2", about, megabytes, encoders(texts), rounds)
        except (OSError, ValueError) as error:
            yield Row("encode gpt2", about, OURS, note=timing.failure(error))


def _rows(name: str, case: str, megabytes: float, calls: dict[str, Call], rounds: int) -> Iterator[Row]:
    times = timing.medians([_timed(call) for call in calls.values()], CPU, rounds, warm_up=0)
    for side, milliseconds in zip(calls, times, strict=True):
        yield Row(
            name, case, side, milliseconds / 1e3, 1e3 * megabytes / milliseconds, milliseconds / times[0]
        )


def _timed(call: Call) -> timing.Call:
    return lambda _: call()


def train_theirs(texts: Sequence[str], vocab_size: int) -> Any:
    """Hugging Face's byte-level BPE with as many merges as ours: they have no special token."""
    import tokenizers

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs


def encoders(texts: Sequence[str]) -> dict[str, Call]:
    """GPT-2's tokenizer and tiktoken's on the texts.

    Raises:
        OSError, ValueError: the vocabulary is not here, or the ids differ.
    """
    import tiktoken

    ours, theirs = make_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")

    def call(encode: Callable[[str], list[int]]) -> list[list[int]]:
        return [encode(text) for text in texts]

    calls: dict[str, Call] = {
        OURS: partial(call, ours.encode_ordinary),
        f"tiktoken {version('tiktoken')}": partial(call, theirs.encode_ordinary),
    }
    first, *others = (each() for each in calls.values())
    if any(ids != first for ids in others):
        raise ValueError("tiktoken gives other ids: not comparable, not timed")
    return calls


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table of a record's rows for docs/benchmarks.md."""
    ours = {(row["name"], row["case"]): row["seconds"] for row in rows if row["side"] == OURS}
    cells = [
        (f"{row['name']}: {row['case']}", f"{mine:,.2f} s", row["side"], f"{row['ratio']:.2f}")
        for row in rows
        if row["side"] != OURS and (mine := ours[row["name"], row["case"]])
    ]
    return table.markdown(("tokenizers", "ours", "other", "its time over ours"), cells)


# ---- texts


def documents(source: str) -> list[str]:
    """The training documents of whatever `open_corpus` takes, or those of `languages:N`, N megabytes."""
    name, _, megabytes = source.partition(":")
    if name != "languages":
        return list(open_corpus(source).train_texts())
    if not (megabytes.isdecimal() and int(megabytes)):
        raise ValueError(f"{source!r}: after the colon comes a number of megabytes, as in languages:10")
    return list(languages(10**6 * int(megabytes)))


def languages(n_bytes: int) -> Iterator[str]:
    """Documents of 100 words, each in one of many languages: the r-th word of a language occurs about 1 / r times.

    Tuned to have as many different words as 2, 10 and 50 MB of the translated messages of a Linux system: 80,000, 250,000
    and 650,000.
    """
    draw = random.Random(0)
    lexicons: list[dict[int, str]] = [{} for _ in range(LANGUAGES)]
    alphabets = [draw.sample(_letters(SCRIPTS[i % len(SCRIPTS)]), 30) for i in range(LANGUAGES)]
    weights = range(30, 0, -1)
    while n_bytes > 0:
        i = draw.randrange(LANGUAGES)
        words = []
        for _ in range(100):
            rank = int(20_000 ** draw.random())
            if rank not in lexicons[i]:
                length = 1 + int(draw.expovariate(1 / (1 + 0.3 * rank.bit_length())))
                lexicons[i][rank] = "".join(draw.choices(alphabets[i], weights, k=length))
            words.append(lexicons[i][rank])
        text = " ".join(words) + ".\n"
        n_bytes -= len(text.encode())
        yield text


def _letters(first: str) -> list[str]:
    """30 letters of a script."""
    return list(islice(filter(str.isalpha, map(chr, count(ord(first)))), 30))
