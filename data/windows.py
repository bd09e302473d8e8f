"""Windows over tokens in reading order, the same every time: for study, fine-tuning and evaluation.

A window of `context_length` inputs needs `context_length + 1` tokens: the targets are the inputs one place further on.
Shuffled windows for training are in loader.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .token_file import TokenFile, open_shard
from .untrusted import printable

Tokens = TokenFile | np.ndarray
Shard = str | Path | Tokens  # a shard file, or its tokens
Batch = tuple[torch.Tensor, torch.Tensor]


def require_window(n_tokens: int, context_length: int, part: str, folder: Path | None = None) -> None:
    """Raise ValueError, with a context length that fits, where `n_tokens` do not hold one window and its last target.

    `part` is what the message calls the tokens: `"training"`, `"validation"`, ...; `folder` is where their shards are.
    """
    if context_length < 1:
        raise ValueError(f"context_length is {context_length}: a window takes at least 1 token")
    if n_tokens > context_length:
        return
    message = (
        f"{printable(folder, 120) + ': ' if folder else ''}the {part} part has {n_tokens:,} tokens, too few for one window of context_length {context_length} "
        "and its last target"
    )
    if n_tokens < 2:
        raise ValueError(f"{message}. Give more text.")
    fits = 1 << (n_tokens - 1).bit_length() - 1
    share = "a smaller" if part == "training" else "a larger"
    raise ValueError(
        f"{message}. Use --context-length {fits} ({n_tokens - 1} at most), {share} --val-fraction, or more text."
    )


def tokens_of(shard: Shard | Sequence[int]) -> Tokens:
    """The tokens of a shard; those of a file are read when they are sliced."""
    if isinstance(shard, str | Path):
        return open_shard(shard)
    return shard if isinstance(shard, TokenFile) else np.asarray(shard)


class Tiling:
    """Windows side by side in every shard, (n - 1) // context_length in one of n tokens, numbered through all shards.

    Raises ValueError where there is none.
    """

    def __init__(self, shards: Sequence[Shard], context_length: int, part: str) -> None:
        self.tokens = [tokens_of(shard) for shard in shards]
        self.dtype = np.result_type(np.uint16, *(tokens.dtype for tokens in self.tokens))
        n_tokens = max((len(t) for t in self.tokens), default=0)
        first = self.tokens[0] if self.tokens else None
        require_window(
            n_tokens, context_length, part, first.path.parent if isinstance(first, TokenFile) else None
        )
        counts = [max(0, len(t) - 1) // context_length for t in self.tokens]
        self.ends = list(accumulate(counts))  # one past the last window of each shard
        self.n_windows = self.ends[-1]

    def find(self, window: int) -> tuple[int, int]:
        """The index of the window's shard and its place among the windows of that shard."""
        shard = bisect_right(self.ends, window)
        return shard, window - (self.ends[shard - 1] if shard else 0)

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens of a shard; `check` tells whether they were right."""
        tokens = self.tokens[shard]
        return tokens.read(start, stop) if isinstance(tokens, TokenFile) else tokens[start:stop]

    def check(self, starts: Mapping[int, int]) -> None:
        """Raise InputError where a shard that was read has changed; `starts` has a token of each that was read."""
        for shard, start in starts.items():
            tokens = self.tokens[shard]
            if isinstance(tokens, TokenFile):
                tokens.check(start)


class WindowDataset(Dataset[Batch]):
    """Windows that start `stride` tokens apart, as (inputs, targets): two int64 tensors of shape (context_length,).

    `tokens` is one dimension of ids: a list, an array, or `open_shard(path)`. Windows overlap where `stride` is smaller than
    `context_length` (its default); a rest too short for a window is left out. Raises ValueError where there is no window.
    """

    def __init__(
        self,
        tokens: Sequence[int] | Tokens,
        context_length: int,
        stride: int | None = None,
        part: str = "training",
    ) -> None:
        self.tokens = tokens_of(tokens)
        self.context_length = context_length
        self.stride = context_length if stride is None else stride
        if self.stride < 1:
            raise ValueError(f"stride is {stride}: windows start at least 1 token apart")
        require_window(len(self.tokens), context_length, part)

    def __len__(self) -> int:
        return (len(self.tokens) - self.context_length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        window = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]


class EvalWindows:
    """At most `max_windows` windows, spread evenly over the shards and the same at every pass, in batches.

    Iterating gives (inputs, targets), int64 of shape (B, context_length) on `device`; the last batch may be smaller.
    `len()` counts batches. Windows neither overlap nor cross shards. Raises ValueError where no window fits.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        context_length: int,
        batch_size: int,
        max_windows: int | None = None,
        device: torch.device | str = "cpu",
        part: str = "validation",
    ) -> None:
        if batch_size < 1 or (max_windows is not None and max_windows < 1):
            raise ValueError(
                f"batch_size {batch_size}, max_windows {max_windows}: evaluation takes at least 1 of each"
            )
        self.tiling = Tiling(shards, context_length, part)
        available = self.tiling.n_windows
        kept = min(available, max_windows or available)
        self.windows = [i * available // kept for i in range(kept)]
        self.context_length, self.batch_size, self.device = context_length, batch_size, device

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        length = self.context_length
        for first in range(0, len(self.windows), self.batch_size):
            rows, starts = [], {}
            for shard, place in map(self.tiling.find, self.windows[first : first + self.batch_size]):
                starts[shard] = place * length
                rows.append(self.tiling.read(shard, place * length, (place + 1) * length + 1))
            self.tiling.check(starts)
            batch = torch.from_numpy(np.stack(rows).astype(np.int64)).to(self.device)
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
