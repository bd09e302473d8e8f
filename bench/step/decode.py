"""Generating text: tokens a second with the key/value cache, beside transformers' `generate` with the same weights.

Both are greedy, and in float32 they have to write the same tokens before anything is timed; of eight rows one may differ,
where rounding decides between two tokens. (In lower precision that happens so often that it is not compared there.) The
time to the first token, which is mostly the prompt's, is reported apart.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from ...gpt.generate import generate
from ..timing import failure
from .implementations import OURS, build_model, load_transformers
from .memory import release
from .sizes import Workload

Writer = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens a row -> the new tokens


@dataclass
class Row:
    """One implementation at one number of rows."""

    name: str
    case: str
    side: str
    milliseconds: float | None = None  # a token in each row, after the first; None: `note` says why
    tokens_per_second: float | None = None  # of all rows together
    prefill: float | None = None  # milliseconds to the first token
    ratio: float | None = None  # its milliseconds over ours
    note: str = ""


def measure(work: Workload, rows: tuple[int, ...] = (1, 8), rounds: int = 5) -> Iterator[Row]:
    """Both implementations at each number of rows; prompts and text stay within the context.

    rounds: timings of each, in turns.
    """
    length, count = (min(work.config.context_length // share, 128) for share in (4, 2))
    model = build_model(work).eval()
    implementations: list[tuple[str, Any, Callable[[Any], Writer]]] = [(OURS, model, _ours)]
    try:
        name = f"transformers {version('transformers')}"
        implementations.append((name, load_transformers(model).to(work.device).eval(), _theirs))
    except (ImportError, PackageNotFoundError):
        print("transformers is not installed and left out: pip install transformers")
    generator = torch.Generator().manual_seed(3)
    prompts = {
        n: torch.randint(work.config.vocab_size, (n, length), generator=generator).tolist() for n in rows
    }
    notes: dict[tuple[int, str], str] = {}
    for n in rows:
        expected = _ours(model)(prompts[n], count)
        for name, module, writer in implementations[1:]:
            try:
                found = writer(module)(prompts[n], count)
                if sum(a != b for a, b in zip(found, expected, strict=True)) > n // 8:
                    notes[n, name] = "writes other tokens in float32: not comparable, not timed"
            except Exception as error:  # others may fail in any way
                notes[n, name] = failure(error)
    writers = {name: writer(module.to(work.dtype)) for name, module, writer in implementations}
    for n in rows:
        case = f"{work.size}, {n} x ({length} + {count}), {str(work.dtype)[6:]}"
        timed = {name: writer for name, writer in writers.items() if (n, name) not in notes}
        times = _turns(list(timed.values()), prompts[n], count, rounds, work.device)
        took = dict(zip(timed, times, strict=True))
        each = {name: (whole - first) / (count - 1) for name, (first, whole) in took.items()}
        for name in writers:
            row = Row("decode", case, name, note=notes.get((n, name), ""))
            if name in each:
                row.milliseconds, row.tokens_per_second = each[name], 1e3 * n / each[name]
                row.prefill, row.ratio = took[name][0], each[name] / each[OURS]
            yield row
    release(work.device)


COLUMNS = (
    ("rows x (prompt + text)", "<36", "case", "{}"),
    ("implementation", "<36", "side", "{}"),
    ("ms a token", ">10", "milliseconds", "{:.2f}"),
    ("tokens/s", ">10", "tokens_per_second", "{:,.0f}"),
    ("prefill ms", ">10", "prefill", "{:.1f}"),
    ("to ours", ">7", "ratio", "{:.2f}"),
)


def _ours(model: Any) -> Writer:
    return lambda prompts, count: generate(model, prompts, count, temperature=0.0)


def _theirs(model: Any) -> Writer:
    device = next(model.parameters()).device

    @torch.inference_mode()
    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        options = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **options)
        return text[:, ids.shape[1] :].tolist()

    return write


def _turns(
    writers: list[Writer], prompts: list[list[int]], count: int, rounds: int, device: torch.device
) -> list[tuple[float, float]]:
    """Median milliseconds of each writer for one token, and for `count` tokens."""
    times: dict[tuple[int, int], list[float]] = {(i, n): [] for i in range(len(writers)) for n in (1, count)}
    for turn in range(rounds + 1):
        for (i, n), own in times.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            writers[i](prompts, n)  # ends with the tokens on the host
            if turn:
                own.append(1e3 * (time.perf_counter() - start))
    return [(median(times[i, 1]), median(times[i, count])) for i in range(len(writers))]
