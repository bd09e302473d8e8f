"""mbarrier objects in shared memory: arrivals, bytes that bulk loads bring, phases. (PTX ISA, 9.7.13.15)"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Instruction, Mem
from ..shared_memory import UNWRITTEN
from ..threads import SEVERAL, EmulatorError, Mask, Unsupported
from .loads import addresses
from .table import U32, opcode, put

if TYPE_CHECKING:
    from ..machine import Machine, Operation
    from ..schedule import Control, Strand


@dataclass
class Barrier:
    expected: int  # arrivals of a phase
    pending: int  # of them, in this phase
    bytes: int = 0  # still to come in this phase
    phase: int = 0
    loads: list[Any] = field(default_factory=list)  # issued, not landed
    landed: list[Any] = field(default_factory=list)  # not yet waited for by every warp

    def finish_phase(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected


class Barriers:
    """Those of a batch, by their place in its shared memory."""

    def __init__(self, machine: "Machine"):
        self.machine = machine
        self.attempts: dict[
            int, tuple[Any, np.ndarray]
        ] = {}  # of each waiting instruction: (function, its target)

    def start(self) -> None:
        self.at: dict[int, Barrier] = {}

    def finish(self) -> None:
        for barrier in self.at.values():
            if barrier.loads:
                ins = barrier.loads[0].ins
                self.machine.report("async", ins, "nobody waits for this bulk load before the end")

    def find(self, place: int) -> Barrier:
        if place not in self.at:
            raise EmulatorError("there is no mbarrier at this address")
        return self.at[place]

    def each(self, address: Any, mask: Mask) -> Iterator[tuple[int, int]]:
        """Each thread, and the place that it addresses."""
        threads = self.machine.threads.chosen(mask)
        if len(threads):
            flat = self.machine.shared.flat(address(threads), 8, threads)
            yield from zip(threads.tolist(), flat.tolist(), strict=True)

    def settle(self, barrier: Barrier) -> None:
        """Land every load that was issued, and end the phase where nothing is missing."""
        for load in barrier.loads:
            load.land(self.machine)
            barrier.bytes -= load.map.bytes
            barrier.landed.append(load)
        barrier.loads = []
        barrier.finish_phase()

    def changed(self, barrier: Barrier) -> None:
        """An arrival, or bytes announced."""
        if not self.machine.late:
            self.settle(barrier)
        elif not barrier.loads:
            barrier.finish_phase()

    def is_complete(self, barrier: Barrier, parity: int) -> bool:
        """True where the phase of this parity has ended; loads in flight land where that ends it."""
        arrived = barrier.phase & 1 == parity and barrier.pending == 0 and barrier.loads
        if arrived and sum(load.map.bytes for load in barrier.loads) == barrier.bytes:
            self.settle(barrier)
        return barrier.phase & 1 != parity

    def wait(self, ins: Instruction) -> "Control":
        if "parity" not in ins.parts or ins.pred is not None:
            raise Unsupported(ins.op)
        machine = self.machine
        address, parity = addresses(machine, ins.args[1], True), machine.source(ins.args[2], U32)

        def attempt(mask: Mask) -> np.ndarray:
            """Which threads find their phase complete."""
            threads = machine.threads.chosen(mask)
            flat = machine.shared.flat(address(threads), 8, threads)
            done = np.zeros(machine.n, bool)
            pairs = flat * 2 + parity[threads]
            for pair in np.unique(pairs):
                place, mine = int(pair) // 2, threads[pairs == pair]
                barrier = self.find(place)
                self.check_use(ins, place, mine)
                if self.is_complete(barrier, int(pair) % 2):
                    done[mine] = True
                    self.acquire(barrier, mine)
            return done

        target = machine.target(ins.args[0], np.bool_)
        self.attempts[ins.index] = attempt, target

        def wait(strand: "Strand") -> bool:
            strand.waits = "mbarrier"
            if machine.counts is not None:
                loads = (load for barrier in self.at.values() for load in barrier.loads)
                machine.counts.wait(machine.threads, sum(load.map.bytes for load in loads))
            self.retry(strand)
            return bool(strand.waits)

        return wait

    def retry(self, strand: "Strand") -> None:
        """Let those threads of a waiting strand go on whose phase is complete."""
        attempt, target = self.attempts[strand.pc]
        done = attempt(strand.mask)
        put(target, True, done)
        self.machine.scheduler.split(strand, done, strand.pc + 1)

    def acquire(self, barrier: Barrier, threads: np.ndarray) -> None:
        """The warps of these threads see what the barrier's loads brought."""
        everyone = self.machine.threads
        warps = np.unique(everyone.cta[threads] * everyone.warps_per_cta + everyone.warp[threads])
        acquire = self.machine.shared.acquire
        barrier.landed = [load for load in barrier.landed if not acquire(load.number, warps)]

    def check_use(self, ins: Instruction, place: int, threads: np.ndarray) -> None:
        """Of a barrier by threads of one CTA: a barrier has to part it from its initialisation."""
        shared, everyone, word = self.machine.shared, self.machine.threads, place >> 2
        stamps, base = np.unique(everyone.stamp[threads]), int(everyone.base[threads[0]])
        if shared.written[word] >= base and (stamps != shared.written[word]).any():
            self.machine.report(
                "race", ins, "an mbarrier is used by a warp that no barrier parts from its initialisation"
            )
        before = int(shared.read[word])
        one_warp = len(stamps) == 1 and (before < base or before == int(stamps[0]))
        shared.read[word] = int(stamps[0]) if one_warp else base + SEVERAL

    def initialise(self, ins: Instruction, thread: int, place: int, count: int) -> None:
        if place in self.at:
            self.machine.report("mbarrier", ins, "initialised twice without mbarrier.inval")
        self.machine.shared.check_write(ins, np.array([place]), 8, np.array([thread]))
        self.machine.shared.state[[place >> 2, (place >> 2) + 1]] = 0
        self.at[place] = Barrier(count, count)

    def invalidate(self, ins: Instruction, thread: int, place: int) -> None:
        barrier, shared = self.find(place), self.machine.shared
        if barrier.loads or barrier.bytes:
            self.machine.report("mbarrier", ins, "invalidated while loads are in flight")
        del self.at[place]
        used, threads = int(shared.read[place >> 2]), self.machine.threads
        if used >= threads.base[thread] and used != threads.stamp[thread]:
            self.machine.report(
                "race", ins, "invalidated while other warps may wait on it: no barrier between"
            )
        words = [place >> 2, (place >> 2) + 1]
        shared.state[words] = UNWRITTEN
        shared.written[words] = threads.stamp[thread]


@opcode("mbarrier")
def mbarrier(machine: "Machine", ins: Instruction) -> "Operation":
    barriers, what = machine.barriers, ins.parts[1]
    place = next((i for i, a in enumerate(ins.args) if isinstance(a, Mem)), None)
    if place is None or what not in ("init", "inval", "arrive", "expect_tx"):
        raise Unsupported(ins.op)
    address = addresses(machine, ins.args[place], True)
    value = machine.source(ins.args[place + 1], U32) if len(ins.args) > place + 1 else None
    expects = "expect_tx" in ins.parts

    def init(mask: Mask) -> None:
        assert value is not None
        for thread, at in barriers.each(address, mask):
            barriers.initialise(ins, thread, at, int(value[thread]))

    def inval(mask: Mask) -> None:
        for thread, at in barriers.each(address, mask):
            barriers.invalidate(ins, thread, at)

    def arrive(mask: Mask) -> None:
        for thread, at in barriers.each(address, mask):
            barrier = barriers.find(at)
            barriers.check_use(ins, at, np.array([thread]))
            if expects and value is not None:
                barrier.bytes += int(value[thread])
            if what == "arrive":
                count = 1 if expects or value is None else int(value[thread])
                if barrier.pending < count:
                    machine.report("mbarrier", ins, "more arrivals than the phase takes")
                barrier.pending -= count
            barriers.changed(barrier)

    return {"init": init, "inval": inval}.get(what, arrive)
