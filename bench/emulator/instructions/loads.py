"""Loads, stores, atomics and fences. (PTX ISA, 9.7.9 data movement; 9.7.13 fences and atomics)"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Instruction, Mem, Reg, Sym, Vec
from ..threads import Mask, Unsupported
from .table import U32, U64, opcode, put, type_of, unsigned

if TYPE_CHECKING:
    from ..machine import Machine, Operation

SPACES = ("global", "shared", "param")


def space(ins: Instruction) -> str:
    """The state space; Triton writes one at every access.

    Raises:
        Unsupported: .local, .const, or a generic address.
    """
    found = [p.split("::")[0] for p in ins.parts if p.split("::")[0] in SPACES]
    if not found:
        raise Unsupported(f"the state space of {ins.op}")
    return found[0]


def addresses(machine: "Machine", operand: Mem, shared: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A function of chosen threads: their addresses, 32 bits wide in shared memory and 64 in global."""
    dtype: Any = U32 if shared else U64
    if isinstance(operand.base, Sym):
        row = machine.constant(machine.address(operand.base), dtype)
    else:
        row = machine.source(operand.base, dtype)
    offset = dtype(operand.offset & ((1 << np.dtype(dtype).itemsize * 8) - 1))
    return lambda threads: row[threads] + offset


def memory_of(machine: "Machine", ins: Instruction) -> Any:
    return machine.memory if space(ins) == "global" else machine.shared


def vector(ins: Instruction) -> int:
    return next((int(p[1:]) for p in ins.parts if p in ("v2", "v4", "v8")), 1)


def items(operand: Any) -> tuple[Any, ...]:
    return operand.items if isinstance(operand, Vec) else (operand,)


@opcode("ld")
def load(machine: "Machine", ins: Instruction) -> "Operation":
    dtype, count = type_of(ins), vector(ins)
    size = np.dtype(dtype).itemsize
    targets = [row_for_load(machine, x, dtype) for x in items(ins.args[0])]
    if space(ins) == "param":
        symbol = ins.args[1].base
        at = machine.module.parameters[symbol.name][0] + symbol.offset
        values = [machine.parameters[at + i * size : at + (i + 1) * size].view(dtype) for i in range(count)]

        def load_parameter(mask: Mask) -> None:
            for target, value in zip(targets, values, strict=True):
                put(target, value[0], mask)

        return load_parameter
    address = addresses(machine, ins.args[1], space(ins) == "shared")

    def load(mask: Mask) -> None:
        threads = machine.threads.chosen(mask)
        at = address(threads)
        values = memory_of(machine, ins).load(ins, at, size, count, threads)
        count_access(machine, ins, "load", at, size * count, threads)
        for i, target in enumerate(targets):
            target[threads] = (values[:, i] if count > 1 else values).view(dtype)

    return load


def row_for_load(machine: "Machine", operand: Any, dtype: Any) -> np.ndarray:
    """A register may be wider than what is loaded: it is extended."""
    if not isinstance(operand, Reg):
        return machine.target(operand, dtype)
    width = machine.registers[operand.file].itemsize
    if width == np.dtype(dtype).itemsize:
        return machine.target(operand, dtype)
    kind = "i" if np.dtype(dtype).kind == "i" else "u"
    return machine.target(operand, np.dtype(f"{kind}{width}"))


@opcode("st")
def store(machine: "Machine", ins: Instruction) -> "Operation":
    dtype = unsigned(type_of(ins))
    values = [machine.source(x, dtype) for x in items(ins.args[1])]
    address = addresses(machine, ins.args[0], space(ins) == "shared")

    def store(mask: Mask) -> None:
        threads = machine.threads.chosen(mask)
        data = np.stack([v[threads] for v in values], 1) if len(values) > 1 else values[0][threads]
        at, size = address(threads), np.dtype(dtype).itemsize
        memory_of(machine, ins).store(ins, at, size, len(values), threads, data)
        count_access(machine, ins, "store", at, size * len(values), threads)

    return store


def count_access(
    machine: "Machine", ins: Instruction, kind: str, at: np.ndarray, width: int, threads: np.ndarray
) -> None:
    if machine.counts is None:
        return
    if space(ins) == "global":
        machine.counts.access(machine, kind, at, width, threads, through_l1=ins.name == "ld")
    else:
        machine.counts.shared(machine.shared.flat(at, width, threads), width, threads)


ATOMICS: dict[str, Callable] = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "exch": lambda old, new: new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "inc": lambda old, limit: type(old)(0) if old >= limit else old + type(old)(1),
}


@opcode("atom", "red")
def atomic(machine: "Machine", ins: Instruction) -> "Operation":
    """Thread by thread, in their order: one of the orders that a GPU may take."""
    dtype = type_of(ins)
    target = None
    rest = ins.args
    if ins.name == "atom":
        target, rest = machine.target(ins.args[0], dtype), ins.args[1:]
    shared = space(ins) == "shared"
    address, values = addresses(machine, rest[0], shared), [machine.source(x, dtype) for x in rest[1:]]
    name = next((p for p in ins.parts if p in ATOMICS or p == "cas"), None)
    if name is None:
        raise Unsupported(ins.op)
    size = np.dtype(dtype).itemsize

    def element(at: np.ndarray, thread: np.ndarray) -> tuple[np.ndarray, int]:
        if shared:
            view, byte = machine.shared.view(size, 1), machine.shared.flat(at, size, thread)[0]
        else:
            region = machine.memory.region(at, size, thread)
            assert region is not None  # one access is in one region
            view, byte = region.view(size, 1), int(at[0]) - region.base
        return view.view(dtype), int(byte) // size

    def act(mask: Mask) -> None:
        threads = machine.threads.chosen(mask)
        count_access(machine, ins, "store", address(threads), size, threads)
        for i, at in enumerate(address(threads)):
            t = threads[i]
            view, place = element(np.array([at]), threads[i : i + 1])
            old, new = view[place], values[0][t]
            if name == "cas":
                view[place] = values[1][t] if old == new else old
            else:
                view[place] = ATOMICS[name](old, new)
            if target is not None:
                target[t] = old

    return act


@opcode("prefetch", "applypriority", "discard", "griddepcontrol", "nanosleep", "membar", "setmaxnreg")
def nothing(machine: "Machine", ins: Instruction) -> "Operation":
    """Hints, and fences of a model where every store is seen at once."""
    return lambda mask: None


@opcode("createpolicy")
def cache_policy(machine: "Machine", ins: Instruction) -> "Operation":
    """How long the L2 cache is to keep what a load or store touches: a hint, which nothing here reads."""
    target = machine.target(ins.args[0], U64)
    return lambda mask: put(target, U64(0), mask)


@opcode("fence")
def fence(machine: "Machine", ins: Instruction) -> "Operation":
    if ins.parts[1:3] == ["proxy", "async"] and "global" not in ins.parts:
        return machine.shared.fence_proxy
    return lambda mask: None


@opcode("bar")
def warp_barrier(machine: "Machine", ins: Instruction) -> "Operation":
    """bar.warp.sync: the threads of a warp are together already. Barriers of a CTA are the scheduler's."""
    return lambda mask: None
