"""cp.async: each thread copies 4 to 16 bytes from global to shared memory, and waits for groups of its copies. (PTX ISA, 9.7.9.25.3)"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..ptx import Instruction
from ..shared_memory import GENERIC, WRITING
from ..threads import Mask, Unsupported
from .bulk_copy import build_bulk
from .loads import addresses
from .table import U32, opcode

if TYPE_CHECKING:
    from ..machine import Machine, Operation


@dataclass
class Copy:
    """One instruction's copies that are in flight, an entry for each thread."""

    ins: Instruction
    threads: np.ndarray
    group: np.ndarray
    flat: np.ndarray  # where to, in bytes of the batch's shared memory
    source: np.ndarray  # addresses
    real: np.ndarray  # False: zeros are written instead
    width: int

    def part(self, which: np.ndarray) -> "Copy":
        arrays = (self.threads, self.group, self.flat, self.source, self.real)
        threads, group, flat, source, real = (array[which] for array in arrays)
        return Copy(self.ins, threads, group, flat, source, real, self.width)


class AsyncCopies:
    def __init__(self, machine: "Machine"):
        self.machine = machine

    def start(self) -> None:
        self.in_flight: list[Copy] = []
        self.groups = np.zeros(self.machine.n, np.int64)  # committed by each thread

    def finish(self) -> None:
        if self.in_flight:
            self.machine.report(
                "async", self.in_flight[0].ins, "nobody waits for this cp.async before the end"
            )

    def commit(self, mask: Mask) -> None:
        self.groups += mask  # True counts as one

    def issue(self, copy: Copy) -> None:
        shared, counts = self.machine.shared, self.machine.counts
        if counts is not None:
            real = copy.real
            counts.access(self.machine, "load", copy.source[real], copy.width, copy.threads[real])
            counts.shared(copy.flat, copy.width, copy.threads)
        shared.check_write(copy.ins, copy.flat, copy.width, copy.threads)
        shared.state[shared.words(copy.flat, copy.width)] = WRITING
        if self.machine.late:
            self.read(copy)  # only to check the addresses, at the instruction that has them
        else:
            self.write(copy)
        self.in_flight.append(copy)

    def read(self, copy: Copy) -> np.ndarray:
        data = np.zeros((len(copy.flat), copy.width // 4), U32)
        if copy.real.any():
            memory, threads = self.machine.memory, copy.threads[copy.real]
            values = memory.load(copy.ins, copy.source[copy.real], 4, copy.width // 4, threads)
            data[copy.real] = values.reshape(len(threads), -1)
        return data

    def write(self, copy: Copy) -> None:
        data = self.read(copy)
        view = self.machine.shared.view(4, copy.width // 4)
        view[copy.flat // copy.width] = data if copy.width > 4 else data[:, 0]

    def wait(self, mask: Mask, pending: int | None) -> None:
        """Land all but the last `pending` groups of these threads; None: every copy, committed or not."""
        if self.machine.counts is not None:
            in_flight = sum(copy.width * int(copy.real.sum()) for copy in self.in_flight)
            self.machine.counts.wait(self.machine.threads, in_flight)
        left = []
        for copy in self.in_flight:
            done = np.ones(len(copy.threads), bool)
            if pending is not None:
                done = copy.group < self.groups[copy.threads] - pending
            if mask is not True:
                done = done & mask[copy.threads]
            if done.any():
                self.land(copy.part(done))
            if not done.all():
                left.append(copy.part(~done))
        self.in_flight = left

    def land(self, copy: Copy) -> None:
        if self.machine.late:
            self.write(copy)
        shared, stamp = self.machine.shared, self.machine.threads.stamp[copy.threads]
        words = shared.words(copy.flat, copy.width)
        shared.state[words] = GENERIC
        shared.written[words] = stamp[:, None] if copy.width > 4 else stamp


@opcode("cp")
def copy(machine: "Machine", ins: Instruction) -> "Operation":
    if "bulk" in ins.parts:
        return build_bulk(machine, ins)
    copies, what = machine.copies, ins.parts[2]
    if what == "commit_group":
        return copies.commit
    if what == "wait_all":
        return lambda mask: copies.wait(mask, None)
    if what == "wait_group":
        pending = int(ins.args[0].text, 0)
        return lambda mask: copies.wait(mask, pending)
    if what not in ("ca", "cg"):
        raise Unsupported(ins.op)
    to, of = addresses(machine, ins.args[0], True), addresses(machine, ins.args[1], False)
    width = int(ins.args[2].text, 0)
    size = machine.source(ins.args[3], U32) if len(ins.args) > 3 else machine.constant(width, U32)

    def issue(mask: Mask) -> None:
        threads = machine.threads.chosen(mask)
        n = size[threads]
        if ((n != 0) & (n != width)).any():
            raise Unsupported("a cp.async of a part of its bytes")
        flat = machine.shared.flat(to(threads), width, threads)
        group = copies.groups[threads]
        copies.issue(Copy(ins, threads, group, flat, of(threads), n != 0, width))

    return issue
