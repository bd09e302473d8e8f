"""Generating text: tokens a second with the cache of keys and values, beside transformers' `generate` with the same weights.

Both are greedy, and in float32 they have to write the same tokens before anything is timed; of eight rows one may differ, where
rounding tips the balance between two tokens (in lower precision it does so often, so there it is not asked for). The time of the first token, which is mostly the prompt's, stands apart.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

from ...gpt.generate import generate
from ...gpt.model import GPT
from .implementations import OURS, build_model, load_transformers
from .memory import failure, release
from .sizes import Workload

Writer = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens a row -> the new tokens


@dataclass
class Row:
    """One side at one number of rows."""

    name: str
    case: str
    side: str
    milliseconds: float | None = None  # of a token in each row, after the first; None: `note` says why
    tokens_per_second: float | None = None  # of all rows together
    prefill: float | None = None  # milliseconds to the first token
    ratio: float | None = None  # its milliseconds over ours
    note: str = ""


def measure(work: Workload, rows: tuple[int, ...] = (1, 8), rounds: int = 5) -> Iterator[Row]:
    """Both sides at each number of rows; prompts and text stay within the context.

    rounds: timings of each side, in turns.
    """
    length, count = (min(work.config.context_length // share, 128) for share in (4, 2))
    model = build_model(work).eval()
    sides: list[tuple[str, torch.nn.Module, Callable[[torch.nn.Module], Writer]]] = [(OURS, model, _ours)]
    try:
        name = f"transformers {version('transformers')}"
        sides.append((name, load_transformers(model).to(work.device).eval(), _theirs))
    except (ImportError, PackageNotFoundError):
        print("transformers is not installed and left out: pip install 'fusedgpt[bench]'")
    generator = torch.Generator().manual_seed(3)
    notes: dict[tuple[int, str], str] = {}
    prompts = {
        n: torch.randint(work.config.vocab_size, (n, length), generator=generator).tolist() for n in rows
    }
    for n in rows:
        expected = _ours(model)(prompts[n], count)
        for name, module, writer in sides[1:]:
            try:
                found = writer(module)(prompts[n], count)
                if sum(a != b for a, b in zip(found, expected, strict=True)) > n // 8:
                    notes[n, name] = "writes other tokens in float32: not comparable, not timed"
            except Exception as error:  # a peer may fail in any way
                notes[n, name] = failure(error)
    writers = [(name, writer(module.to(work.dtype))) for name, module, writer in sides]
    for n in rows:
        case = f"{work.size}, {n} x ({length} + {count}), {str(work.dtype)[6:]}"
        fit = [(name, writer) for name, writer in writers if (n, name) not in notes]
        first, whole = _turns([writer for _, writer in fit], prompts[n], count, rounds, work.device)
        timed = {}
        for (name, _), prefill, total in zip(fit, first, whole, strict=True):
            each = (total - prefill) / (count - 1)
            timed[name] = Row("decode", case, name, each, 1e3 * n / each, prefill, each)
        for name, _ in writers:
            row = timed.get(name) or Row("decode", case, name, note=notes[n, name])
            if row.milliseconds is not None:
                row.ratio = row.milliseconds / timed[OURS].milliseconds  # type: ignore[operator]
            yield row
    release(work.device)


def _ours(model: torch.nn.Module) -> Writer:
    assert isinstance(model, GPT)
    return lambda prompts, count: generate(model, prompts, count, temperature=0.0)


def _theirs(model: torch.nn.Module) -> Writer:
    device = next(model.parameters()).device

    @torch.inference_mode()
    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        text = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return text[:, ids.shape[1] :].tolist()

    return write


def _turns(
    writers: list[Writer], prompts: list[list[int]], count: int, rounds: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Median milliseconds of each writer for one token and for `count` tokens."""
    times: dict[tuple[int, int], list[float]] = {(i, n): [] for i in range(len(writers)) for n in (1, count)}
    for turn in range(rounds + 1):
        for (i, n), own in times.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            writers[i](prompts, n)  # ends with the tokens on the host
            if turn:
                own.append(1e3 * (time.perf_counter() - start))
    first, whole = ([median(times[i, n]) for i in range(len(writers))] for n in (1, count))
    return first, whole


HEADS = ("rows x (prompt + text)", "side", "ms a token", "tokens/s", "prefill ms", "to ours")
LINE = "{:<36}{:<38}{:>11}{:>11}{:>12}{:>9}  {}"


def line(row: Row) -> str:
    """A row of the table."""
    if row.milliseconds is None:
        return LINE.format(row.case, row.side, "", "", "", "", row.note)
    figures = f"{row.milliseconds:.2f}", f"{row.tokens_per_second:,.0f}", f"{row.prefill:.1f}"
    return LINE.format(row.case, row.side, *figures, f"{row.ratio:.2f}" if row.ratio else "", "").rstrip()
