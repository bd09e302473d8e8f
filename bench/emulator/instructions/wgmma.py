"""wgmma: matrix products of a warpgroup, asynchronous, with operands in shared memory. (PTX ISA, 9.7.15)

An accumulator, and A in registers, belong to the product until wgmma.wait_group; what a thread wrote to them before needs wgmma.fence.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Instruction, Module, Reg, Vec
from ..shared_memory import READING
from ..tensor_map import swizzled
from ..threads import SEVERAL, EmulatorError, Mask, Unsupported
from .arithmetic import HALVES
from .mma import TF32, fragment, halves, rows_of
from .table import F32, U32, U64, opcode

if TYPE_CHECKING:
    from ..machine import Machine, Operation

SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a matrix descriptor: bytes


@dataclass(eq=False)
class Multiplication:
    """One wgmma.mma_async of one warpgroup."""

    ins: Instruction
    threads: slice
    group: int
    n: int
    kind: str  # bf16, f16 or tf32
    accumulate: bool
    sign: int
    accumulator: Any  # registers, as indices of their rows
    left: Any  # the same of A in registers, or byte offsets (64, k)
    left_in_registers: bool
    right: np.ndarray  # byte offsets (n, k)
    words: np.ndarray  # of shared memory that it reads
    done: bool = False
    waiting: np.ndarray = field(
        default_factory=lambda: np.ones(128, bool)
    )  # threads that have not waited yet

    @property
    def targets(self) -> frozenset[Reg]:
        return frozenset(self.ins.args[0].items)

    @property
    def sources(self) -> frozenset[Reg]:
        return frozenset(self.ins.args[1].items) if self.left_in_registers else frozenset()


class Multiplications:
    def __init__(self, machine: "Machine"):
        self.machine = machine

    def start(self) -> None:
        self.pending: list[Multiplication] = []
        self.groups = np.zeros(self.machine.n, np.int64)  # committed by each thread

    def finish(self) -> None:
        if self.pending:
            self.machine.report("async", self.pending[0].ins, "nobody waits for this wgmma before the end")

    def unread(self) -> list[np.ndarray]:
        return [m.words for m in self.pending if not m.done]

    def commit(self, mask: Mask) -> None:
        self.groups += mask

    def issue(self, product: Multiplication) -> None:
        shared = self.machine.shared
        leaders = np.arange(product.threads.start, product.threads.stop, 32)
        shared.check_async_read(product.ins, product.words, leaders)
        shared.state[product.words] |= READING
        if not self.machine.late:
            self.compute(product)
        self.pending.append(product)

    def wait(self, mask: Mask, pending: int) -> None:
        left = []
        for product in self.pending:
            waits = slice(None) if mask is True else mask[product.threads]
            done = product.group < self.groups[product.threads][waits] - pending
            if done.size and done.all():
                self.execute(product)
                product.waiting[waits] = False
            if product.waiting.any():
                left.append(product)
        self.pending = left

    def check(self, ins: Instruction, mask: Mask) -> None:
        """Report an instruction that touches registers of a product in flight; accumulating on is allowed."""
        if ins.name == "wgmma" and not ins.multiplies:
            return
        reads, writes = ins.touched
        for product in list(self.pending):
            touched, overwritten = product.targets & (reads | writes), product.sources & writes
            if not touched and not overwritten:
                continue
            if ins.multiplies and not overwritten and frozenset(ins.args[0].items) == product.targets:
                continue
            waiting = product.waiting if mask is True else product.waiting & mask[product.threads]
            if waiting.any():
                what = "the accumulator" if touched else "the first operand"
                self.machine.report(
                    "wgmma",
                    ins,
                    f"touches {what} of the wgmma of PTX line {product.ins.line} before wgmma.wait_group",
                )
                self.execute(product)
                product.waiting[:] = False
        self.pending = [p for p in self.pending if p.waiting.any()]

    def execute(self, product: Multiplication) -> None:
        """Complete a product, those before it of its warpgroup first."""
        if product.done:
            return
        if self.machine.late:
            for other in self.pending:
                if other is product:
                    break
                if not other.done and other.threads == product.threads:
                    self.execute(other)
            self.compute(product)
        product.done = True
        self.machine.done_reading(product.words)
        base = int(self.machine.threads.base[product.threads.start])
        self.machine.shared.read[product.words] = base + SEVERAL

    def compute(self, product: Multiplication) -> None:
        words = self.machine.registers["w"]
        if product.left_in_registers:
            left = a_in_registers(words[product.left, product.threads], product.kind)
        else:
            left = self.matrix(product.left, product.kind)
        out = product.sign * (left @ self.matrix(product.right, product.kind).T)  # (64, n)
        blocks = out.reshape(
            4, 2, 8, product.n // 8, 4, 2
        )  # warp, half, row, block of 8 columns, pair, element
        out = np.ascontiguousarray(blocks.transpose(3, 1, 5, 0, 2, 4).reshape(product.n // 2, 128))
        at = product.accumulator, product.threads
        words[at] = (out + words[at].view(F32) if product.accumulate else out).view(U32)

    def matrix(self, flat: np.ndarray, kind: str) -> np.ndarray:
        """The elements at these byte offsets of shared memory, as float32."""
        if kind == "tf32":
            return (self.machine.shared.words32[flat >> 2] & TF32).view(F32)
        return HALVES[kind][0](self.machine.shared.view(2, 1)[flat >> 1])


def a_in_registers(registers: np.ndarray, kind: str) -> np.ndarray:
    """(registers, 128) of a warpgroup to A, (64, k)."""
    lane = np.arange(32)
    if kind == "tf32":
        out = np.empty((4, 16, 8), F32)
        for i, row in enumerate((registers & TF32).view(F32)):
            out[:, lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)] = row.reshape(4, 32)
        return out.reshape(64, 8)
    rows, columns = fragment(16)
    out = np.empty((4, 16, 16), F32)
    out[:, rows, columns] = halves(registers, kind).reshape(8, 4, 32).transpose(1, 0, 2)
    return out.reshape(64, 16)


@cache
def operand_pattern(
    rows: int, swizzle: int, leading: int, stride: int, transposed: bool, element: int
) -> np.ndarray:
    """Byte offsets, before the swizzle, of (rows along M or N, 32 bytes along K) in shared memory. (PTX ISA, 9.7.15.5.1)

    leading and stride: the descriptor's byte offsets. transposed: M or N is contiguous, not K.
    """
    unit = 16 // element
    r, k = np.arange(rows)[:, None], np.arange(2 * unit)[None, :]
    if not transposed:
        if swizzle == 0:
            return r % 8 * 16 + r // 8 * stride + k % unit * element + k // unit * leading
        return r % 8 * swizzle + r // 8 * stride + k * element
    if swizzle == 0:
        return r % 8 * 2 + r // 8 * stride + k % 8 * 16 + k // 8 * leading
    span = swizzle // element  # elements in one row of a swizzle atom
    return r % span * 2 + r // span * leading + k % 8 * swizzle + k // 8 * stride


def operand_at(
    machine: "Machine", rows: np.ndarray, offset: int, pattern: tuple[int, bool, int]
) -> np.ndarray:
    """The byte offsets that a matrix descriptor, the same in all threads of a warpgroup, stands for."""
    if (rows != rows[0]).any():
        raise EmulatorError("the threads of a warpgroup have different matrix descriptors")
    value = int(rows[0])
    start, leading, stride = ((value >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = SWIZZLES[value >> 62]
    if value >> 49 & 7:
        raise EmulatorError("the emulator does not know a matrix descriptor with a base offset")
    count, transposed, element = pattern
    flat = swizzled(
        start + offset + operand_pattern(count, swizzle, leading, stride, transposed, element), swizzle
    )
    low, high, stride_of_cta = int(flat.min()), int(flat.max()), machine.shared.stride
    if low < 0 or high >= len(machine.shared.bytes) or low // stride_of_cta != high // stride_of_cta:
        raise EmulatorError(
            f"memcheck: a matrix operand takes shared bytes {low} to {high} of {stride_of_cta} (descriptor {value:#x})"
        )
    return flat


@opcode("wgmma")
def wgmma(machine: "Machine", ins: Instruction) -> "Operation":
    products, what = machine.multiplications, ins.parts[1]
    if what == "fence":
        return lambda mask: None  # `missing_fences` looks for it in the code
    if what == "commit_group":
        return products.commit
    if what == "wait_group":
        pending = int(ins.args[0].text)
        return lambda mask: products.wait(mask, pending)
    shape = re.search(r"m64n(\d+)k(\d+)", ins.op)
    kind, element = ins.type, 4 if ins.type == "tf32" else 2
    if shape is None or kind not in ("bf16", "f16", "tf32") or "f32" not in ins.parts:
        raise Unsupported(ins.op)
    n = int(shape[1])
    in_registers = isinstance(ins.args[1], Vec)
    accumulator = rows_of(ins.args[0])
    left = rows_of(ins.args[1]) if in_registers else machine.source(ins.args[1], U64)
    right = machine.source(ins.args[2], U64)
    scale = machine.predicate(ins.args[3])
    numbers = [int(x.text) for x in ins.args[4:]] + [0, 0]
    sign = numbers[0] * numbers[1]
    transposed_left, transposed_right = (0, numbers[2]) if in_registers else numbers[2:4]

    def issue(mask: Mask) -> None:
        whole = machine.threads.everyone(mask).reshape(-1, 128).all(1)
        for start in (np.flatnonzero(whole) * 128).tolist():
            threads = slice(start, start + 128)
            offset = int(machine.shared.offset[start])
            a = left
            if not in_registers:
                a = operand_at(machine, left[threads], offset, (64, bool(transposed_left), element))
            b = operand_at(machine, right[threads], offset, (n, bool(transposed_right), element))
            reads = [b] if in_registers else [a, b]
            words = np.concatenate([x.ravel() >> 2 for x in reads])
            group, accumulates = int(products.groups[start]), bool(scale()[start])
            products.issue(
                Multiplication(
                    ins, threads, group, n, kind, accumulates, sign, accumulator, a, in_registers, b, words
                )
            )

    return issue


def missing_fences(module: Module) -> dict[int, str]:
    """What is wrong before each wgmma, by its index: a register of it is written and no wgmma.fence follows. (PTX ISA, 9.7.15.7.1)

    Read from the code, straight back from each wgmma: the machine computes the same with and without a fence.
    """
    joins, found = set(module.labels.values()), {}
    for ins in module.code:
        if not ins.multiplies:
            continue
        involved = frozenset().union(*ins.touched)
        found[ins.index] = "no wgmma.fence before this wgmma"
        for before in reversed(module.code[: ins.index]):
            if before.op.startswith("wgmma.fence"):
                del found[ins.index]
                break
            written = before.touched[1] & involved
            if before.name != "wgmma" and any(r.file == "w" for r in written):
                found[ins.index] = (
                    f"line {before.line} writes a register of this wgmma and no wgmma.fence follows"
                )
                break
            if before.index in joins and before.name == "bra" and "@" not in before.args[0]:
                break
    return found
