"""Evaluation: loss, perplexity and bits per byte; for the embedded tales also the best possible loss.

Text is scored document by document: each starts from end-of-text if the corpus has several, and every token counts once.
A tale fits into the context, so the model's loss on tales can be compared with their probability under the grammar that
wrote them, which no model can beat on average.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ..data.corpus import Corpus, open_corpus
from ..data.documents import IGNORED, document_batches, encode_document
from ..data.shards import TokenShards, holds_tokens, token_shards
from ..data.token_file import checksum, open_shard
from ..data.tokenizers import Tokenizer
from ..data.windows import Batch, EvalWindows
from .config import TrainConfig
from .device import pick_device, pick_dtype
from .generate import generate
from .model import GPT
from .run import Run, load_run

SCORED = 500  # documents scored of a corpus that knows their probabilities


@dataclass(frozen=True)
class CorpusReport:
    """A model compared with the source of its corpus: the loss of both on the same documents, and the share of the
    model's own documents that the source could have written."""

    bits_per_byte: float
    best_possible: float  # in bits a byte
    bytes_per_token: float
    accepted: float
    sample: str

    def lines(self) -> list[str]:
        bits, best = self.bits_per_byte, self.best_possible
        nats = math.log(2) * self.bytes_per_token  # in one bit a byte
        return [
            f"loss: {nats * bits:.4f} nats a token, best possible {nats * best:.4f} ({nats * (bits - best):+.4f})",
            f"      {bits:.4f} bits a byte, best possible {best:.4f} ({bits - best:+.4f})",
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
    """The batches of every evaluation during training: windows, or whole documents if the corpus knows their
    probabilities."""
    size = config.sequences
    if shards.corpus is None or shards.corpus.log_prob is None:
        return list(EvalWindows(shards.val, context_length, size, config.eval_windows, device))
    texts = islice(shards.corpus.val_texts(), config.eval_windows)
    documents = (encode_document(shards.tokenizer, text) for text in texts)
    return list(document_batches(documents, context_length, size, device))


def best_possible(corpus: Corpus | None, tokenizer: Tokenizer, count: int) -> float | None:
    """The best possible loss in nats per token on the first `count` validation documents, end-of-text included; None if the
    corpus does not know their probabilities."""
    if corpus is None or corpus.log_prob is None:
        return None
    texts = list(islice(corpus.val_texts(), count))
    tokens = sum(len(encode_document(tokenizer, text)) - 1 for text in texts)
    return -sum(map(corpus.log_prob, texts)) / tokens


def evaluate_corpus(
    model: GPT,
    tokenizer: Tokenizer,
    corpus: Corpus,
    dtype: torch.dtype | None = None,
    written: int = 200,
    seed: int = 0,
) -> CorpusReport:
    """Score validation documents, generate `written` documents, and check which of these the source could have written.

    Raises:
        ValueError: the corpus does not know the probabilities of its documents.
    """
    if corpus.log_prob is None:
        raise ValueError(f"{corpus.name}: this evaluation needs a corpus with log_prob")
    texts = list(islice(corpus.val_texts(), SCORED))
    documents = [encode_document(tokenizer, text) for text in texts]
    device = model.wte.weight.device
    n_bytes = sum(len(text.encode()) for text in texts)
    bytes_per_token = n_bytes / sum(len(ids) - 1 for ids in documents)
    batches = list(document_batches(documents, model.config.context_length, 32, device))
    loss = mean_loss(model, batches, dtype)
    own = generate(
        model,
        [[tokenizer.end_of_text]] * written,
        model.config.context_length - 1,
        end_of_text=tokenizer.end_of_text,
        seed=seed,
        dtype=dtype,
    )
    stories = [tokenizer.decode(token for token in ids if token != tokenizer.end_of_text) for ids in own]
    accepted = [story for story in stories if corpus.log_prob(story) > -math.inf]
    return CorpusReport(
        bits_per_byte=bits_per_byte(loss, bytes_per_token),
        best_possible=-sum(map(corpus.log_prob, texts)) / math.log(2) / n_bytes,
        bytes_per_token=bytes_per_token,
        accepted=len(accepted) / len(stories),
        sample=(accepted or stories)[0],
    )


def evaluate_run(path: Path, data: str | None = None, device: str = "auto") -> None:
    """Print the loss, perplexity and bits per byte of a run's newest checkpoint.

    Args:
        path: a run folder.
        data: a source, scored as a whole; by default the validation part of the run's own data. A text that the run was
            trained on is reported as such.
        device: where to compute.
    """
    place = pick_device(device)
    run = load_run(path, place)
    dtype = pick_dtype("auto", place)
    print(f"{path}, step {run.step:,}: {run.model.num_params():,} parameters")
    source, val_fraction = data or run.config.train.data, run.config.train.val_fraction
    if holds_tokens(source):
        shards = token_shards(source, run.tokenizer, val_fraction, progress=True)
        loss, tokens, bytes_per_token = _score_shards(run.model, shards, dtype)
    else:
        corpus = open_corpus(source, val_fraction)
        if corpus.log_prob is not None:
            report = evaluate_corpus(run.model, run.tokenizer, corpus, dtype)
            print("\n".join(report.lines()))
            print(f"\n{report.sample}")
            return
        loss, tokens, bytes_per_token = _score_text(run.model, run.tokenizer, corpus, data is None, dtype)
    print(f"{source}{', validation part' if data is None else ''}: {tokens:,} tokens")
    if data is not None and not holds_tokens(source) and _trained_on(run, source):
        print("      this includes the text that the run was trained on: expect a higher loss on new text")
    print(f"loss: {loss:.4f} nats a token, perplexity {math.exp(loss):,.2f}")
    if bytes_per_token:
        print(f"      {bits_per_byte(loss, bytes_per_token):.4f} bits a byte")


def _trained_on(run: Run, source: str) -> bool:
    """Whether the tokens of the training part of `source` are those that a run's record names."""
    if run.trained_on is None:
        return False
    shards = token_shards(source, run.tokenizer, run.config.train.val_fraction, progress=True)
    return checksum(map(open_shard, shards.train)) == run.trained_on


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / math.log(2) / bytes_per_token


def _score_shards(model: GPT, shards: TokenShards, dtype: torch.dtype) -> tuple[float, int, float | None]:
    """Loss in nats per token on windows of the validation part, number of tokens, and bytes per token (None if unknown)."""
    windows = EvalWindows(shards.val, model.config.context_length, 16, 4096, model.wte.weight.device)
    tokens = len(windows.windows) * model.config.context_length
    return mean_loss(model, windows, dtype), tokens, shards.val_bytes_per_token


def _score_text(
    model: GPT, tokenizer: Tokenizer, corpus: Corpus, held_out: bool, dtype: torch.dtype
) -> tuple[float, int, float]:
    """Loss in nats per token on the documents (of the validation part if `held_out`), number of tokens, bytes per token."""
    context_length, device = model.config.context_length, model.wte.weight.device
    parts = [corpus.val_texts] if held_out else [corpus.train_texts, corpus.val_texts]
    texts = [text for part in parts for text in part()]
    if corpus.separated:
        documents = [encode_document(tokenizer, text) for text in texts]
    else:  # one text, which the split cut in two
        documents = [tokenizer.encode_ordinary("".join(texts))]
    tokens = sum(len(ids) - 1 for ids in documents)
    if tokens == 0:
        raise ValueError(f"{corpus.name}: the text is too short to score; it takes at least two tokens")
    loss = mean_loss(model, document_batches(documents, context_length, 16, device), dtype)
    return loss, tokens, sum(len(text.encode()) for text in texts) / tokens
