"""Text out of a model: the cache of keys and values, the choice of the next token, and the loop around them.

A batch of prompts of different lengths is padded on the left, so that the last column holds every row's newest token;
`first_key` hides the padding and `positions` starts each row's count behind it. A row ends on its own.

When a window is full, the newest half of it is fed again as a new window and the cache starts over. Positions are
learnt, one vector a place, so moving the window moves every token to another place and no cached key stays valid:
sliding by one token each step would cost a pass over the whole window for every token. Halving costs one such
pass every context_length / 2 tokens, and the model always sees between half a context and a whole one.
"""

import math
import random
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import linear
from .config import ModelConfig
from .device import require_memory
from .model import GPT

if TYPE_CHECKING:  # ids alone take no tokenizer, nor the libraries under one
    from ..data.tokenizers import Tokenizer

MAX_TOKENS = 1 << 20  # new tokens a row
MAX_SAMPLES = 1 << 16  # of a prompt


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    end_of_text: int | None = None,
    seed: int | None = None,
    on_token: Callable[[int, int], bool] | None = None,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to max_tokens tokens.

    A row has a stream of draws of its own, from (seed, row): up to rounding its tokens depend on the seed, its place
    in the batch and its prompt alone, not on the other rows and not on the device.

    Args:
        model: in any mode; it runs in evaluation mode and is put back.
        prompts: token ids; an empty one begins with end_of_text.
        max_tokens: the most new tokens a row; prompt and new tokens together may be more than the context.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: draw from the k likeliest tokens only; 0: from all.
        top_p: draw only from the likeliest tokens that together reach this probability, the one that crosses it
            included (Holtzman et al., 2020).
        repetition_penalty: the logit of every token in the prompt or the new text is divided by it where positive and
            multiplied where negative (Keskar et al., 2019, section 4.1).
        end_of_text: the token that ends a row; None: nothing does.
        seed: of the draws; None: another one every time.
        on_token: called with (row, token) for every new token; the row ends where it returns True.
        dtype: of the activations, the weights' by default.

    Returns:
        The new tokens of every row, without its prompt and without end_of_text.

    Raises:
        ValueError: a setting that is not allowed, no prompt, or a prompt that is longer than the context, has an id
            outside the vocabulary, or is empty where there is no end_of_text.
    """
    _require(
        1 <= max_tokens <= MAX_TOKENS, "max_tokens", max_tokens, f"a whole number from 1 to {MAX_TOKENS}"
    )
    rows = _starts(prompts, model.config, end_of_text)
    _require_memory(model, rows, max_tokens, dtype)
    starts = [len(row) for row in rows]
    sampler = _Sampler(rows, temperature, top_k, top_p, repetition_penalty, seed)
    decoder = _Decoder(model, rows, dtype)
    live = list(range(len(rows)))

    training = model.training
    model.eval()
    try:
        for left in range(max_tokens, 0, -1):
            logits = decoder.logits(live, left)
            tokens = dict(zip(decoder.batch, sampler(logits, decoder.batch), strict=True))
            live = [row for row in live if tokens[row] != end_of_text]
            for row in live:
                rows[row].append(tokens[row])
            if on_token is not None:
                live = [row for row in live if not on_token(row, tokens[row])]
            if not live:
                break
    finally:
        model.train(training)
    return [row[start:] for row, start in zip(rows, starts, strict=True)]


def _starts(
    prompts: Sequence[Sequence[int]], config: ModelConfig, end_of_text: int | None
) -> list[list[int]]:
    """The tokens that every row begins with, checked."""
    if not prompts:
        raise ValueError("there is no prompt; to write from nothing give an empty one")
    rows = [list(prompt) for prompt in prompts]
    for number, row in enumerate(rows):
        name = "the prompt" if len(rows) == 1 else f"prompt {number}"
        if not row:
            if end_of_text is None:
                raise ValueError(
                    f"{name} is empty, and there is no end_of_text to begin with; give it a token"
                )
            row.append(end_of_text)
        if len(row) > config.context_length:
            raise ValueError(
                f"{name} has {len(row)} tokens, and the model sees {config.context_length} at once; shorten it by "
                f"{len(row) - config.context_length} tokens, or use a model with a larger context_length"
            )
        if not 0 <= min(row) <= max(row) < config.vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(
                f"{name} has the token {wrong}, and the model knows 0 to {config.vocab_size - 1}; encode it with the "
                "model's own tokenizer"
            )
    return rows


def _require_memory(model: GPT, rows: list[list[int]], max_tokens: int, dtype: torch.dtype | None) -> None:
    """Raise ValueError where weights, cache, first pass and logits need more than all of the device's memory."""
    config, weights = model.config, model.wte.weight
    longest = max(map(len, rows))
    slots = min(config.context_length, longest + max_tokens - 1)
    size = (dtype or weights.dtype).itemsize
    token = (
        size * config.n_embd * (2 * config.n_layer * slots + 12 * longest)
    )  # a layer of it keeps 10 states
    need = weights.element_size() * config.parameters + len(rows) * (token + 4 * 8 * config.vocab_size)
    what = f"writing {len(rows):,} texts of up to {slots:,} tokens at once"
    require_memory(weights.device, need, what, "ask for fewer samples, or shorter ones")


def _require(condition: bool, name: str, value: object, takes: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed; it takes {takes}")


def generate_text(
    model: GPT,
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    max_tokens: int,
    *,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], object] | None = None,
    **settings: Any,
) -> list[str]:
    """Continue every prompt, from text to text; `<|endoftext|>` ends a text, and an empty prompt begins with it.

    Args:
        prompts: special tokens in them count as such.
        stop: a text ends before the first of these strings that occurs in it, whatever tokens it is made of.
        on_text: called with (row, text) for every new piece of a text as soon as nothing that comes can change it:
            unfinished characters and what may become a stop string are held back. All pieces are the result.
        model, max_tokens, settings: as in `generate`.

    Returns:
        The new text of every row, without its prompt.

    Raises:
        ValueError: as in `generate`, an empty stop string, or a prompt that the tokenizer cannot encode.
    """
    if "" in stop:
        raise ValueError("stop has an empty string, which every text begins with; leave it out")
    encoded = [tokenizer.encode(prompt, allowed_special="all") for prompt in prompts]
    texts = [TextStream(tokenizer, ids, stop) for ids in encoded]

    def on_token(row: int, token: int) -> bool:
        release(row, texts[row].add(token))
        return texts[row].stopped

    def release(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    generate(model, encoded, max_tokens, end_of_text=tokenizer.end_of_text, on_token=on_token, **settings)
    for row, text in enumerate(texts):
        release(row, text.close())
    return [text.text for text in texts]


class TextStream:
    """Text from tokens that come one by one, released as soon as it is final.

    Args:
        tokenizer: the one that the tokens belong to.
        prompt: the tokens before the text, which are not part of it.
        stop: strings that end the text; it is cut before the first.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.text = ""  # what has been released
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        # The newest tokens, and how many of them are text already: those stay for one round as the left neighbours
        # of what follows, because some tokenizers put a space between two tokens.
        self._ids, self._decoded = list(prompt), len(prompt)
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that has become final with one more token."""
        self._ids.append(token)
        return self._release(last=False)

    def close(self) -> str:
        """The rest of the text, once no token comes any more."""
        return self._release(last=True)

    def _release(self, last: bool) -> str:
        if self.stopped:
            return ""
        now = self._tokenizer.decode(self._ids)
        if last or not now.endswith("\ufffd"):  # else perhaps the first bytes of a character
            self._held += now[len(self._tokenizer.decode(self._ids[: self._decoded])) :]
            self._ids, self._decoded = self._ids[self._decoded :], len(self._ids) - self._decoded
        found = [place for string in self._stop if (place := self._held.find(string)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - (0 if last else self._undecided())
        piece, self._held = self._held[:end], self._held[end:]
        self.text += piece
        return piece

    def _undecided(self) -> int:
        """How many of the last characters held may be the beginning of a stop string."""
        lengths = (
            n for string in self._stop for n in range(1, len(string)) if self._held.endswith(string[:n])
        )
        return max(lengths, default=0)


class KVCache:
    """Keys and values of the tokens seen so far, for rows of different lengths padded on the left. No gradients.

    Args:
        config: the model's.
        lengths: of each row's first tokens; the longest fills its slots, the others are padded to it.
        capacity: slots a row, at most context_length.
        dtype, device: of the keys and values.
    """

    def __init__(
        self, config: ModelConfig, lengths: list[int], capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # heads before slots: what has been filled of a head is one block, which batched matmuls read without a copy
        shape = (2 * config.n_layer, len(lengths), config.n_head, capacity, config.head_dim)
        self.entries = torch.empty(shape, dtype=dtype, device=device)  # each layer's keys, then its values
        self.padding = torch.tensor([[max(lengths) - n] for n in lengths], device=device)  # (B, 1)
        self.padded = min(lengths) < max(lengths)
        self.used = 0
        self.advance(max(lengths))

    @property
    def full(self) -> bool:
        return self.used == self.entries.shape[3]

    def advance(self, count: int) -> None:
        """Take the next `count` slots; the forward pass that follows fills them."""
        before, self.used = self.used, self.used + count
        slots = torch.arange(before, self.used, device=self.padding.device)
        self.positions = (slots - self.padding).clamp_(min=0)  # (B, T)
        self.first_key = self.padding.expand(-1, count) if self.padded else None  # (B, T)
        # views for all layers at once: made layer by layer they take longer than what is copied into them
        entries = self.entries.transpose(2, 3)
        self._seen = entries[:, :, : self.used].unbind()
        self._new = entries[:, :, before : self.used].unbind()

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest (B, T, H, D) keys and values of a layer; all of that layer's, (B, used, H, D)."""
        self._new[2 * layer].copy_(k)
        self._new[2 * layer + 1].copy_(v)
        return self._seen[2 * layer], self._seen[2 * layer + 1]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.entries, self.padding = self.entries[:, rows], self.padding[rows]


class _Decoder:
    """The next logits of rows of tokens that grow, whatever their lengths."""

    def __init__(self, model: GPT, rows: list[list[int]], dtype: torch.dtype | None) -> None:
        self.model, self.rows = model, rows
        self.head = list(model.vocabulary_tables())[-1][: model.config.vocab_size]
        self.dtype = dtype or self.head.dtype
        self.begin = [0] * len(rows)  # where each row's window begins
        self.batch: list[int] = []  # the rows in the cache
        self.cache: KVCache | None = None

    def logits(self, live: list[int], left: int) -> Tensor:
        """The next logits of the rows `batch`, (B, V): of those in live, and of some that have ended.

        Args:
            live: the rows that still grow; each but a first time has one token more than the last time.
            left: how many tokens they may still grow by.
        """
        if self.cache is None or self.cache.full:
            self.batch = live
            ids, self.cache = self._refill(left)
        else:
            if 2 * len(live) <= len(self.batch):  # not whenever a row ends: the whole cache is copied
                self.cache.keep([self.batch.index(row) for row in live])
                self.batch = live
            ids = [self.rows[row][-1:] for row in self.batch]
            self.cache.advance(1)
        y = self.model.hidden(torch.tensor(ids, device=self.head.device), dtype=self.dtype, cache=self.cache)
        return linear(y[:, -1], self.head)

    def _refill(self, left: int) -> tuple[list[list[int]], KVCache]:
        """The windows of the batch, padded to one length, and an empty cache for them; full ones are halved."""
        config = self.model.config
        for row in self.batch:
            if len(self.rows[row]) - self.begin[row] > config.context_length:
                self.begin[row] = len(self.rows[row]) - max(config.context_length // 2, 1)
        windows = [self.rows[row][self.begin[row] :] for row in self.batch]
        lengths = [len(window) for window in windows]
        capacity = min(config.context_length, max(lengths) + left - 1)
        cache = KVCache(config, lengths, capacity, self.dtype, self.head.device)
        return [[0] * (max(lengths) - len(window)) + window for window in windows], cache


class _Sampler:
    """How the next token of a row is chosen: `generate`'s settings, checked, and a stream of draws for each row."""

    def __init__(
        self,
        rows: list[list[int]],
        temperature: float,
        top_k: int,
        top_p: float,
        repetition_penalty: float,
        seed: int | None,
    ) -> None:
        allowed = 0.0 <= temperature < math.inf
        _require(allowed, "temperature", temperature, "a number from 0 up (0: the likeliest)")
        _require(top_k >= 0, "top_k", top_k, "a whole number from 0 up (0: no limit)")
        _require(0.0 < top_p <= 1.0, "top_p", top_p, "a number above 0, up to 1 (1: no limit)")
        allowed = 0.0 < repetition_penalty < math.inf
        _require(allowed, "repetition_penalty", repetition_penalty, "a number above 0")
        self.rows, self.temperature, self.top_k, self.top_p = rows, temperature, top_k, top_p
        self.repetition_penalty = repetition_penalty
        seed = secrets.randbits(64) if seed is None else seed
        self.draws = [random.Random(f"{seed} {row}") for row in range(len(rows))]

    def __call__(self, logits: Tensor, batch: list[int]) -> list[int]:
        """The next tokens of the rows `batch` from their logits, (B, V)."""
        logits = logits.double()
        if not logits.amax().isfinite():
            raise ValueError(
                "the model's outputs are not numbers: its training diverged, or its weights are damaged; use an "
                "earlier checkpoint"
            )
        if self.repetition_penalty != 1.0:
            seen = torch.zeros(logits.shape, dtype=torch.bool)
            for place, row in enumerate(batch):
                seen[place, self.rows[row]] = True
            logits = torch.where(seen.to(logits.device), penalised(logits, self.repetition_penalty), logits)
        if self.temperature == 0.0:
            return logits.argmax(-1).tolist()
        uniform = torch.tensor([self.draws[row].random() for row in batch], dtype=torch.float64)
        return choose(logits, uniform.to(logits.device), self.temperature, self.top_k, self.top_p).tolist()


def penalised(logits: Tensor, penalty: float) -> Tensor:
    """Positive logits divided by the penalty, negative ones multiplied (Keskar et al., 2019, section 4.1)."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Draw a token a row by inverting the cumulative distribution: one number decides, on any device.

    Args:
        logits: (B, V) float64.
        uniform: (B,) float64 in [0, 1).
        temperature: above 0.
        top_k, top_p: as in `generate`.

    Returns:
        (B,) int64.
    """
    order = None
    if top_k or top_p < 1.0:
        logits, order = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))  # (B, K), falling
    # the subtraction keeps any temperature from overflowing
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    p = torch.softmax(logits, -1)
    if top_p < 1.0:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)  # what comes after the threshold was reached
    cumulative = p.cumsum(-1)
    cumulative /= cumulative[:, -1:].clone()  # ends in exactly 1, so what has no probability is never reached
    token = torch.searchsorted(cumulative, uniform[:, None], right=True)  # (B, 1)
    return (token if order is None else order.gather(1, token))[:, 0]
