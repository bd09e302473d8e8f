"""Training of byte-pair encoding: which pairs of symbols are joined, and in which order.

Training joins, again and again, the pair of neighbours that occurs most often in all words into a new symbol (Sennrich,
Haddow and Birch 2016, section 3.2). Of pairs that occur equally often the one with the smallest ids goes first, so the
same words always give the same merges. Three facts let numpy do most of the work without changing a merge:

- All places of a pair arise at once: at the start, or when the younger of its two symbols is made. Later its count only
  falls. So the last known count is an upper bound, and a pair is recounted only when that bound is the highest.
- Joining (a, b) into c lowers the counts of pairs (x, a) and (b, y) alone, and the new pairs (x, c) and (c, y) are at most
  as frequent as these. So the most frequent pairs can be joined in one go, up to the first that ends with the `a` or
  begins with the `b` of one before it.
- Most pairs are too rare to be joined ever. Only those above a limit are kept; when they are used up, all pairs are
  counted again and the limit falls.
"""

from collections.abc import Mapping
from heapq import heapify, heappop, heappush, heapreplace
from typing import NamedTuple

import numpy as np

# Between words, and where a merge took a symbol out. No merge has this id: a special token comes after all merges.
BORDER = 0xFFFF
KEPT = 8  # the limit is 1 / KEPT of the highest count; 2 to 1,000 make little difference in time

Candidate = tuple[int, int, np.ndarray]  # -count, a << 16 | b, places: sorted in the order of merging


def learn_merges(words: Mapping[bytes, int], count: int) -> list[tuple[int, int]]:
    """The first `count` merges for words that occur so often, fewer if nothing is left to join.

    Equal to recounting every pair after every merge. Takes about 65 bytes of memory for each byte of the words.
    """
    symbols = _Symbols(words)
    merges: list[tuple[int, int]] = []
    heap: list[Candidate] = []
    while len(merges) < count:
        if not heap:
            pairs = symbols.all_pairs()
            limit = int(pairs.counts.max(initial=KEPT)) // KEPT
            heap = pairs.frequent(limit)
            if not heap:
                break
            heapify(heap)
        if batch := _next_batch(heap, symbols, limit, count - len(merges)):
            made = symbols.join(list(batch.values()), 256 + len(merges))
            merges += batch
            for candidate in made.frequent(limit):
                heappush(heap, candidate)
    return merges


def _next_batch(
    heap: list[Candidate], symbols: "_Symbols", limit: int, size: int
) -> dict[tuple[int, int], np.ndarray]:
    """Take the next pairs that can be joined in one go off the heap, at most `size`, with their places."""
    batch: dict[tuple[int, int], np.ndarray] = {}
    firsts: set[int] = set()
    seconds: set[int] = set()
    while heap and len(batch) < size:
        bound, pair, places = heap[0]
        a, b = divmod(pair, 1 << 16)
        if a in seconds or b in firsts:
            break
        places, n = symbols.occurrences(a, b, places)
        if n < limit:
            heappop(heap)
        elif n < -bound:
            heapreplace(heap, (-n, pair, places))
        else:
            heappop(heap)
            batch[a, b] = places
            firsts.add(a)
            seconds.add(b)
            if a == b:  # of its new pairs, (c, c) comes from (a, a) itself
                break
    return batch


class _Pairs(NamedTuple):
    """Pairs a << 16 | b and how often they occur; the places of pair i begin at places[starts[i]]."""

    pairs: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    places: np.ndarray

    def frequent(self, limit: int) -> list[Candidate]:
        chosen = np.flatnonzero(self.counts >= limit)
        ends = np.append(self.starts[1:], len(self.places))
        columns = [column[chosen].tolist() for column in (-self.counts, self.pairs, self.starts, ends)]
        return [(n, pair, self.places[start:end]) for n, pair, start, end in zip(*columns, strict=True)]


class _Symbols:
    """The symbols of all words in one linked list, and how often the word at each place occurs."""

    def __init__(self, words: Mapping[bytes, int]) -> None:
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        borders = np.concatenate(([0], np.cumsum(lengths + 1)))
        inside = np.ones(borders[-1] + 1, dtype=bool)
        inside[borders] = False
        self.ids = np.full(len(inside), BORDER, dtype=np.uint16)
        self.ids[inside] = np.frombuffer(b"".join(words), dtype=np.uint8)
        self.weight = np.zeros(len(inside), dtype=np.int64)
        self.weight[inside] = np.repeat(np.fromiter(words.values(), np.int64, len(words)), lengths)

    def all_pairs(self) -> _Pairs:
        """Take out what merges left behind, and count all pairs."""
        kept = (self.ids != BORDER) | (self.weight == 0)  # only borders weigh nothing
        self.ids, self.weight = self.ids[kept], self.weight[kept]
        places = np.arange(len(self.ids), dtype=np.int32)
        self.left, self.right = places - 1, places + 1
        return self._pairs_at(places[:-1][(self.ids[:-1] != BORDER) & (self.ids[1:] != BORDER)])

    def _pairs_at(self, places: np.ndarray) -> _Pairs:
        a, b = self.ids[places], self.ids[self.right[places]]
        keys = a.astype(np.uint64) << 48 | b.astype(np.uint64) << 32 | places.astype(np.uint64)
        keys.sort()
        places, pairs = keys.astype(np.uint32).view(np.int32), (keys >> 32).view(np.int64)
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        return _Pairs(pairs[starts], np.add.reduceat(self.weight[places], starts), starts, places)

    def occurrences(self, a: int, b: int, places: np.ndarray) -> tuple[np.ndarray, int]:
        """Those of the places that still hold the pair, and how often it occurs."""
        places = places[(self.ids[places] == a) & (self.ids[self.right[places]] == b)]
        return places, int(self.weight[places].sum())

    def join(self, batch: list[np.ndarray], first: int) -> _Pairs:
        """Make the pairs at these places the symbols first, first + 1, ... Returns the pairs that arise."""
        ids = np.repeat(np.arange(first, first + len(batch), dtype=np.uint16), [len(part) for part in batch])
        places = np.concatenate(batch)
        begins = np.append(True, self.right[places[:-1]] != places[1:])
        if not begins.all():  # in a run of one symbol, the second place of each pair is no place of its own
            index = np.arange(len(places))
            chosen = (index - np.maximum.accumulate(index * begins)) % 2 == 0
            ids, places = ids[chosen], places[chosen]
        second = self.right[places]
        after = self.right[second]
        self.ids[places], self.ids[second] = ids, BORDER
        self.right[places], self.left[after] = after, places
        before = self.left[places]
        return self._pairs_at(
            np.concatenate((before[self.ids[before] < first], places[self.ids[after] != BORDER]))
        )
