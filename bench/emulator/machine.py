"""A batch of CTAs that run one PTX module on a CPU, all threads of an instruction at once.

A register is a numpy row with an entry for each thread of the batch. Every instruction becomes a function of a mask of threads when the machine is
built; the scheduler runs basic blocks of them. `timing` is when asynchronous operations take place: "early", as soon as they are issued, or
"late", when something waits for them. Code that synchronises as it has to gives the same bits either way.
"""

import itertools
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .counting import LaunchCounts
from .global_memory import GlobalMemory
from .instructions import build
from .instructions.async_copy import AsyncCopies
from .instructions.bulk_copy import BulkCopies
from .instructions.mbarrier import Barriers
from .instructions.wgmma import Multiplications, missing_fences
from .ptx import Imm, Instruction, Module, Not, Reg, Sym
from .schedule import Scheduler, Strand
from .shared_memory import BASE as SHARED_BASE
from .shared_memory import READING, SharedMemory
from .tensor_map import TensorMap
from .threads import EmulatorError, Mask, Threads, Unsupported

PARAMETER_BASE = 1 << 28
# What a register holds before it is written: a NaN where it is taken for a float.
GARBAGE = {"h": 0x7FB1, "w": 0x7FB0BAD1, "d": 0x7FF0BADBADBADBAD}

Operation = Callable[[Mask], None]


class Block(NamedTuple):
    """A basic block."""

    steps: list[tuple[Instruction, Operation]]
    control: Instruction | None  # its last; None: it falls into the next block
    following: int
    warp_synchronous: bool  # has an instruction that all threads of a warp execute together


@dataclass
class Finding:
    place: str  # its kind, the kernel, the line
    detail: str  # of the first time
    count: int = 0


class Machine:
    def __init__(
        self, module: Module, per_cta: int, ctas: int, shared_bytes: int, timing: str, random_order: bool
    ):
        """shared_bytes: of a CTA, static arrays included."""
        self.module, self.late, self.random_order = module, timing == "late", random_order
        self.threads = threads = Threads(per_cta, ctas)
        self.n = n = threads.n
        widths = {"p": np.bool_, "h": np.uint16, "w": np.uint32, "d": np.uint64}
        self.registers: dict[str, np.ndarray] = {
            f: np.zeros((module.registers[f] + 1, n), t) for f, t in widths.items()
        }
        self.special = {
            "%tid.x": threads.in_cta.astype(np.uint32),
            "%ntid.x": np.full(n, per_cta, np.uint32),
            "%laneid": threads.lane.astype(np.uint32),
            "%warpid": threads.warp.astype(np.uint32),
            "WARP_SZ": np.full(n, 32, np.uint32),
        }
        for axis in "yz":
            self.special[f"%tid.{axis}"] = np.zeros(n, np.uint32)
            self.special[f"%ntid.{axis}"] = np.ones(n, np.uint32)
        for axis in "xyz":
            for name in ("ctaid", "nctaid"):
                self.special[f"%{name}.{axis}"] = np.zeros(n, np.uint32)
        self.constants: dict[tuple[bytes, str], np.ndarray] = {}
        self.shared = SharedMemory(max(shared_bytes, module.shared_bytes), threads, self.report)
        self.memory = GlobalMemory([])
        self.parameters = np.zeros(module.parameter_bytes + 64, np.uint8)
        self.tensor_maps: dict[int, TensorMap] = {}  # by the offset of their parameter
        self.counts: LaunchCounts | None = None
        self.random = random.Random()
        self.findings: dict[tuple[str, int], Finding] = {}  # by kind and instruction
        self.copies, self.bulk = AsyncCopies(self), BulkCopies(self)
        self.barriers, self.multiplications = Barriers(self), Multiplications(self)
        self.scheduler = Scheduler(self)
        self.blocks = self.basic_blocks()
        self.control = {
            ins.index: self.built(self.scheduler.compile, ins) for ins in module.code if ins.control
        }
        self.covered: set[int] = set()  # starts of the blocks that ran
        self.taken: set[int] = set()  # guarded instructions that some thread took
        self.missing_fences = [
            Finding(f"wgmma fence: {self.where(module.code[i])}", what, 1)
            for i, what in missing_fences(module).items()
        ]

    # ---- operands

    def constant(self, value: Any, dtype: Any) -> np.ndarray:
        key = (np.array(value, dtype).tobytes(), np.dtype(dtype).str)
        if key not in self.constants:
            self.constants[key] = np.full(self.n, value, dtype)
        return self.constants[key]

    def source(self, operand: Any, dtype: Any) -> np.ndarray:
        """The row of an operand; a wider register gives its low bits."""
        dtype = np.dtype(dtype)
        if isinstance(operand, Reg):
            row = self.registers[operand.file][operand.number]
            if row.itemsize < dtype.itemsize:
                raise Unsupported(f"an operand of {row.itemsize} bytes as {dtype}")
            return row.view(dtype)[:: row.itemsize // dtype.itemsize]
        if isinstance(operand, Imm):
            return self.constant(immediate(operand.text, dtype), dtype)
        if isinstance(operand, Sym) and operand.name in self.special:
            row = self.special[operand.name]
            return row if row.itemsize == dtype.itemsize else row.astype(dtype)
        if isinstance(operand, Sym):
            return self.constant(self.address(operand), dtype)
        raise Unsupported(f"the operand {operand}")

    def address(self, symbol: Sym) -> int:
        module = self.module
        if symbol.name in module.parameters:
            return PARAMETER_BASE + module.parameters[symbol.name][0] + symbol.offset
        if symbol.name in module.shared:
            return SHARED_BASE + module.shared[symbol.name][0] + symbol.offset
        if symbol.name == "global_smem":  # Triton's dynamic shared memory, behind the static arrays
            return SHARED_BASE + module.shared_bytes + symbol.offset
        raise Unsupported(f"the symbol {symbol.name}")

    def target(self, operand: Any, dtype: Any) -> np.ndarray:
        """The row that a destination is; `_` takes anything."""
        dtype = np.dtype(dtype)
        if isinstance(operand, Sym) and operand.name == "_":
            return np.zeros(self.n, dtype)
        if not isinstance(operand, Reg):
            raise Unsupported(f"the destination {operand}")
        row = self.registers[operand.file][operand.number]
        if row.itemsize != dtype.itemsize:
            raise Unsupported(f"a destination of {row.itemsize} bytes for {dtype}")
        return row.view(dtype)

    def predicate(self, operand: Any) -> Callable[[], np.ndarray]:
        """A function that reads a predicate; do not write to what it returns."""
        if isinstance(operand, Imm):
            fixed = self.constant(int(operand.text, 0) != 0, bool)
            return lambda: fixed
        if isinstance(operand, Not):
            negated = self.registers["p"][operand.reg.number]
            return lambda: ~negated
        row = self.registers["p"][operand.number]
        return lambda: row

    # ---- building

    def basic_blocks(self) -> dict[int, Block]:
        code, labels = self.module.code, self.module.labels
        starts = {0, len(code)}
        for i, ins in enumerate(code):
            if ins.name == "bra":
                starts |= {labels[ins.args[0]], i + 1}
            elif ins.control:
                starts |= {i, i + 1}
        blocks, order = {}, sorted(starts)
        for first, following in itertools.pairwise(order):
            inside = code[first:following]
            control = inside.pop() if inside and inside[-1].control else None
            steps = [(ins, self.compile(ins)) for ins in inside]
            blocks[first] = Block(
                steps, control, following, any("sync" in i.parts for i in code[first:following])
            )
        return blocks

    def built(self, make: Callable[[Instruction], Any], ins: Instruction) -> Any:
        try:
            return make(ins)
        except Unsupported as error:
            raise EmulatorError(f"{self.where(ins)}: the emulator does not know {error}") from None

    def compile(self, ins: Instruction) -> Operation:
        operation = self.built(partial(build, self), ins)
        if ins.pred is None:
            return operation
        predicate, n = self.predicate(ins.pred), self.n

        def guarded(mask: Mask) -> None:
            chosen = predicate()
            if mask is not True:
                chosen = chosen & mask
            count = np.count_nonzero(chosen)
            if count:
                self.taken.add(ins.index)
            if count == n:
                operation(True)
            elif count:
                operation(chosen.copy())

        return guarded

    # ---- running

    def run(
        self,
        programs: list[tuple[int, int, int]],
        grid: tuple[int, int, int],
        parameters: np.ndarray,
        tensor_maps: dict[int, TensorMap],
        memory: GlobalMemory,
        seed: int,
        counts: LaunchCounts | None = None,
    ) -> None:
        """Run these programs of the grid to their end. What they synchronise wrongly is in `findings` then, what they did in `counts`.

        Raises:
            EmulatorError: an access out of bounds, a deadlock, what a GPU would stop at.
        """
        self.parameters[:] = parameters
        self.tensor_maps, self.memory, self.findings, self.counts = tensor_maps, memory, {}, counts
        memory.threads, memory.report, memory.finds_races = self.threads, self.report, counts is None
        self.random.seed(seed)
        self.threads.start(programs, grid)
        for axis in range(3):
            ids = [program[axis] for program in programs]
            self.special[f"%ctaid.{'xyz'[axis]}"][:] = np.repeat(ids, self.threads.per_cta)
            self.special[f"%nctaid.{'xyz'[axis]}"][:] = grid[axis]
        for file, garbage in GARBAGE.items():
            self.registers[file][:] = garbage
        self.registers["p"][:] = False
        for part in (self.shared, self.copies, self.bulk, self.barriers, self.multiplications):
            part.start()
        self.covered, self.taken = set(), set()
        with np.errstate(all="ignore"):
            self.scheduler.run()
            for unit in (self.copies, self.bulk, self.barriers, self.multiplications):
                unit.finish()

    def step(self, strand: Strand) -> bool:
        """Run the block at which a strand stands. Returns True where it waits, splits or ends there."""
        block, mask = self.blocks[strand.pc], strand.mask
        self.covered.add(strand.pc)
        if self.counts is not None:
            self.counts.block(self, strand.pc, mask)
        ins = block.control
        try:
            if self.multiplications.pending:
                for ins, operation in block.steps:
                    self.multiplications.check(ins, mask)
                    operation(mask)
            else:
                for ins, operation in block.steps:  # noqa: B007, the error names it
                    operation(mask)
            if block.control is not None:
                ins = block.control
                return self.control[ins.index](strand)
        except EmulatorError as error:
            raise EmulatorError(f"{self.where(ins)}: {error}") from None
        strand.pc = block.following
        return False

    def covered_lines(self) -> set[int]:
        """The PTX lines of what ran since the last `run`."""
        blocks = [self.blocks[start] for start in self.covered]
        taken = self.taken
        steps = (ins for block in blocks for ins, _ in block.steps)
        lines = {ins.line for ins in steps if ins.pred is None or ins.index in taken}
        return lines | {block.control.line for block in blocks if block.control is not None}

    def barrier_passed(self, ctas: Any) -> None:
        """These CTAs, or all (True), pass a CTA-wide barrier."""
        self.threads.next_interval(ctas)
        if self.shared.unacquired:
            self.shared.barrier_passed(ctas)

    def done_reading(self, words: np.ndarray) -> None:
        """An asynchronous operation has read these words of shared memory; others may still have to."""
        self.shared.state[words] &= ~np.uint8(READING)
        for pending in (*self.bulk.unread(), *self.multiplications.unread()):
            self.shared.state[pending] |= READING

    # ---- findings

    def where(self, ins: Instruction | None) -> str:
        if ins is None:
            return self.module.name
        text = " ".join(ins.text.split())
        return f"{self.module.name}, {ins.source}, PTX line {ins.line}: {text[:100]}"

    def report(self, kind: str, ins: Instruction, detail: str) -> None:
        found = self.findings.setdefault((kind, ins.index), Finding(f"{kind}: {self.where(ins)}", detail))
        found.count += 1


def immediate(text: str, dtype: np.dtype) -> Any:
    """A constant of the PTX as a number of dtype. (PTX ISA, 4.5)"""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        bits = bytes.fromhex(text[2:])
        value = struct.unpack(">f" if len(bits) == 4 else ">d", bits)[0]
        if dtype.kind == "f":
            return np.frombuffer(bits[::-1], f"f{len(bits)}")[0]
        return np.frombuffer(bits[::-1], f"u{len(bits)}")[0].astype(dtype)
    if "x" not in text and ("." in text or "e" in text):
        return float(text)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return value != 0
    if dtype.kind == "f":
        return value
    return np.array(value & ((1 << dtype.itemsize * 8) - 1), f"u{dtype.itemsize}").view(dtype)[()]
