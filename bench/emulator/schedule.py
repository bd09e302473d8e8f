"""Which threads run next. A strand is a set of threads at one place in the code: it splits at branches and joins again.

In order "lockstep" all threads of the batch run as one strand while they agree; in "random" every warp is a strand of its own and a random one
runs a random number of blocks. (PTX ISA, 9.7.12 control flow; 9.7.13 barriers)
"""

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .ptx import Instruction
from .threads import EmulatorError, Mask, Unsupported

if TYPE_CHECKING:
    from .machine import Machine

Control = Callable[["Strand"], bool]
FAIRNESS = 16  # of so many turns the strand that is furthest in the code has one


@dataclass(eq=False)
class Strand:
    pc: int  # index of an instruction that starts a basic block
    mask: Mask
    count: int  # of threads
    owner: int  # the warp, or 0 in lockstep; only strands of one owner join
    waits: str = ""  # for "barrier", "mbarrier", "warp" (the rest of its warp) or "warpgroup"
    barrier: tuple[int, int] = (0, 0)  # its number and how many threads it takes, 0: all
    alone: bool = False  # goes on although a part of its warp is elsewhere


class Scheduler:
    def __init__(self, machine: "Machine"):
        self.machine, self.threads = machine, machine.threads
        self.picks = 0

    def run(self) -> None:
        threads = self.threads
        self.alive = np.ones(threads.n, bool)
        if self.machine.random_order:
            self.strands = []
            for warp in range(threads.warps):
                mask = np.zeros(threads.n, bool)
                mask[32 * warp : 32 * warp + 32] = True
                self.strands.append(Strand(0, mask, 32, warp))
        else:
            self.strands = [Strand(0, True, threads.n, 0)]
        while self.strands:
            self.advance(self.pick())

    def advance(self, strand: Strand) -> None:
        """Run a strand until it waits, splits or ends; where there are several, a few blocks."""
        blocks = self.machine.random.randrange(1, 40) if self.machine.random_order else 1
        while True:
            synchronous = self.machine.blocks[strand.pc].warp_synchronous
            if strand.mask is not True and synchronous and not strand.alone and not self.whole_warps(strand):
                strand.waits = "warp"
                return
            strand.alone = False
            if self.machine.step(strand):
                return
            blocks -= 1
            if blocks <= 0 and len(self.strands) > 1:
                return

    def pick(self) -> Strand:
        if len(self.strands) == 1 and not self.strands[0].waits:
            return self.strands[0]
        for strand in list(self.strands):
            if strand.waits == "mbarrier":
                self.machine.barriers.retry(strand)
        self.join()
        ready = [s for s in self.strands if not s.waits]
        if not ready:
            return self.part_of_a_warp()
        if self.machine.random_order:
            owner = self.machine.random.choice(sorted({s.owner for s in ready}))
            ready = [s for s in ready if s.owner == owner]
        # the last in the code has a turn too: it may hold the lock for which the first one spins
        self.picks += 1
        return (min if self.picks % FAIRNESS else max)(ready, key=lambda s: s.pc)

    def part_of_a_warp(self) -> Strand:
        """Nothing can run but parts of warps at a warp-synchronous instruction, which is an error of the kernel.

        Raises:
            EmulatorError: not even these: a deadlock.
        """
        for strand in self.strands:
            if strand.waits == "warp":
                what = "a warp-synchronous instruction is reached by a part of a warp"
                self.machine.report("divergence", self.machine.module.code[strand.pc], what)
                strand.waits, strand.alone = "", True
                return strand
        lines = []
        for strand in self.strands[:8]:
            first = self.threads.name(int(self.threads.chosen(strand.mask)[0]))
            line = self.machine.module.code[strand.pc].line
            lines.append(f"{strand.count} threads from {first} wait for a {strand.waits} at PTX line {line}")
        raise EmulatorError(f"{self.machine.module.name}: deadlock: {'; '.join(lines)}")

    def join(self) -> None:
        """Make one strand of those of an owner that stand at one place."""
        places = collections.defaultdict(list)
        for strand in self.strands:
            if strand.waits in ("", "warp"):
                places[strand.pc, strand.owner].append(strand)
        for first, *others in places.values():
            for other in others:
                first.mask = first.mask | other.mask
                first.count += other.count
                first.waits = ""
                self.strands.remove(other)
            if first.count == self.threads.n:
                first.mask = True

    def split(self, strand: Strand, mask: np.ndarray, pc: int) -> None:
        """Let the threads of `mask`, some or all of the strand's, go on at pc."""
        count = int(mask.sum())
        if count == strand.count:
            strand.pc, strand.waits = pc, ""
        elif count:
            self.strands.append(Strand(pc, mask, count, strand.owner))
            strand.mask = self.threads.everyone(strand.mask) & ~mask
            strand.count -= count

    def whole_warps(self, strand: Strand) -> bool:
        """True where of each warp all living threads are in the strand, or none."""
        here = strand.mask.reshape(-1, 32).sum(1)
        return bool(((here == 0) | (here == self.alive.reshape(-1, 32).sum(1))).all())

    # ---- instructions that part, stop or end threads; each returns True where the strand has to be scheduled anew

    def compile(self, ins: Instruction) -> Control:
        if ins.name == "bra":
            return self.branch(ins)
        if ins.name in ("ret", "exit"):
            return self.leave(ins)
        if ins.name in ("bar", "barrier"):
            return self.barrier(ins)
        if ins.name == "mbarrier":
            return self.machine.barriers.wait(ins)
        return self.warpgroup(ins)

    def branch(self, ins: Instruction) -> Control:
        target, following = self.machine.module.labels[ins.args[0]], ins.index + 1
        if ins.pred is None:

            def jump(strand: Strand) -> bool:
                strand.pc = target
                return False

            return jump
        predicate = self.machine.predicate(ins.pred)

        def branch(strand: Strand) -> bool:
            taken = predicate() if strand.mask is True else predicate() & strand.mask
            count = np.count_nonzero(taken)
            if count in (0, strand.count):
                strand.pc = target if count else following
                return False
            strand.pc = following
            self.split(strand, taken.copy(), target)
            return True

        return branch

    def leave(self, ins: Instruction) -> Control:
        predicate = self.machine.predicate(ins.pred) if ins.pred is not None else None

        def leave(strand: Strand) -> bool:
            mask = self.threads.everyone(strand.mask)
            going = mask if predicate is None else mask & predicate()
            self.alive &= ~going
            self.strands.remove(strand)
            rest = mask & ~going
            if rest.any():
                self.strands.append(Strand(ins.index + 1, rest, int(rest.sum()), strand.owner))
            self.release_barriers()
            return True

        return leave

    def barrier(self, ins: Instruction) -> Control:
        if ins.parts[1] not in ("sync", "cta") or {"red", "arrive"} & {*ins.parts} or ins.pred is not None:
            raise Unsupported(ins.text)
        source = self.machine.source
        number = source(ins.args[0], np.uint32) if ins.args else self.machine.constant(0, np.uint32)
        count = source(ins.args[1], np.uint32) if len(ins.args) > 1 else None

        def wait(strand: Strand) -> bool:
            if strand.mask is True and count is None:
                self.machine.barrier_passed(True)
                strand.pc = ins.index + 1
                return False
            t = int(self.threads.chosen(strand.mask)[0])
            strand.waits, strand.barrier = "barrier", (int(number[t]), 0 if count is None else int(count[t]))
            self.release_barriers()
            return True

        return wait

    def release_barriers(self) -> None:
        """Let the CTAs go on whose threads are all at one barrier."""
        waiting = collections.defaultdict(list)
        for strand in self.strands:
            if strand.waits == "barrier":
                waiting[strand.barrier].append((strand, self.threads.everyone(strand.mask)))
        for (_, count), strands in waiting.items():
            here = np.logical_or.reduce([mask for _, mask in strands]).reshape(self.threads.ctas, -1).sum(1)
            wanted = count or self.alive.reshape(self.threads.ctas, -1).sum(1)
            passed = (here > 0) & (here == wanted)
            if passed.any():
                self.machine.barrier_passed(np.flatnonzero(passed))
                for strand, mask in strands:
                    self.split(strand, mask & passed[self.threads.cta], strand.pc + 1)

    def warpgroup(self, ins: Instruction) -> Control:
        """wgmma.mma_async takes the four warps of a warpgroup together."""
        operation = self.machine.compile(ins)
        check = self.machine.multiplications.check

        def multiply(strand: Strand) -> bool:
            groups = self.threads.everyone(strand.mask).reshape(-1, 128)
            if strand.mask is True or (groups.all(1) | ~groups.any(1)).all():
                check(ins, strand.mask)
                operation(strand.mask)
                strand.pc = ins.index + 1
                return False
            strand.waits = "warpgroup"
            here = [s for s in self.strands if s.waits == "warpgroup" and s.pc == strand.pc]
            whole = np.logical_or.reduce([s.mask for s in here]).reshape(-1, 128).all(1)
            if whole.any():
                mask = np.repeat(whole, 128)
                check(ins, mask)
                operation(mask)
                for s in here:
                    self.split(s, s.mask & mask, ins.index + 1)
            return True

        return multiply
