"""The opcodes that the emulator knows, and what their builders share. (PTX ISA, 5.2 types; 9.7 instructions)"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Instruction
from ..threads import Mask, Unsupported

if TYPE_CHECKING:
    from ..machine import Machine, Operation

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I16, I32, I64, F16, F32, F64 = np.int16, np.int32, np.int64, np.float16, np.float32, np.float64
TYPES: dict[str, Any] = {
    **{"b8": U8, "u8": U8, "s8": np.int8, "b16": U16, "u16": U16, "s16": I16, "bf16": U16, "f16": F16},
    **{"b32": U32, "u32": U32, "s32": I32, "f32": F32, "b64": U64, "u64": U64, "s64": I64, "f64": F64},
    "pred": np.bool_,
}
Builder = Callable[["Machine", Instruction], "Operation"]
_builders: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Register the builder of the instructions whose first part is one of these names."""

    def register(builder: Builder) -> Builder:
        _builders.update(dict.fromkeys(names, builder))
        return builder

    return register


def build(machine: "Machine", ins: Instruction) -> "Operation":
    """The operation of one instruction, its guard left out.

    Raises:
        Unsupported: an instruction, or a variant of one, that the emulator does not know.
    """
    if ins.name not in _builders:
        raise Unsupported(f"the opcode {ins.op}")
    return _builders[ins.name](machine, ins)


def known_opcodes() -> list[str]:
    return sorted([*_builders, "bra", "ret", "exit"])


def type_of(ins: Instruction) -> Any:
    if ins.type not in TYPES:
        raise Unsupported(f"the type of {ins.op}")
    return TYPES[ins.type]


def unsigned(dtype: Any) -> Any:
    return np.dtype(f"u{np.dtype(dtype).itemsize}").type


def is_float(dtype: Any) -> bool:
    return np.dtype(dtype).kind == "f"


def is_signed(dtype: Any) -> bool:
    return np.dtype(dtype).kind == "i"


def bits(dtype: Any) -> int:
    return np.dtype(dtype).itemsize * 8


def put(target: np.ndarray, value: Any, mask: Mask) -> None:
    np.copyto(target, value, where=mask, casting="unsafe")


def operands(machine: "Machine", ins: Instruction, dtype: Any) -> tuple[np.ndarray, ...]:
    """The target's row, then those of the sources, all of one type."""
    sources = (machine.source(a, dtype) for a in ins.args[1:])
    return machine.target(ins.args[0], dtype), *sources


def elementwise(machine: "Machine", ins: Instruction, function: Callable, dtype: Any = None) -> "Operation":
    """target = function(sources), all of one type."""
    target, *sources = operands(machine, ins, dtype or type_of(ins))
    if isinstance(function, np.ufunc):  # writes only where the mask is set; twice as fast
        return lambda mask: function(*sources, target, where=mask)
    return lambda mask: put(target, function(*sources), mask)
