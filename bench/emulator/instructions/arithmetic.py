"""Floating-point and shared integer arithmetic. (PTX ISA, 9.7.1 integer, 9.7.3 floating point, 9.7.4 half precision)

Approximate instructions (ex2, rsqrt, tanh, ...) are rounded correctly here; hardware errs by a few units in the last place.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Instruction
from ..threads import Mask, Unsupported
from .table import (
    F16,
    F32,
    F64,
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

SMALLEST_NORMAL = np.float32(2.0**-126)
# Directions of rounding: what lies beyond the exact value, and where to go from there.
DIRECTIONS: dict[str, tuple[Callable, float]] = {
    "rz": (lambda x, exact: np.abs(x) > np.abs(exact), 0.0),
    "rm": (np.greater, -np.inf),
    "rp": (np.less, np.inf),
}


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 to zero of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F32(0), x), x)


def flushed(function: Callable) -> Callable:
    return lambda *sources: flush(function(*map(flush, sources)))


def directed(ins: Instruction, function: Callable) -> Callable:
    """In float64, then to the float32 that is next in the direction of .rz, .rm or .rp."""
    (direction,) = DIRECTIONS.keys() & {*ins.parts}
    beyond, towards = DIRECTIONS[direction]

    def rounded(*sources: np.ndarray) -> np.ndarray:
        exact = function(*(source.astype(F64) for source in sources))
        nearest = exact.astype(F32)
        return np.where(beyond(nearest, exact), np.nextafter(nearest, F32(towards)), nearest)

    return rounded


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to the nearest, ties to even."""
    x = np.ascontiguousarray(x)
    raw = x.view(U32)
    rounded = ((raw + U32(0x7FFF) + ((raw >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(U32) << U32(16)).view(F32)


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(F16).view(U16)


def from_f16(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(F16).astype(F32)


HALVES = {"bf16": (from_bf16, to_bf16), "f16": (from_f16, to_f16)}


def is_half(ins: Instruction) -> bool:
    return ins.type.removesuffix("x2") in HALVES


def half(machine: "Machine", ins: Instruction, function: Callable) -> "Operation":
    """Arithmetic of 16-bit floats, one or two a register: in float64, rounded once."""
    pairs = ins.type.endswith("x2")
    read, write = HALVES[ins.type.removesuffix("x2")]
    target, *sources = operands(machine, ins, U32 if pairs else U16)

    def one(shift: int) -> np.ndarray:
        values = (read((s >> shift & 0xFFFF).astype(U16)).astype(F64) for s in sources)
        # float64 to float16 in one step; by way of float32 only where that rounds the same (bfloat16)
        result = function(*values)
        return write(result.astype(F32)) if ins.type.startswith("bf16") else write(result)

    if pairs:
        return lambda mask: put(target, one(0).astype(U32) | one(16).astype(U32) << U32(16), mask)
    return lambda mask: put(target, one(0), mask)


def pair(machine: "Machine", ins: Instruction, function: Callable) -> "Operation":
    """Arithmetic of two float32 in a 64-bit register, which sm_100 and later have."""
    target, *sources = operands(machine, ins, U64)
    values = [source.view(F32) for source in sources]  # of the registers themselves: 2 n of them
    return lambda mask: put(target, function(*values).astype(F32).view(U64), mask)


def mixed(machine: "Machine", ins: Instruction, function: Callable) -> "Operation":
    """Arithmetic in float32 of which all operands but the last are 16-bit floats. (PTX ISA, 9.7.5 mixed precision)"""
    target, last = machine.target(ins.args[0], F32), machine.source(ins.args[-1], F32)
    narrow = [machine.source(operand, U16) for operand in ins.args[1:-1]]
    read, _ = HALVES[ins.type]
    return lambda mask: put(target, function(*map(read, narrow), last), mask)


def arithmetic(machine: "Machine", ins: Instruction, function: Any) -> "Operation":
    if ins.parts[1:-1] == ["rn", "f32"] and is_half(ins):
        return mixed(machine, ins, function)
    if is_half(ins):
        return half(machine, ins, function)
    if DIRECTIONS.keys() & {*ins.parts} and ins.type == "f32":
        function = directed(ins, function)
    elif DIRECTIONS.keys() & {*ins.parts}:
        raise Unsupported(f"the rounding of {ins.op}")
    if "sat" in ins.parts:
        raise Unsupported(f"the saturation of {ins.op}")
    if ins.type == "f32x2" and "ftz" not in ins.parts:
        return pair(machine, ins, function)
    return elementwise(machine, ins, flushed(function) if "ftz" in ins.parts else function)


@opcode("add")
def add(machine: "Machine", ins: Instruction) -> "Operation":
    return arithmetic(machine, ins, np.add)


@opcode("sub")
def sub(machine: "Machine", ins: Instruction) -> "Operation":
    return arithmetic(machine, ins, np.subtract)


@opcode("mul")
def mul(machine: "Machine", ins: Instruction) -> "Operation":
    how, dtype = ins.parts[1], None if is_half(ins) or ins.type == "f32x2" else type_of(ins)
    if how == "wide":
        wide = wider(dtype)
        target = machine.target(ins.args[0], wide)
        a, b = (machine.source(x, dtype) for x in ins.args[1:])
        return lambda mask: np.multiply(a, b, target, where=mask, dtype=wide)
    if how == "hi":
        target, a, b = operands(machine, ins, dtype)
        return lambda mask: put(target, high_bits(a, b, dtype), mask)
    if how == "lo":
        return elementwise(machine, ins, np.multiply, unsigned(dtype))
    return arithmetic(machine, ins, np.multiply)


def wider(dtype: Any) -> Any:
    return np.dtype(f"{np.dtype(dtype).kind}{2 * np.dtype(dtype).itemsize}").type


def high_bits(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """The upper half of the product."""
    if bits(dtype) == 64:
        high = [(int(x) * int(y) >> 64) & ((1 << 64) - 1) for x, y in zip(a, b, strict=True)]
        return np.array(high, U64).view(dtype)
    wide = wider(dtype)
    return np.multiply(a, b, dtype=wide) >> wide(bits(dtype))


@opcode("mad")
def mad(machine: "Machine", ins: Instruction) -> "Operation":
    dtype = type_of(ins)
    if ins.parts[1] == "wide":
        wide = wider(dtype)
        target, c = machine.target(ins.args[0], wide), machine.source(ins.args[3], wide)
        a, b = (machine.source(x, dtype) for x in ins.args[1:3])
        return lambda mask: np.add(np.multiply(a, b, dtype=wide), c, target, where=mask)
    if ins.parts[1] != "lo":
        raise Unsupported(ins.op)
    return elementwise(machine, ins, lambda a, b, c: a * b + c, unsigned(dtype))


@opcode("fma")
def fma(machine: "Machine", ins: Instruction) -> "Operation":
    """In float64 and rounded: the product is exact there, and the sum is rounded twice only in rare ties."""
    if ins.parts[1:-1] == ["rn", "f32"] and is_half(ins):
        return mixed(machine, ins, lambda a, b, c: a.astype(F64) * b + c)
    if is_half(ins):
        return half(machine, ins, lambda a, b, c: a * b + c)
    if ins.type == "f32x2" and ins.parts[1:] == ["rn", "f32x2"]:
        return pair(machine, ins, lambda a, b, c: a.astype(F64) * b + c)
    if ins.type != "f32" or "sat" in ins.parts:
        raise Unsupported(ins.op)
    if "rn" not in ins.parts:
        return arithmetic(machine, ins, lambda a, b, c: a * b + c)
    target, a, b, c = operands(machine, ins, F32)
    total = np.empty(machine.n, F64)

    def multiply_add(mask: Mask) -> None:
        np.multiply(a, b, total, dtype=F64)
        np.add(total, c, total)
        np.copyto(target, total, casting="same_kind", where=mask)

    if "ftz" in ins.parts:
        product = flushed(lambda a, b, c: (a.astype(F64) * b + c).astype(F32))
        return lambda mask: put(target, product(a, b, c), mask)
    return multiply_add


@opcode("div", "rem")
def div(machine: "Machine", ins: Instruction) -> "Operation":
    dtype = type_of(ins)
    if is_float(dtype):
        return elementwise(machine, ins, flushed(np.divide) if "ftz" in ins.parts else np.divide)
    which = 0 if ins.name == "div" else 1
    return elementwise(machine, ins, lambda a, b: quotient(a, b, dtype)[which])


def quotient(a: np.ndarray, b: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Quotient, rounded towards zero, and remainder. A division by zero gives all bits set, and the dividend."""
    zero = b == 0
    divisor = np.where(zero, dtype(1), b)
    q = a // divisor
    if is_signed(dtype):
        q = q + ((a - q * divisor != 0) & ((a < 0) != (divisor < 0))).astype(dtype)
    ones = dtype(-1) if is_signed(dtype) else np.iinfo(dtype).max
    return np.where(zero, ones, q), np.where(zero, a, a - q * divisor)


@opcode("max", "min")
def extreme(machine: "Machine", ins: Instruction) -> "Operation":
    numeric, propagating = (np.fmax, np.maximum) if ins.name == "max" else (np.fmin, np.minimum)
    if is_half(ins):
        return half(machine, ins, propagating if "NaN" in ins.parts else numeric)
    if not is_float(type_of(ins)):
        function: Any = propagating
        if "relu" in ins.parts:
            return elementwise(machine, ins, lambda a, b: np.maximum(propagating(a, b), 0))
        return elementwise(machine, ins, function)
    function = propagating if "NaN" in ins.parts else numeric
    if len(ins.args) == 4:
        return elementwise(machine, ins, lambda a, b, c: function(function(a, b), c))
    return elementwise(machine, ins, function)


@opcode("neg")
def neg(machine: "Machine", ins: Instruction) -> "Operation":
    return arithmetic(machine, ins, np.negative)


@opcode("abs")
def absolute(machine: "Machine", ins: Instruction) -> "Operation":
    return arithmetic(machine, ins, np.abs)


@opcode("copysign")
def copysign(machine: "Machine", ins: Instruction) -> "Operation":
    return elementwise(machine, ins, lambda a, b: np.copysign(b, a), F32)


FUNCTIONS: dict[str, Callable] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@opcode(*FUNCTIONS)
def function(machine: "Machine", ins: Instruction) -> "Operation":
    if is_half(ins):
        return half(machine, ins, FUNCTIONS[ins.name])
    if ins.type != "f32":
        raise Unsupported(ins.op)

    def rounded(x: np.ndarray) -> np.ndarray:
        return FUNCTIONS[ins.name](x.astype(F64)).astype(F32)

    return elementwise(machine, ins, flushed(rounded) if "ftz" in ins.parts else rounded)
