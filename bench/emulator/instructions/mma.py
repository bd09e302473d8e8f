"""Matrix instructions of one warp: mma, ldmatrix, stmatrix. (PTX ISA, 9.7.14)

An element's place in a fragment is that of the ISA's figures for mma.m16n8k16. Products are exact in float32 for 16-bit inputs; sums are
float32 in an order of numpy's, where hardware may keep fewer bits.
"""

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ptx import Instruction, Reg, Vec
from ..threads import Mask, Unsupported
from .loads import addresses, count_access, items
from .table import F16, F32, U16, U32, opcode

if TYPE_CHECKING:
    from ..machine import Machine, Operation

TF32 = U32(0xFFFFE000)  # the bits of a float32 that tf32 keeps
LANE = np.arange(32)


@cache
def fragment(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each (element, lane) of a 16 x columns fragment of 16-bit A, or of a float32 accumulator."""
    rows, cols = [], []
    for block in range(columns // 8):
        for lower in (0, 8):
            for element in range(2):
                rows.append(LANE // 4 + lower)
                cols.append(8 * block + 2 * (LANE % 4) + element)
    return np.array(rows), np.array(cols)


def halves(registers: np.ndarray, kind: str) -> np.ndarray:
    """(registers, n) of two 16-bit floats each to (2 · registers, n) float32."""
    out = np.empty((len(registers), 2, registers.shape[1]), F32)
    if kind == "bf16":
        out.view(U32)[:, 0] = registers << U32(16)
        out.view(U32)[:, 1] = registers & U32(0xFFFF0000)
    else:
        out[:, 0] = (registers & U32(0xFFFF)).astype(U16).view(F16)
        out[:, 1] = (registers >> U32(16)).astype(U16).view(F16)
    return out.reshape(-1, registers.shape[1])


def unpacked(registers: np.ndarray, kind: str) -> np.ndarray:
    return (registers & TF32).view(F32) if kind == "tf32" else halves(registers, kind)


def rows_of(vector: Vec) -> Any:
    """The registers' indices in their file, as a slice where they follow one another."""
    index = [register.number for register in vector.items]
    consecutive = index == list(range(index[0], index[0] + len(index)))
    return slice(index[0], index[-1] + 1) if consecutive else np.array(index)


@cache
def layouts(kind: str, k: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(row, column) of each (element, lane) of A, 16 x k, and of B, k x 8."""
    if kind == "tf32":
        a = [(LANE // 4 + 8 * (i % 2), LANE % 4 + 4 * (i // 2)) for i in range(k // 2)]
        b = [(LANE % 4 + 4 * i, LANE // 4) for i in range(k // 4)]
        return (_stack(a), _stack(b))
    b = [(2 * (LANE % 4) + e + 8 * i, LANE // 4) for i in range(k // 8) for e in range(2)]
    return fragment(k), _stack(b)


def _stack(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = zip(*pairs, strict=True)
    return np.array(rows), np.array(columns)


@opcode("mma")
def multiply(machine: "Machine", ins: Instruction) -> "Operation":
    m, n, k = (int(x) for x in re.search(r"m(\d+)n(\d+)k(\d+)", ins.op).groups())  # type: ignore[union-attr]
    to, kind, other, of = ins.parts[-4:]
    known = kind in ("bf16", "f16", "tf32") and kind == other and to == of == "f32"
    if (m, n) != (16, 8) or "row" not in ins.parts or not known:
        raise Unsupported(ins.op)
    warps, words = machine.threads.warps, machine.registers["w"]
    target, left, right, accumulator = ins.args
    d, a, b = rows_of(target), rows_of(left), rows_of(right)
    in_registers = all(isinstance(x, Reg) for x in accumulator.items)
    c = rows_of(accumulator) if in_registers else None
    constant = None if in_registers else np.stack([machine.source(x, F32) for x in accumulator.items])
    (a_rows, a_columns), (b_rows, b_columns) = layouts(kind, k)
    c_rows, c_columns = fragment(8)
    into_a = np.argsort((a_rows * k + a_columns).ravel())
    into_b = np.argsort((b_rows * 8 + b_columns).ravel())
    out_of_c = (c_rows * 8 + c_columns).ravel()

    def matrices(registers: Any, order: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """(warps, rows, columns) out of fragments."""
        values = unpacked(words[registers], kind)
        by_warp = values.reshape(-1, warps, 32).transpose(1, 0, 2).reshape(warps, -1)
        return by_warp.take(order, 1).reshape(warps, rows, columns)

    def multiply(mask: Mask) -> None:
        product = np.matmul(matrices(a, into_a, 16, k), matrices(b, into_b, k, 8)).reshape(warps, 128)
        out = product.take(out_of_c, 1).reshape(warps, 4, 32).transpose(1, 0, 2).reshape(4, -1)
        out = (out + (words[c].view(F32) if constant is None else constant)).view(U32)
        words[d] = out if mask is True else np.where(mask, out, words[d])

    return multiply


def _matrix_count(ins: Instruction) -> int:
    count = next((p for p in ins.parts if p in ("x1", "x2", "x4")), None)
    if count is None or ins.type != "b16":
        raise Unsupported(ins.op)
    return int(count[1:])


def _transposed(data: np.ndarray, count: int) -> np.ndarray:
    """The 8 x 8 matrices of each warp, transposed; data has 32-bit words of two elements."""
    matrices = np.ascontiguousarray(data).view(U16).reshape(-1, count, 8, 8).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(matrices).view(U32)


def _givers(threads: np.ndarray, count: int) -> np.ndarray:
    """The threads whose addresses count: eight for each matrix."""
    return threads if count == 4 else threads[threads % 32 < 8 * count]


@opcode("ldmatrix")
def load_matrix(machine: "Machine", ins: Instruction) -> "Operation":
    count, trans = _matrix_count(ins), "trans" in ins.parts
    targets = [machine.target(r, U32) for r in items(ins.args[0])]
    address = addresses(machine, ins.args[1], True)

    def load(mask: Mask) -> None:
        threads = machine.threads.chosen(mask)
        givers = _givers(threads, count)
        at = address(givers)
        data = machine.shared.load(ins, at, 4, 4, givers)
        count_access(machine, ins, "load", at, 16, givers)
        data = (_transposed(data, count) if trans else data).reshape(-1, count, 32)
        for i, target in enumerate(targets):
            target[threads] = data[:, i].ravel()

    return load


@opcode("stmatrix")
def store_matrix(machine: "Machine", ins: Instruction) -> "Operation":
    count, trans = _matrix_count(ins), "trans" in ins.parts
    values = [machine.source(r, U32) for r in items(ins.args[1])]
    address = addresses(machine, ins.args[0], True)

    def store(mask: Mask) -> None:
        threads = machine.threads.chosen(mask)
        givers = _givers(threads, count)
        data = np.stack([v[threads].reshape(-1, 32) for v in values], 1)  # (warps, matrices, 32)
        data = (_transposed(data, count) if trans else data).reshape(-1, 4)
        at = address(givers)
        machine.shared.store(ins, at, 4, 4, givers, data)
        count_access(machine, ins, "store", at, 16, givers)

    return store
