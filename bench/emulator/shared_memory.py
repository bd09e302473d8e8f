"""Shared memory of a batch of CTAs: the bytes, and what is known of every four of them.

A word is unwritten, or being written or read by an asynchronous operation, or has arrived with a bulk copy whose mbarrier not every warp has
waited on, or was written by ordinary stores that the asynchronous proxy does not see yet. (PTX ISA, 5.1.7 state space .shared; 8.4 proxies;
9.7.9.25 asynchronous copies and their completion)
"""

from typing import Any

import numpy as np

from .global_memory import Report, grouped
from .ptx import Instruction
from .threads import SEVERAL, EmulatorError, Threads, who

BASE = 1024  # the address of the first byte: none of a null pointer's
UNWRITTEN, WRITING, READING, UNACQUIRED, GENERIC = 1, 2, 4, 8, 16
SIGNALLING = 0x7FB0BAD2  # a NaN, which unwritten memory holds


class SharedMemory:
    def __init__(self, size: int, threads: Threads, report: Report):
        """size: bytes of one CTA."""
        self.threads, self.report = threads, report
        self.size = max(size, 16)
        self.stride = -(-self.size // 1024) * 1024  # from CTA to CTA
        self.bytes = np.zeros(self.stride * threads.ctas, np.uint8)
        self.views: dict[tuple[int, int], np.ndarray] = {}
        self.offset = threads.cta * self.stride - BASE
        words = len(self.bytes) // 4
        self.state = np.zeros(words, np.uint8)
        self.written = np.zeros(words, np.int32)  # stamps of the last write and the last read
        self.read = np.zeros(words, np.int32)
        self.arrived_by = np.zeros(words, np.int32)  # which bulk load wrote the word

    def start(self) -> None:
        self.words32[:] = SIGNALLING
        self.state[:] = UNWRITTEN
        self.written[:] = self.read[:] = self.arrived_by[:] = 0
        self.loads = 0  # bulk loads so far, which numbers them
        self.acquired = np.zeros((64, self.threads.warps), bool)  # load, warp of the batch
        self.unacquired: dict[int, tuple[int, np.ndarray]] = {}  # load: (CTA, words)

    @property
    def words32(self) -> np.ndarray:
        return self.view(4, 1)

    def view(self, element: int, count: int) -> np.ndarray:
        if (element, count) not in self.views:
            self.views[element, count] = grouped(self.bytes, element, count)
        return self.views[element, count]

    def flat(self, address: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
        """Shared addresses to byte offsets of the batch's memory.

        Raises:
            EmulatorError: an address out of bounds, or not aligned to `width`.
        """
        low, high = int(address.min()), int(address.max())
        if low < BASE or high + width > BASE + self.size:
            i = np.flatnonzero((address < BASE) | (address.astype(np.int64) + width > BASE + self.size))[0]
            raise EmulatorError(
                f"memcheck: {self.threads.name(int(threads[i]))}: {width} bytes at shared byte {int(address[i]) - BASE} of {self.size}"
            )
        if width > 1 and int(np.bitwise_or.reduce(address)) & (width - 1):
            i = np.flatnonzero(address & np.uint32(width - 1))[0]
            raise EmulatorError(
                f"misaligned: {self.threads.name(int(threads[i]))}: {width} bytes at shared byte {int(address[i]) - BASE}"
            )
        return address.astype(np.int64) + self.offset[threads]

    def byte(self, word: Any) -> int:
        """A word's place in its CTA's memory."""
        return int(word) * 4 % self.stride

    # ordinary (generic) accesses

    def load(
        self, ins: Instruction, address: np.ndarray, element: int, count: int, threads: np.ndarray
    ) -> np.ndarray:
        width = element * count
        flat = self.flat(address, width, threads)
        self.check_read(ins, flat, width, threads)
        return self.view(element, count)[flat // width]

    def store(
        self,
        ins: Instruction,
        address: np.ndarray,
        element: int,
        count: int,
        threads: np.ndarray,
        values: np.ndarray,
    ) -> None:
        width = element * count
        flat = self.flat(address, width, threads)
        self.check_write(ins, flat, width, threads, np.ascontiguousarray(values) if width >= 4 else None)
        view, at = self.view(element, count), flat // width
        view[at] = values
        stored = view[at]
        if np.array_equal(stored, values):
            return
        differ = stored != values if count == 1 else (stored != values).any(1)
        same = at == at[int(np.flatnonzero(differ)[0])]
        kind = "lane conflict" if len(np.unique(self.threads.warp[threads[same]])) == 1 else "race"
        found = sorted({f"{int(v):#x}" for v in np.ravel(values[same])})
        self.report(
            kind, ins, f"threads store different values to one shared address at once: {', '.join(found[:3])}"
        )

    def words(self, flat: np.ndarray, width: int) -> np.ndarray:
        """The words of each access, one row each where an access has several."""
        word = flat >> 2
        return word if width <= 4 else word[:, None] + np.arange(width // 4)

    def _stamps(self, threads: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        stamp, base = self.threads.stamp[threads], self.threads.base[threads]
        return (stamp, base) if width <= 4 else (stamp[:, None], base[:, None])

    def check_read(self, ins: Instruction, flat: np.ndarray, width: int, threads: np.ndarray) -> None:
        words = self.words(flat, width)
        state = self.state[words]
        if np.bitwise_or.reduce(state, axis=None) & (UNWRITTEN | WRITING | UNACQUIRED):
            self.bad_read(ins, words, state, threads)
        stamp, base = self._stamps(threads, width)
        written = self.written[words]
        bad = (written != stamp) & (written >= base)
        if bad.any():
            self.race(ins, words, bad, threads, "reads", f"{who(int(written[bad][0]))} wrote")
        read = self.read[words]
        now = np.where((read >= base) & (read != stamp), base + SEVERAL, stamp)
        self.read[words] = now
        clash = self.read[words] != now
        if clash.any():
            self.read[words[clash]] = np.broadcast_to(base + SEVERAL, words.shape)[clash]

    def bad_read(self, ins: Instruction, words: np.ndarray, state: np.ndarray, threads: np.ndarray) -> None:
        for bit, kind, what in (
            (UNWRITTEN, "initcheck", "was never written"),
            (WRITING, "async", "an asynchronous copy that nobody waited for is writing"),
        ):
            hit = (state & bit) != 0
            if hit.any():
                self.report(
                    kind, ins, f"{self.first(words, hit, threads, 'reads shared byte')}, which {what}"
                )
        hit = (state & UNACQUIRED) != 0
        if hit.any():
            readers = threads[np.argwhere(hit)[:, 0]]
            seen = self.has_acquired(self.arrived_by[words[hit]], readers)
            if not seen.all():
                t = int(readers[np.flatnonzero(~seen)[0]])
                self.report(
                    "async",
                    ins,
                    f"{self.threads.name(t)} reads what a bulk copy wrote without having waited on its mbarrier",
                )

    def check_write(
        self,
        ins: Instruction,
        flat: np.ndarray,
        width: int,
        threads: np.ndarray,
        values: np.ndarray | None = None,
    ) -> None:
        """values: what is written, where a write of the value that is there already harms nobody."""
        words = self.words(flat, width)
        state = self.state[words]
        if np.bitwise_or.reduce(state, axis=None) & (WRITING | READING | UNACQUIRED):
            for bit, what in (
                (WRITING, "an asynchronous copy is writing"),
                (READING, "an asynchronous operation may still read"),
            ):
                hit = (state & bit) != 0
                if hit.any():
                    self.report(
                        "async", ins, f"{self.first(words, hit, threads, 'writes shared byte')}, which {what}"
                    )
            if ((state & UNACQUIRED) != 0).any():
                self.bad_read(ins, words, state & UNACQUIRED, threads)
        stamp, base = self._stamps(threads, width)
        read, written = self.read[words], self.written[words]
        bad = (read != stamp) & (read >= base)
        if bad.any():
            self.race(ins, words, bad, threads, "writes", f"{who(int(read[bad][0]))} read")
        elif width >= 4:
            bad = (written != stamp) & (written >= base)
            if bad.any() and values is not None:
                new = values.reshape(len(words), -1).view(np.uint32).reshape(words.shape)
                bad &= self.words32[words] != new
            if bad.any():
                self.race(ins, words, bad, threads, "writes", f"{who(int(written[bad][0]))} wrote")
        self.written[words] = stamp
        self.state[words] = GENERIC

    def first(self, words: np.ndarray, hit: np.ndarray, threads: np.ndarray, does: str) -> str:
        place = tuple(np.argwhere(hit)[0])
        return f"{self.threads.name(int(threads[place[0]]))} {does} {self.byte(words[place])}"

    def race(
        self, ins: Instruction, words: np.ndarray, bad: np.ndarray, threads: np.ndarray, does: str, did: str
    ) -> None:
        self.report(
            "race",
            ins,
            f"{self.first(words, bad, threads, f'{does} shared byte')}, which {did} since the last barrier",
        )

    # accesses by the asynchronous proxy

    def check_async_read(self, ins: Instruction, words: np.ndarray, threads: np.ndarray) -> None:
        """Of these words, on behalf of one thread of each warp that issued the operation."""
        state = self.state[words]

        def first(bit: int) -> int:
            return self.byte(words[np.flatnonzero(state & bit)[0]])

        if (state & UNWRITTEN).any():
            self.report("initcheck", ins, f"reads shared byte {first(UNWRITTEN)}, which was never written")
        if (state & WRITING).any():
            self.report("async", ins, "reads what an asynchronous copy that nobody waited for is writing")
        if (state & UNACQUIRED).any():
            loads = np.unique(self.arrived_by[words[(state & UNACQUIRED) != 0]])
            late = [t for t in threads if not self.has_acquired(loads, t).all()]
            if late:
                self.report(
                    "async",
                    ins,
                    f"{self.threads.name(late[0])} reads what a bulk copy wrote without having waited on its mbarrier",
                )
        if (state & GENERIC).any():
            self.report(
                "proxy",
                ins,
                f"the asynchronous proxy reads shared byte {first(GENERIC)}, which ordinary stores wrote; no fence.proxy.async between",
            )
        written, base = self.written[words], int(self.threads.base[threads[0]])
        bad = written >= base
        stamps = np.unique(self.threads.stamp[threads])
        if len(stamps) == 1:
            bad &= written != stamps[0]
        if bad.any():
            self.report(
                "race",
                ins,
                f"reads shared byte {self.byte(words[bad][0])}, which {who(int(written[bad][0]))} wrote since the last barrier",
            )

    def check_async_write(self, ins: Instruction, words: np.ndarray, thread: int) -> None:
        state = self.state[words]
        if (state & (WRITING | READING)).any():
            self.report(
                "async", ins, "a bulk load goes where an asynchronous operation still reads or writes"
            )
        if (state & UNACQUIRED).any():
            earlier = self.arrived_by[words[(state & UNACQUIRED) != 0]]
            if not self.has_acquired(earlier, thread).all():
                self.report(
                    "async", ins, "a bulk load goes where the data of an earlier one were not waited for"
                )
        if (state & GENERIC).any():
            self.report(
                "proxy",
                ins,
                "a bulk load goes where ordinary stores were made; no fence.proxy.async between",
            )
        base, stamp = int(self.threads.base[thread]), int(self.threads.stamp[thread])
        for did, stamps in (("read", self.read[words]), ("wrote", self.written[words])):
            bad = (stamps >= base) & (stamps != stamp)
            if bad.any():
                self.report(
                    "race",
                    ins,
                    f"a bulk load of {self.threads.name(thread)} goes to shared byte {self.byte(words[bad][0])}, which {who(int(stamps[bad][0]))} {did} since the last barrier",
                )

    def has_acquired(self, loads: np.ndarray, thread: Any) -> np.ndarray:
        warp = self.threads.cta[thread] * self.threads.warps_per_cta + self.threads.warp[thread]
        return self.acquired[loads, warp]

    def number_load(self) -> int:
        self.loads += 1
        if self.loads >= len(self.acquired):
            self.acquired = np.concatenate([self.acquired, np.zeros_like(self.acquired)])
        return self.loads

    def land(self, load: int, cta: int, words: np.ndarray) -> None:
        """A bulk load has written these words; no warp has waited for it yet."""
        self.state[words] = UNACQUIRED
        self.arrived_by[words] = load
        self.written[words] = 0
        self.unacquired[load] = (cta, words)

    def acquire(self, load: int, warps: np.ndarray) -> bool:
        """These warps of the batch have waited for a load. Returns True where every warp of its CTA has now."""
        self.acquired[load, warps] = True
        if load not in self.unacquired:
            return True
        cta, words = self.unacquired[load]
        per = self.threads.warps_per_cta
        if self.acquired[load, cta * per : (cta + 1) * per].all():
            del self.unacquired[load]
            mine = words[self.arrived_by[words] == load]
            self.state[mine] &= ~np.uint8(UNACQUIRED)
            return True
        return False

    def barrier_passed(self, ctas: Any) -> None:
        """What one warp has waited for, all of its CTA have behind a barrier."""
        per = self.threads.warps_per_cta
        for load, (cta, _) in list(self.unacquired.items()):
            warps = np.arange(cta * per, (cta + 1) * per)
            if (ctas is True or cta in ctas) and self.acquired[load, warps].any():
                self.acquire(load, warps)

    def fence_proxy(self, mask: Any) -> None:
        """fence.proxy.async: the asynchronous proxy sees what the fencing warps wrote, and what they see themselves."""
        if mask is True:
            self.state &= ~np.uint8(GENERIC)
            return
        for cta in range(self.threads.ctas):
            warps = np.unique(self.threads.warp[mask & (self.threads.cta == cta)])
            if len(warps):
                mine = slice(cta * self.stride // 4, (cta + 1) * self.stride // 4)
                stamp, base = self.written[mine], int(self.threads.interval[cta]) * 64
                self.state[mine][(stamp < base) | np.isin(stamp - base, warps)] &= ~np.uint8(GENERIC)
