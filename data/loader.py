"""Training batches: shuffled windows over token shards, in an order that is a pure function of the seed.

Windows. A shard of n tokens has (n - 1) // context_length windows an epoch. They start at an offset drawn for this epoch and
shard, are contiguous and wrap around the shard's end, so they do not overlap and their borders differ in every
epoch. One permutation mixes the windows of all shards.

Order. Windows are numbered through all epochs: number g is entry g % n of epoch g // n, n being the windows of an epoch.
Batch k of rank r out of w takes the numbers from (k w + r) B to (k w + r + 1) B, so the ranks together read what one rank
with a batch of w B reads, a batch may span epochs, nothing is dropped, and the position is one integer.

Documents. A model that generates documents shorter than its context should see them from their first token: with
`document_start`, a window moves back to the last such token (end-of-text) before it, if that is less than a window away.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .token_file import TokenFile, checksum
from .untrusted import InputError, printable
from .windows import Batch, Shard, Tiling, tokens_of

_BUFFERS = 4  # batches read ahead: enough to hide drawing the next epoch's order
_POLL = 0.5  # seconds between looks at the thread
PATIENCE = 300.0  # seconds without a batch until its thread is given up


class WindowOrder:
    """The tokens of window number g. Holds the order of one epoch at a time; not thread-safe."""

    def __init__(
        self,
        shards: Sequence[Shard],
        context_length: int,
        seed: int,
        part: str = "training",
        document_start: int | None = None,
    ) -> None:
        self.tiling = Tiling(shards, context_length, part)
        self.document_start = document_start
        self.context_length, self.seed = context_length, seed
        self.n_windows = self.tiling.n_windows
        self._epoch = -1

    def fill(self, first: int, out: np.ndarray) -> None:
        """Write windows first, first + 1, ... as out[0] = inputs, out[1] = targets; out is (2, B, context_length)."""
        tiling, length, starts = self.tiling, self.context_length, {}
        windows = np.empty((out.shape[1], length + 1), tiling.dtype)  # widened at once, not row by row
        for row in range(out.shape[1]):
            epoch, index = divmod(first + row, self.n_windows)
            if epoch != self._epoch:
                self._draw(epoch)
            shard, place = tiling.find(int(self._permutation[index]))
            count = len(tiling.tokens[shard])
            start = starts[shard] = (int(self._phases[shard]) + place * length) % count
            back = 0 if self.document_start is None else min(length - 1, start)
            span = tiling.read(shard, start - back, min(start + length + 1, count))
            if self.document_start is not None:
                (found,) = (span[: back + 1] == self.document_start).nonzero()
                at = int(found[-1]) if len(found) else back
                span = span[at : at + length + 1]
            if len(span) <= length:
                span = np.concatenate([span, tiling.read(shard, 0, length + 1 - len(span))])
            windows[row] = span
        out[0], out[1] = windows[:, :-1], windows[:, 1:]
        tiling.check(starts)

    def _draw(self, epoch: int) -> None:
        # RandomState's streams never change; a Generator's may change with numpy, and with them a resumed run
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, epoch])))
        self._phases = random.randint(0, self.context_length, size=len(self.tiling.tokens))
        self._permutation = random.permutation(self.n_windows)
        self._epoch = epoch


class TokenLoader:
    """An endless iterator of (inputs, targets): two int64 tensors (batch_size, context_length) on `device`.

    `shards` are shard files or token arrays; the order is that of the module's docstring. On a GPU a thread reads ahead into
    pinned memory and the copies run on their own stream; on a CPU batches are read on request. The content of `validation`
    is saved and compared with that of `shards`, so that losses before and after resuming can be compared.

    Raises:
        ValueError: no shard holds a window (`part` names the shards in it).
        InputError: a shard cannot be read; with its file and position, also where it changes while batches are taken.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        context_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        part: str = "training",
        document_start: int | None = None,
        validation: Sequence[Shard] = (),
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it takes at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of world_size {world_size}: ranks go from 0 to world_size - 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}: it takes 0 or more")
        self._order = WindowOrder(shards, context_length, seed, part, document_start)
        for tokens in self._order.tiling.tokens:
            if isinstance(tokens, TokenFile):
                tokens.content()  # known from now on: a file that is touched but the same goes on being read
        self._validation = checksum(map(tokens_of, validation))
        self._shape = (2, batch_size, context_length)
        self._offset, self._step = rank * batch_size, world_size * batch_size
        self.device = torch.device(device)
        self.position = 0
        self._ahead: _ReadAhead | None = None

    @property
    def n_windows(self) -> int:
        """Windows in an epoch, over all shards and ranks."""
        return self._order.n_windows

    @property
    def epoch(self) -> float:
        """Passes over the data so far: 1.5 is the middle of the second epoch."""
        return self.position / self.n_windows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.position + self._offset
        if self.device.type == "cuda":
            if self._ahead is None:
                buffers = [
                    torch.empty(self._shape, dtype=torch.int64, pin_memory=True) for _ in range(_BUFFERS)
                ]
                # an order of its own: should the thread hang, it disturbs nobody
                self._ahead = _ReadAhead(copy.copy(self._order).fill, first, self._step, buffers, self.device)
            batch = self._ahead.take()
        else:
            batch = torch.empty(self._shape, dtype=torch.int64)
            self._order.fill(first, batch.numpy())
            batch = batch.to(self.device)
        self.position += self._step
        return batch[0], batch[1]

    def state_dict(self) -> dict[str, Any]:
        """What resuming takes: the number of windows handed out (to all ranks; read-ahead does not count), and what the
        order depends on, with a sha256 over all tokens. Batch size and ranks may differ when it is loaded."""
        return {"position": self.position, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any], origin: str | Path = "the loader's state") -> None:
        """Continue at a saved position.

        Args:
            state: of `state_dict`.
            origin: the file that it comes from, for messages.

        Raises:
            InputError: seed, context length or data are not those of the state, all of which are named, or it is no state.
        """
        names = {
            "n_windows": "number of windows",
            "data": "training tokens",
            "validation": "validation tokens",
        }
        differences = [
            f"{names.get(key, key)} {_short(state.get(key))}, now {_short(value)}"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        remedy = "resume with the same data, seed and context length"
        if differences:
            raise InputError(origin, f"cannot continue in these data: {'; '.join(differences)}", remedy)
        position = state.get("position")
        if type(position) is not int or not 0 <= position < 1 << 62:
            raise InputError(origin, f"the position in the data is {_short(position)}", remedy)
        self.seek(position)

    def seek(self, position: int) -> None:
        """Continue at an earlier or later `position` of this loader."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        self.position = position

    @cached_property
    def _identity(self) -> dict[str, Any]:
        order = self._order
        return {
            "data": checksum(order.tiling.tokens),
            "validation": self._validation,
            "seed": order.seed,
            "context_length": order.context_length,
            "n_windows": order.n_windows,
            "document_start": -1 if order.document_start is None else order.document_start,
        }


def _short(value: object) -> str:
    return "missing" if value is None else printable(value, 12)


class _ReadAhead:
    """Batches filled by a thread, in order, into a ring of host buffers, and copied to the device when they are taken.

    The thread never calls CUDA, which would break a graph capture in the main thread. A buffer is reused when the copy out
    of it has finished.
    """

    def __init__(
        self,
        fill: Callable[[int, np.ndarray], None],
        first: int,
        step: int,
        buffers: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[torch.Tensor | BaseException] = queue.SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        self._device = device
        self._window, self._step = first, step  # of the next batch
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: list[tuple[torch.cuda.Event, torch.Tensor]] = []
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(fill, first, step, self._free, self._ready),
            daemon=True,
            name="token-loader",
        )
        self._thread.start()
        self._stop = weakref.finalize(self, self._free.put, None)  # the thread ends with its loader

    def take(self) -> torch.Tensor:
        """The next batch, on the device, safe to use on the current stream."""
        for copied, done in self._copied:
            copied.synchronize()  # issued one batch ago on a stream that waits for no computation: no wait in practice
            self._free.put(done)
        self._copied.clear()
        buffer = self._next()
        if isinstance(buffer, BaseException):
            self._ready.put(buffer)  # the thread has ended: raise the same error at every further call
            raise buffer
        self._window += self._step
        if self._stream is None:
            batch = buffer.clone()
            self._free.put(buffer)
            return batch
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            batch = buffer.to(self._device, non_blocking=True)
            self._copied.append((self._stream.record_event(), buffer))
        current.wait_stream(self._stream)
        # the memory belongs to the copy's stream: it must not be reused before `current` has read it
        batch.record_stream(current)
        return batch

    def _next(self) -> torch.Tensor | BaseException:
        """What the thread delivers; an error where it does not, because it is gone or waits for a disk."""
        end = time.monotonic() + PATIENCE
        while True:
            alive = self._thread.is_alive()  # before looking: what it delivered last must be found
            try:
                return self._ready.get(timeout=_POLL if alive else 0)
            except queue.Empty:
                pass
            if not alive:
                what = "the thread that reads it ahead has ended"
                return InputError(
                    f"training data, window {self._window:,}", what, "go on with: gpt train --resume RUN"
                )
            if time.monotonic() > end:
                what = f"no batch could be read for {PATIENCE:,.0f} s"
                return InputError(
                    f"training data, window {self._window:,}",
                    what,
                    "look at the disk that holds it, then resume",
                )

    def close(self) -> None:
        """End the thread; one that hangs is left alone after a while."""
        self._stop()
        self._thread.join(_POLL * 10)


def _read_ahead(
    fill: Callable[[int, np.ndarray], None],
    first: int,
    step: int,
    free: queue.SimpleQueue[torch.Tensor | None],
    ready: queue.SimpleQueue[torch.Tensor | BaseException],
) -> None:
    try:
        while (buffer := free.get()) is not None:
            fill(first, buffer.numpy())
            ready.put(buffer)
            first += step
    except BaseException as error:
        ready.put(error)
