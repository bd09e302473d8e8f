"""cvt: conversions between types. (PTX ISA, 9.7.9.22)"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Instruction
from ..threads import Unsupported
from .arithmetic import HALVES, flush, flushed
from .table import F32, F64, TYPES, U16, U32, bits, elementwise, is_float, opcode, put

if TYPE_CHECKING:
    from ..machine import Machine, Operation

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
MODIFIERS = {"rn", "rz", "ftz", "sat", *TO_INTEGER}


@opcode("cvt")
def convert(machine: "Machine", ins: Instruction) -> "Operation":
    to, of = ins.parts[-2:]
    modifiers = {*ins.parts[1:-2]}
    if modifiers - MODIFIERS:
        raise Unsupported(ins.op)
    rounding = next((m for m in modifiers if m not in ("ftz", "sat")), None)
    if "sat" in modifiers:
        if modifiers - {"sat", "ftz"} or (to, of) != ("f32", "f32"):
            raise Unsupported(ins.op)
        return elementwise(machine, ins, flushed(saturated) if "ftz" in modifiers else saturated)
    if to.removesuffix("x2") in HALVES and of == "f32":
        return narrow(machine, ins, to, rounding)
    if of == "bf16" and to == "f32":
        target, a = machine.target(ins.args[0], F32), machine.source(ins.args[1], U16)
        return lambda mask: put(target, HALVES["bf16"][0](a), mask)
    if "bf16" in (to, of) or to not in TYPES or of not in TYPES:
        raise Unsupported(ins.op)
    if is_float(TYPES[to]):
        return to_float(machine, ins, TYPES[to], TYPES[of], rounding, "ftz" in modifiers)
    return to_integer(machine, ins, TYPES[to], TYPES[of], rounding)


def saturated(x: np.ndarray) -> np.ndarray:
    """.sat: to [0, 1], NaN to 0."""
    return np.fmin(np.fmax(x, F32(0)), F32(1))


def narrow(machine: "Machine", ins: Instruction, to: str, rounding: str | None) -> "Operation":
    """float32 to 16 bits; two of them where the type says x2, the first operand in the upper half."""
    if rounding != "rn":
        raise Unsupported(ins.op)
    round_to = HALVES[to.removesuffix("x2")][1]
    sources = [machine.source(a, F32) for a in ins.args[1:]]
    if not to.endswith("x2"):
        target = machine.target(ins.args[0], U16)
        return lambda mask: put(target, round_to(sources[0]), mask)
    target, (high, low) = machine.target(ins.args[0], U32), sources
    return lambda mask: put(target, round_to(low).astype(U32) | round_to(high).astype(U32) << U32(16), mask)


def to_float(
    machine: "Machine", ins: Instruction, to: Any, of: Any, rounding: str | None, ftz: bool
) -> "Operation":
    target, a = machine.target(ins.args[0], to), machine.source(ins.args[1], of)
    if rounding in TO_INTEGER:
        whole = TO_INTEGER[rounding]
        return lambda mask: put(target, whole(a), mask)
    if rounding == "rz":
        raise Unsupported(ins.op)
    if ftz and to is F32:
        return lambda mask: put(target, flush(a.astype(to)), mask)
    return lambda mask: put(target, a, mask)


def to_integer(machine: "Machine", ins: Instruction, to: Any, of: Any, rounding: str | None) -> "Operation":
    a = machine.source(ins.args[1], of)
    if is_float(of):
        if rounding not in TO_INTEGER:
            raise Unsupported(ins.op)
        whole, limits = TO_INTEGER[rounding], np.iinfo(to)
        target = machine.target(ins.args[0], to)

        def clamped() -> np.ndarray:
            value = np.clip(whole(a.astype(F64)), float(limits.min), float(limits.max))
            return np.where(np.isnan(a), 0, value).astype(to)

        return lambda mask: put(target, clamped(), mask)
    # an integer's register may be wider than its type: it is extended by its sign, or by zeros
    width = machine.registers[ins.args[0].file].itemsize
    if width * 8 > bits(to):
        wide = np.dtype(f"{np.dtype(to).kind}{width}").type
        target = machine.target(ins.args[0], wide)
        return lambda mask: put(target, a.astype(to).astype(wide), mask)
    target = machine.target(ins.args[0], to)
    return lambda mask: put(target, a, mask)
