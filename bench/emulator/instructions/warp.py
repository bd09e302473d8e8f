"""What the threads of a warp do together: shuffles, votes, reductions. (PTX ISA, 9.7.9.6 shfl.sync; 9.7.13 vote, activemask, redux, elect)"""

from typing import TYPE_CHECKING

import numpy as np

from ..ptx import Imm, Instruction, Pair
from ..threads import Mask, Unsupported
from .table import I64, U32, U64, opcode, operands, put, type_of

if TYPE_CHECKING:
    from ..machine import Machine, Operation


@opcode("shfl")
def shuffle(machine: "Machine", ins: Instruction) -> "Operation":
    mode, threads = ins.parts[2], machine.threads
    pair = ins.args[0] if isinstance(ins.args[0], Pair) else Pair(ins.args[0], None)
    target = machine.target(pair.first, U32)
    inside = None if pair.second is None else machine.target(pair.second, np.bool_)
    a, b, c = (machine.source(x, U32) for x in ins.args[1:4])
    lane = threads.lane

    def source() -> tuple[np.ndarray, np.ndarray]:
        """The thread that each reads, and where that lies in its segment."""
        clamp, segment = (c & U32(31)).astype(I64), (c >> U32(8) & U32(31)).astype(I64)
        limit, first = (lane & segment) | (clamp & ~segment), lane & segment
        n = (b & U32(31)).astype(I64)
        moved = {"bfly": lane ^ n, "idx": first | (n & ~segment), "down": lane + n, "up": lane - n}[mode]
        ok = moved >= limit if mode == "up" else moved <= limit
        return threads.first_of_warp + np.where(ok, moved, lane), ok

    fixed = source() if isinstance(ins.args[2], Imm) and isinstance(ins.args[3], Imm) else None

    def shuffled(mask: Mask) -> None:
        thread, ok = fixed or source()
        put(target, a[thread], mask)
        if inside is not None:
            put(inside, ok, mask)

    return shuffled


REDUCTIONS = {
    **{"min": np.minimum, "max": np.maximum, "add": np.add},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


@opcode("redux")
def reduce(machine: "Machine", ins: Instruction) -> "Operation":
    dtype = type_of(ins)
    target, a, _ = operands(machine, ins, dtype)
    reduction = REDUCTIONS[ins.parts[2]].reduce
    return lambda mask: put(target, np.repeat(reduction(a.reshape(-1, 32), axis=1).astype(dtype), 32), mask)


def ballot(rows: np.ndarray) -> np.ndarray:
    """(warps, 32) of bool to a word for each thread."""
    words = (rows.astype(U64) << np.arange(32, dtype=U64)).sum(1).astype(U32)
    return np.repeat(words, 32)


@opcode("vote")
def vote(machine: "Machine", ins: Instruction) -> "Operation":
    predicate, mode = machine.predicate(ins.args[1]), ins.parts[2]
    if mode not in ("ballot", "any", "all"):
        raise Unsupported(ins.op)
    target = machine.target(ins.args[0], U32 if mode == "ballot" else np.bool_)

    def count(mask: Mask) -> None:
        here = machine.threads.everyone(mask).reshape(-1, 32)
        yes = predicate().reshape(-1, 32)
        if mode == "ballot":
            put(target, ballot(yes & here), mask)
        else:
            result = (yes & here).any(1) if mode == "any" else (yes | ~here).all(1)
            put(target, np.repeat(result, 32), mask)

    return count


@opcode("activemask")
def active_mask(machine: "Machine", ins: Instruction) -> "Operation":
    target = machine.target(ins.args[0], U32)
    return lambda mask: put(target, ballot(machine.threads.everyone(mask).reshape(-1, 32)), mask)


@opcode("elect")
def elect(machine: "Machine", ins: Instruction) -> "Operation":
    leader, elected = machine.target(ins.args[0].first, U32), machine.target(ins.args[0].second, np.bool_)
    is_first = machine.threads.lane == 0

    def choose(mask: Mask) -> None:
        put(leader, U32(0), mask)
        put(elected, is_first, mask)

    return choose
