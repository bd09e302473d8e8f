"""Documents as padded batches: each is scored from its first token, and every token counts once.

Windows (windows.py) begin anywhere, so a model sees the first tokens of most of them without what they depend on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from .windows import Batch

if TYPE_CHECKING:
    from .tokenizers import Tokenizer

IGNORED = -100  # a target that does not count


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` between two end-of-text: the first asks for a new document, the last is part of it."""
    return [tokenizer.end_of_text, *tokenizer.encode_ordinary(text), tokenizer.end_of_text]


def document_batches(
    documents: Iterable[list[int]], context_length: int, batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Documents as (inputs, targets), int64 of shape (B, ≤ context_length), every target once.

    Rows are padded on the right with targets of `IGNORED`. A document longer than the context continues in a further
    row, which does not see what came before.
    """
    rows: list[list[int]] = []
    for ids in documents:
        rows += [ids[start : start + context_length + 1] for start in range(0, len(ids) - 1, context_length)]
        while len(rows) >= batch_size:
            yield _padded(rows[:batch_size], device)
            rows = rows[batch_size:]
    if rows:
        yield _padded(rows, device)


def _padded(rows: list[list[int]], device: torch.device | str) -> Batch:
    length = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED)
    for row, ids in enumerate(rows):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
    return inputs.to(device), targets.to(device)
