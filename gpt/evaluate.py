"""How good a model is: loss, perplexity and bits per byte; for the embedded tales beside the best that is possible.

Text is scored document by document: each starts from end-of-text where the corpus has several, and every token counts
once. A tale fits the context whole, so the model's loss on tales can be compared with their probability under
the grammar that wrote them, which no model can beat on average.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import tales
from ..data.corpus import open_corpus, split_name
from ..data.shards import TokenShards, is_shard_folder, token_shards
from ..data.tokenizers import Tokenizer
from ..data.windows import EvalWindows
from .config import TrainConfig
from .device import pick_device, pick_dtype
from .generate import generate
from .model import GPT
from .train.checkpoint import load_run

IGNORED = -100  # a target that does not count
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TalesReport:
    """A model beside the grammar: bits per byte of the same whole tales, and the share of its own that are tales."""

    bits_per_byte: float
    best_possible: float
    accepted: float
    sample: str

    def lines(self) -> list[str]:
        return [
            f"loss: {self.bits_per_byte:.4f} bits a byte, best possible {self.best_possible:.4f} "
            f"({self.bits_per_byte - self.best_possible:+.4f})",
            f"accepted: {self.accepted:.0%} of the tales it writes are tales that the grammar could have written",
        ]


@torch.inference_mode()
def mean_loss(model: GPT, batches: Iterable[Batch], dtype: torch.dtype | None = None) -> float:
    """The mean loss in nats over all targets of `batches`, in evaluation mode."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in batches:
        total += model(inputs, targets, dtype=dtype, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    model.train(training)
    return total / count


def validation_batches(
    shards: TokenShards, config: TrainConfig, context_length: int, device: torch.device
) -> list[Batch]:
    """What a run is evaluated on while it trains, the same at every evaluation: windows, or whole tales."""
    size = config.sequences
    if split_name(config.data)[0] == "tales":
        documents = [
            encode_document(shards.tokenizer, tale) for tale in validation_tales(config.eval_windows)
        ]
        return list(document_batches(documents, context_length, size, device))
    return list(EvalWindows(shards.val, context_length, size, config.eval_windows, device))


def validation_tales(count: int) -> list[str]:
    """The first tales of the validation part."""
    texts = open_corpus("tales").val_texts()
    return [tale for _, tale in zip(range(count), texts, strict=False)]


def tales_floor(texts: list[str], tokenizer: Tokenizer) -> float:
    """The best possible loss in nats a token on whole tales, end-of-text included."""
    return -sum(map(tales.log_prob, texts)) / sum(len(encode_document(tokenizer, text)) - 1 for text in texts)


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.end_of_text, *tokenizer.encode_ordinary(text), tokenizer.end_of_text]


def document_batches(
    documents: Iterable[list[int]], context_length: int, batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """Documents as (inputs, targets), int64 of shape (B, ≤ context_length), every target once.

    A document longer than the context continues in a further row, which does not see what came before.
    """
    rows: list[list[int]] = []
    for ids in documents:
        rows += [ids[start : start + context_length + 1] for start in range(0, len(ids) - 1, context_length)]
        while len(rows) >= batch_size:
            yield _padded(rows[:batch_size], device)
            rows = rows[batch_size:]
    if rows:
        yield _padded(rows, device)


def _padded(rows: list[list[int]], device: torch.device) -> Batch:
    length = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED)
    for row, ids in enumerate(rows):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, : len(ids) - 1] = torch.tensor(ids[1:])
    return inputs.to(device), targets.to(device)


def evaluate_tales(
    model: GPT, tokenizer: Tokenizer, dtype: torch.dtype | None = None, written: int = 200, seed: int = 0
) -> TalesReport:
    """Score the validation tales whole, let the model write `written` tales, and ask the grammar about those."""
    texts = validation_tales(500)
    documents = [encode_document(tokenizer, text) for text in texts]
    device = model.wte.weight.device
    n_bytes = sum(len(text.encode()) for text in texts)
    batches = list(document_batches(documents, model.config.context_length, 32, device))
    nats = mean_loss(model, batches, dtype) * sum(len(ids) - 1 for ids in documents)
    own = generate(
        model,
        [[tokenizer.end_of_text]] * written,
        model.config.context_length - 1,
        end_of_text=tokenizer.end_of_text,
        seed=seed,
        dtype=dtype,
    )
    stories = [tokenizer.decode(token for token in ids if token != tokenizer.end_of_text) for ids in own]
    accepted = [story for story in stories if tales.accepts(story)]
    return TalesReport(
        bits_per_byte=nats / math.log(2) / n_bytes,
        best_possible=-sum(map(tales.log_prob, texts)) / math.log(2) / n_bytes,
        accepted=len(accepted) / len(stories),
        sample=(accepted or stories)[0],
    )


def evaluate_run(path: Path, data: str | None = None, device: str = "auto") -> None:
    """Print the loss, perplexity and bits per byte of a run's newest checkpoint.

    Args:
        path: a run folder.
        data: what to score, all of it; by default the validation part of the run's own data.
        device: where to compute.
    """
    place = pick_device(device)
    run = load_run(path, place)
    dtype = pick_dtype("auto", place)
    print(f"{path}, step {run.step:,}: {run.model.num_params():,} parameters")
    source = data or run.config.train.data
    if split_name(source)[0] == "tales":
        report = evaluate_tales(run.model, run.tokenizer, dtype)
        print("\n".join(report.lines()))
        print(f"\n{report.sample}")
        return
    loss, tokens, n_bytes = _score(
        run.model, run.tokenizer, source, data is None, run.config.train.val_fraction, dtype
    )
    print(f"{source}: {tokens:,} tokens")
    print(f"loss: {loss:.4f} nats a token, perplexity {math.exp(loss):,.2f}")
    if n_bytes:
        print(f"      {loss * tokens / math.log(2) / n_bytes:.4f} bits a byte")


def _score(
    model: GPT, tokenizer: Tokenizer, source: str, held_out: bool, val_fraction: float, dtype: torch.dtype
) -> tuple[float, int, int | None]:
    """Loss in nats a token, tokens scored, and the bytes they stand for (None where only tokens are known)."""
    context_length, device = model.config.context_length, model.wte.weight.device
    if is_shard_folder(source) or split_name(source)[0] == "fineweb10B":
        shards = token_shards(source, tokenizer, val_fraction, progress=True)
        windows = EvalWindows(shards.val, context_length, 16, 4096, device)
        return mean_loss(model, windows, dtype), len(windows.windows) * context_length, None
    corpus = open_corpus(source, val_fraction)
    parts = [corpus.val_texts] if held_out else [corpus.train_texts, corpus.val_texts]
    texts = [text for part in parts for text in part()]
    if corpus.separated:
        documents = [encode_document(tokenizer, text) for text in texts]
    else:  # one text, which the split cut in two
        documents = [tokenizer.encode_ordinary("".join(texts))]
    tokens = sum(len(ids) - 1 for ids in documents)
    if tokens == 0:
        raise ValueError(f"{source}: the text is too short to score; it takes at least two tokens")
    loss = mean_loss(model, document_batches(documents, context_length, 16, device), dtype)
    return loss, tokens, sum(len(text.encode()) for text in texts)
