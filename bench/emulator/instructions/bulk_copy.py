"""Bulk copies of boxes of tensors: loads that complete on an mbarrier, stores and reductions in groups. (PTX ISA, 9.7.9.27)"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..ptx import Instruction, Mem
from ..shared_memory import BASE, READING, WRITING
from ..tensor_map import TensorMap, swizzled
from ..threads import SEVERAL, EmulatorError, Mask, Unsupported
from .loads import addresses
from .table import F32, I32, U32

if TYPE_CHECKING:
    from ..machine import Machine, Operation

ALIGNMENT = 128  # of a box in shared memory
NAN = {2: 0x7FFF, 4: 0x7FFFFFFF}  # what fills a box outside its tensor, by bytes of an element


@dataclass(eq=False)
class Load:
    ins: Instruction
    map: TensorMap
    coordinates: list[int]
    words: np.ndarray  # of the batch's shared memory, in the order of the box
    number: int
    cta: int

    def land(self, machine: "Machine") -> None:
        data = np.zeros(self.map.box[::-1], f"u{self.map.element}")
        if self.map.nan:
            data[:] = NAN[self.map.element]
        found = self.map.window(self.coordinates)
        if found is not None:
            window, place = found
            data[place] = window
        machine.shared.words32[self.words] = data.reshape(-1).view(U32)
        machine.shared.land(self.number, self.cta, self.words)


@dataclass(eq=False)
class Store:
    ins: Instruction
    map: TensorMap
    coordinates: list[int]
    words: np.ndarray
    thread: int
    group: int
    reduction: str | None
    data: np.ndarray | None = None  # what was read of shared memory
    read: bool = False  # shared memory may be written again
    written: bool = False

    def write(self) -> None:
        if self.written or self.data is None:
            return
        self.written = True
        found = self.map.window(self.coordinates)
        if found is None:
            return
        window, place = found
        data = self.data.view(f"u{self.map.element}").reshape(self.map.box[::-1])[place]
        if self.reduction is None:
            window[...] = data
        else:
            before, more = (np.ascontiguousarray(x).view(F32) for x in (window, data))
            window[...] = (before + more).view(U32)


class BulkCopies:
    def __init__(self, machine: "Machine"):
        self.machine = machine

    def start(self) -> None:
        self.stores: list[Store] = []
        self.groups = np.zeros(self.machine.n, np.int64)  # committed by each thread

    def finish(self) -> None:
        for store in self.stores:
            if not store.read:
                what = "the CTA ends before this bulk store has read shared memory: no wait_group"
                self.machine.report("async", store.ins, what)
            self.read(store)
            store.write()

    def unread(self) -> list[np.ndarray]:
        return [store.words for store in self.stores if not store.read]

    def commit(self, mask: Mask) -> None:
        self.groups += mask

    def wait(self, mask: Mask, pending: int, read_only: bool) -> None:
        left = []
        for store in self.stores:
            waits = mask is True or mask[store.thread]
            if waits and store.group < self.groups[store.thread] - pending:
                self.read(store)
                if not read_only:
                    store.write()
                    continue
            left.append(store)
        self.stores = left

    def read(self, store: Store) -> None:
        if store.read:
            return
        store.read = True
        shared, threads = self.machine.shared, self.machine.threads
        if store.data is None:
            store.data = shared.words32[store.words]
        self.machine.done_reading(store.words)
        stamp, base = int(threads.stamp[store.thread]), int(threads.base[store.thread])
        before = shared.read[store.words]
        shared.read[store.words] = np.where((before >= base) & (before != stamp), base + SEVERAL, stamp)


def build_bulk(machine: "Machine", ins: Instruction) -> "Operation":
    parts, bulk = ins.parts, machine.bulk
    if "commit_group" in parts:
        return bulk.commit
    if "wait_group" in parts:
        pending, read_only = int(ins.args[0].text, 0), "read" in parts
        return lambda mask: bulk.wait(mask, pending, read_only)
    if "tensor" not in parts:
        raise Unsupported(ins.op)
    reduction = next((p for p in parts if p in ("add", "min", "max", "inc", "dec", "and", "or", "xor")), None)
    place = next(i for i, a in enumerate(ins.args) if isinstance(a, Mem) and a.coordinates)
    rank = int(next(p for p in parts if re.fullmatch(r"\dd", p))[0])
    if len(ins.args[place].coordinates) != rank:
        raise Unsupported(ins.op)
    return (
        build_load(machine, ins, place)
        if place == 1 and len(ins.args) > 2
        else build_store(machine, ins, place, reduction)
    )


def build_load(machine: "Machine", ins: Instruction, place: int) -> "Operation":
    target, source, bar = ins.args[0], ins.args[place], ins.args[2]
    to, of, at = (addresses(machine, a, a is not source) for a in (target, source, bar))
    coordinates = [machine.source(c, I32) for c in source.coordinates]

    def load(mask: Mask) -> None:
        for thread in machine.threads.chosen(mask).tolist():
            one = np.array([thread])
            tensor_map = tensor_map_at(machine, int(of(one)[0]))
            barrier = machine.barriers.find(int(machine.shared.flat(at(one), 8, one)[0]))
            words = box_words(machine, tensor_map, thread, int(to(one)[0]))
            machine.shared.check_async_write(ins, words, thread)
            machine.shared.state[words] |= WRITING
            where = [int(c[thread]) for c in coordinates]
            number, cta = machine.shared.number_load(), int(machine.threads.cta[thread])
            count_box(machine, "load", tensor_map, where)
            barrier.loads.append(Load(ins, tensor_map, where, words, number, cta))
            if not machine.late:
                machine.barriers.settle(barrier)

    return load


def build_store(machine: "Machine", ins: Instruction, place: int, reduction: str | None) -> "Operation":
    target, source = ins.args[place], ins.args[1 - place]
    to, of = addresses(machine, target, False), addresses(machine, source, True)
    coordinates = [machine.source(c, I32) for c in target.coordinates]
    shared, bulk = machine.shared, machine.bulk

    def store(mask: Mask) -> None:
        for thread in machine.threads.chosen(mask).tolist():
            one = np.array([thread])
            tensor_map = tensor_map_at(machine, int(to(one)[0]))
            if reduction is not None and (reduction, tensor_map.dtype) != ("add", "float32"):
                raise EmulatorError(f"the emulator does not know a bulk {reduction} of {tensor_map.dtype}")
            words = box_words(machine, tensor_map, thread, int(of(one)[0]))
            shared.check_async_read(ins, words, one)
            shared.state[words] |= READING
            where, group = [int(c[thread]) for c in coordinates], int(bulk.groups[thread])
            store = Store(ins, tensor_map, where, words, thread, group, reduction)
            count_box(machine, "store", tensor_map, where)
            if not machine.late:
                store.data = shared.words32[words]
                store.write()
            bulk.stores.append(store)

    return store


def count_box(machine: "Machine", kind: str, tensor_map: TensorMap, coordinates: list[int]) -> None:
    found = tensor_map.window(coordinates) if machine.counts is not None else None
    if machine.counts is not None and found is not None:
        machine.counts.box(kind, tensor_map.region, found[0])
        machine.counts.copied(tensor_map.bytes)


def tensor_map_at(machine: "Machine", address: int) -> TensorMap:
    from ..machine import PARAMETER_BASE

    found = machine.tensor_maps.get(address - PARAMETER_BASE)
    if found is None:
        raise EmulatorError(f"there is no tensor map at {address:#x}")
    return found


def box_words(machine: "Machine", tensor_map: TensorMap, thread: int, address: int) -> np.ndarray:
    """The words of the batch's shared memory that a box at this address takes, in the box's order."""
    if address % ALIGNMENT:
        raise EmulatorError(f"misaligned: a box at shared byte {address - BASE}, no multiple of {ALIGNMENT}")
    if address < BASE or address + tensor_map.bytes > BASE + machine.shared.size:
        raise EmulatorError(
            f"memcheck: a box of {tensor_map.bytes} bytes at shared byte {address - BASE} of {machine.shared.size}"
        )
    offsets = address + int(machine.shared.offset[thread]) + np.arange(0, tensor_map.bytes, 4)
    return swizzled(offsets, tensor_map.swizzle) >> 2
