"""Bits, comparisons, selection and moves. (PTX ISA, 9.7.1 integer, 9.7.6 comparison and selection, 9.7.8 logic and shifts, 9.7.9 moves)"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Imm, Instruction, Pair, Sym, Vec
from ..threads import Mask, Unsupported
from .arithmetic import HALVES
from .table import (
    F32,
    I64,
    U16,
    U32,
    U64,
    bits,
    elementwise,
    is_float,
    is_signed,
    opcode,
    operands,
    put,
    type_of,
    unsigned,
)

if TYPE_CHECKING:
    from ..machine import Machine, Operation

LOGIC = {
    "and": (np.bitwise_and, np.logical_and),
    "or": (np.bitwise_or, np.logical_or),
    "xor": (np.bitwise_xor, np.logical_xor),
    "not": (np.invert, np.logical_not),
}


@opcode(*LOGIC)
def logic(machine: "Machine", ins: Instruction) -> "Operation":
    return elementwise(machine, ins, LOGIC[ins.name][ins.type == "pred"])


@opcode("shl", "shr")
def shift(machine: "Machine", ins: Instruction) -> "Operation":
    """An amount beyond the width gives 0, or the sign."""
    dtype = type_of(ins) if ins.name == "shr" else unsigned(type_of(ins))
    width, ufunc = bits(dtype), np.left_shift if ins.name == "shl" else np.right_shift
    target, a = machine.target(ins.args[0], dtype), machine.source(ins.args[1], dtype)
    amount = machine.source(ins.args[2], U32)
    if isinstance(ins.args[2], Imm) and amount[0] < width:
        fixed = machine.constant(int(amount[0]), dtype)
        return lambda mask: ufunc(a, fixed, target, where=mask)

    def shifted(mask: Mask) -> None:
        result = ufunc(a, np.minimum(amount, width - 1).astype(dtype))
        put(target, result if is_signed(dtype) else np.where(amount < width, result, dtype(0)), mask)

    return shifted


@opcode("shf")
def funnel_shift(machine: "Machine", ins: Instruction) -> "Operation":
    left, wrap = ins.parts[1] == "l", ins.parts[2] == "wrap"

    def shifted(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        n = (amount & U32(31) if wrap else np.minimum(amount, U32(32))).astype(U64)
        both = high.astype(U64) << U64(32) | low.astype(U64)
        return (both << n >> U64(32) if left else both >> n) & U64(0xFFFFFFFF)

    return elementwise(machine, ins, shifted, U32)


@opcode("bfe")
def bit_field_extract(machine: "Machine", ins: Instruction) -> "Operation":
    dtype = type_of(ins)
    if bits(dtype) != 32:
        raise Unsupported(ins.op)

    def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position = np.minimum(position & 255, 63).astype(I64)
        length = np.minimum(length & 255, 32).astype(I64)
        field = a.astype(I64) >> position & (I64(1) << length) - 1
        sign = field >> np.maximum(length - 1, 0) & 1
        return np.where((sign == 1) & (length > 0) & is_signed(dtype), field - (I64(1) << length), field)

    return elementwise(machine, ins, extract, dtype)


@opcode("bfi")
def bit_field_insert(machine: "Machine", ins: Instruction) -> "Operation":
    def insert(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        at = np.minimum(position & 255, 63).astype(U64)
        mask = ((U64(1) << np.minimum(length & 255, 32).astype(U64)) - U64(1)) << at & U64(0xFFFFFFFF)
        return a.astype(U64) << at & mask | b.astype(U64) & ~mask

    return elementwise(machine, ins, insert, U32)


@opcode("prmt")
def permute_bytes(machine: "Machine", ins: Instruction) -> "Operation":
    if len(ins.parts) != 2:
        raise Unsupported(ins.op)

    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        source, out = b.astype(U64) << U64(32) | a.astype(U64), np.zeros(machine.n, U32)
        for i in range(4):
            chosen = selector >> U32(4 * i)
            byte = (source >> ((chosen & U32(7)) * U32(8)).astype(U64) & U64(255)).astype(U32)
            sign = np.where(byte & U32(128), U32(255), U32(0))
            out |= np.where(chosen & U32(8), sign, byte) << U32(8 * i)
        return out

    return elementwise(machine, ins, permute, U32)


@opcode("lop3")
def lop3(machine: "Machine", ins: Instruction) -> "Operation":
    """Any logic of three inputs, by its truth table."""
    target = machine.target(ins.args[0], U32)
    a, b, c = (machine.source(x, U32) for x in ins.args[1:4])
    table = int(ins.args[4].text, 0)

    def look_up(mask: Mask) -> None:
        out = np.zeros(machine.n, U32)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        put(target, out, mask)

    return look_up


@opcode("popc")
def population_count(machine: "Machine", ins: Instruction) -> "Operation":
    target, a = machine.target(ins.args[0], U32), machine.source(ins.args[1], type_of(ins))
    return lambda mask: put(target, np.bitwise_count(a), mask)


@opcode("clz")
def leading_zeros(machine: "Machine", ins: Instruction) -> "Operation":
    target, a = machine.target(ins.args[0], U32), machine.source(ins.args[1], U32)
    return lambda mask: put(target, 32 - np.frexp(a.astype(np.float64))[1], mask)


ORDERED = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def comparison(name: str, dtype: Any) -> Callable:
    """`equ` and the like are true for NaN, `ne` and the like false."""

    def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.isnan(a) | np.isnan(b)

    if name in ("num", "nan"):
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    if is_float(dtype) and len(name) == 3:
        return lambda a, b: ORDERED[name[:2]](a, b) | unordered(a, b)
    if is_float(dtype) and name == "ne":
        return lambda a, b: np.not_equal(a, b) & ~unordered(a, b)
    return ORDERED[name]


@opcode("setp")
def set_predicate(machine: "Machine", ins: Instruction) -> "Operation":
    targets = [*ins.args[0]] if isinstance(ins.args[0], Pair) else [ins.args[0]]
    rows = [machine.target(t, np.bool_) for t in targets]
    joins = [LOGIC[p][1] for p in ins.parts[2:] if p in LOGIC]
    other = machine.predicate(ins.args[3]) if joins else None
    halves = ins.type in HALVES
    dtype = F32 if halves else type_of(ins)
    compare = comparison(ins.parts[1], dtype)
    a, b = (machine.source(x, U16 if halves else dtype) for x in ins.args[1:3])

    def finish(result: np.ndarray, mask: Mask) -> None:
        joined = [result, ~result][: len(rows)]
        if other is not None:
            right = other()
            joined = [joins[0](x, right) for x in joined]
        for row, value in zip(rows, joined, strict=True):
            put(row, value, mask)

    if halves:
        read = HALVES[ins.type][0]
        return lambda mask: finish(compare(read(a), read(b)), mask)
    if isinstance(compare, np.ufunc) and len(rows) == 1 and other is None:
        return lambda mask: compare(a, b, rows[0], where=mask)
    return lambda mask: finish(compare(a, b), mask)


@opcode("selp")
def select(machine: "Machine", ins: Instruction) -> "Operation":
    dtype = unsigned(type_of(ins))
    target = machine.target(ins.args[0], dtype)
    a, b = (machine.source(x, dtype) for x in ins.args[1:3])
    predicate = machine.predicate(ins.args[3])
    return lambda mask: put(target, np.where(predicate(), a, b), mask)


@opcode("mov")
def move(machine: "Machine", ins: Instruction) -> "Operation":
    target, source = ins.args
    if isinstance(source, Vec):
        return pack(machine, ins)
    if isinstance(target, Vec):
        return unpack(machine, ins)
    dtype = type_of(ins)
    row, value = operands(machine, ins, dtype if dtype is np.bool_ else unsigned(dtype))
    return lambda mask: np.copyto(row, value, where=mask)


def pack(machine: "Machine", ins: Instruction) -> "Operation":
    whole, source = unsigned(type_of(ins)), ins.args[1]
    part = np.dtype(f"u{np.dtype(whole).itemsize // len(source.items)}").type
    target, pieces = machine.target(ins.args[0], whole), [machine.source(x, part) for x in source.items]

    def join(mask: Mask) -> None:
        out = pieces[0].astype(whole)
        for i, piece in enumerate(pieces[1:], 1):
            out |= piece.astype(whole) << whole(bits(part) * i)
        put(target, out, mask)

    return join


def unpack(machine: "Machine", ins: Instruction) -> "Operation":
    whole, items = unsigned(type_of(ins)), ins.args[0].items
    part = np.dtype(f"u{np.dtype(whole).itemsize // len(items)}").type
    source = machine.source(ins.args[1], whole)
    targets = [
        (whole(bits(part) * i), machine.target(x, part))
        for i, x in enumerate(items)
        if not isinstance(x, Sym)
    ]

    def part_from(mask: Mask) -> None:
        value = source.copy()  # a target may be a part of it
        for amount, target in targets:
            put(target, value >> amount, mask)

    return part_from


@opcode("cvta")
def convert_address(machine: "Machine", ins: Instruction) -> "Operation":
    return elementwise(machine, ins, np.positive, U64)  # one address space
