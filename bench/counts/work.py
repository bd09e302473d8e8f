"""The work of a launch: what its whole grid executes and moves, from the programs that were counted."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from ..emulator.counting import LaunchCounts
from ..emulator.ptx import Instruction
from .sass import compiled, executions, module_of

# Classes of machine instructions by the start of their opcode; the first that fits counts, "integer" takes the rest. "multiply" is
# integer multiply-add, which the float32 pipe executes.
# (NVIDIA, CUDA Binary Utilities, "Instruction Set Reference")
CLASSES = {
    "matrix": ("HMMA", "HGMMA", "IMMA", "QGMMA"),
    "special": ("MUFU",),
    "convert": ("F2", "I2F", "FRND", "I2I"),
    "multiply": ("IMAD", "IDP"),
    "float": ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "FSWZADD", "DADD", "DMUL", "DFMA"),
    "barrier": (
        *("BAR", "SYNCS", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE", "ERRBAR", "WARPGROUP"),
        *("CGAERRBAR", "UTMACMDFLUSH", "NANOSLEEP"),
    ),
    "memory": ("LDG", "LDS", "LDT", "LDL", "LD", "ST", "ATOM", "RED", "UTMA", "CCTL", "UBLKCP", "REDG"),
    "warp": ("SHFL", "VOTE", "UVOTE", "MATCH", "REDUX", "ELECT"),
    "branch": ("BRA", "EXIT", "BRX", "JMP", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "NOP", "YIELD", "KILL"),
    "move": (
        *("MOV", "UMOV", "S2R", "S2UR", "CS2R", "R2UR", "PRMT", "UPRMT", "SEL", "USEL", "LDC", "ULDC", "P2R"),
        *("R2P", "B2R", "FSEL"),
    ),
    "uniform": ("U",),  # integers of a whole warp, in a pipe of their own
}
# LDC and ULDC read constants, REDUX reduces a warp's integers: neither is a "memory" instruction
_NOT_MEMORY = ("LDC", "REDUX", "LDGDEPBAR")


@dataclass
class Work:
    """Of one launch. Instructions are warps', operations threads'."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int  # of a program
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared_bytes: int  # of a program
    instructions: dict[str, float]  # by a key of CLASSES, or "integer"
    tensor_flops: float
    special: float  # operations of the special-function unit
    asked_bytes: float  # of global memory, by those who use them
    sectors: float  # of 32 bytes, between L2 and multiprocessors
    dram_read: float  # bytes: each sector of a tensor once
    dram_written: float
    shared_wavefronts: float  # of 128 bytes
    shared_at_best: float  # without bank conflicts
    matrix_shared_bytes: float  # operands that wgmma reads from shared memory
    barriers: float  # of a whole program
    in_flight: float  # bytes of asynchronous copies in flight in a program when it waits for one, on average

    @property
    def programs(self) -> int:
        return prod(self.grid)

    @property
    def issued(self) -> float:
        """Warp instructions of all classes."""
        return sum(self.instructions.values())


def work_of(counts: LaunchCounts, architecture: str) -> Work:
    """Scale what was counted to the whole grid."""
    scale, tally = counts.scale, counts.tallies
    sass, opcodes = compiled(counts.ptx, architecture), executions(counts, architecture)
    warps = counts.threads // 32
    instructions: Counter[str] = Counter()
    for opcode, times in opcodes.items():
        instructions[class_of(opcode)] += times
    flops, operands, barriers = 0.0, 0.0, 0.0
    for ins in module_of(counts.ptx).code:
        times = counts.executed[ins.index]
        if times and (shape := _matrix_shape(ins)):
            flops += times * 2 * prod(shape)
            operands += times * _operand_bytes(ins, shape)
        elif ins.name in ("bar", "barrier") and ins.control:
            barriers += times / warps
    read, written = counts.traffic()
    return Work(
        kernel=counts.kernel,
        grid=counts.grid,
        warps=warps,
        registers=sass.registers,
        spilled=sass.spilled,
        shared_bytes=counts.shared_bytes,
        instructions={name: scale * times for name, times in sorted(instructions.items())},
        tensor_flops=scale * flops,
        special=scale * 32 * instructions["special"],
        asked_bytes=scale * (tally["load asked"] + tally["store asked"]),
        sectors=scale * (tally["load sectors"] + tally["store sectors"]),
        dram_read=read,
        dram_written=written,
        shared_wavefronts=scale * tally["shared wavefronts"],
        shared_at_best=scale * tally["shared at best"],
        matrix_shared_bytes=scale * operands,
        barriers=scale * barriers,
        in_flight=tally["in flight"] / tally["waits"] if tally["waits"] else 0.0,
    )


def class_of(opcode: str) -> str:
    """The class of a machine instruction."""
    for name, starts in CLASSES.items():
        if opcode.startswith(starts) and not (name == "memory" and opcode.startswith(_NOT_MEMORY)):
            return name
    return "integer"


def _matrix_shape(ins: Instruction) -> tuple[Any, ...] | None:
    """(M, N, K) of one warp's part of a matrix instruction."""
    shape = re.search(r"\.m(\d+)n(\d+)k(\d+)", ins.op) if ins.name == "mma" or ins.multiplies else None
    if shape is None:
        return None
    m, n, k = (int(number) for number in shape.groups())
    return (m // 4 if ins.multiplies else m, n, k)


def _operand_bytes(ins: Instruction, shape: tuple[int, int, int]) -> float:
    """What a warp's part of a wgmma reads of shared memory: B for the four warps together, A where it is not in registers."""
    if not ins.multiplies:
        return 0.0
    m, n, k = shape
    element = 4 if ins.type == "tf32" else 2
    in_registers = hasattr(ins.args[1], "items")
    return element * k * (n / 4 + (0 if in_registers else m))
