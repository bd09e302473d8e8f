"""Does SASS overwrite a register that a wgmma in flight still reads or adds to?

A wgmma is asynchronous: its A operand, where that is in registers, and its accumulators are its own from the HGMMA until a
WARPGROUP.DEPBAR that waits for its group (PTX ISA, "Asynchronous Warpgroup Level Matrix"). ptxas allocates registers and has
to keep other instructions off them; before 13.3 it can fail to (Triton issue 9433), and the result is wrong in silence.

Every path is followed, with the groups in flight on it. HGMMAs run in order, so one never disturbs another.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
_NO_RESULT = (
    "BAR",
    "WARPSYNC",
    "BRX",
    "JMX",
    "RET",
    "CALL",
    "NANOSLEEP",
    "R2P",
    "PLOP3",
)  # though an R may come first
MOST = 8  # groups in flight that are followed; older ones are long complete

Groups = tuple[tuple[int, ...], ...]  # HGMMAs by their index; oldest group first, the open one last


class _Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    operands: list[str]

    @property
    def leaves(self) -> bool:
        """Whether the next instruction never follows; a branch may have its condition as an operand."""
        always = not self.predicated and len(self.operands) == 1
        return self.opcode.startswith(("BRA", "EXIT", "RET")) and always

    @property
    def written(self) -> range:
        """The registers that it writes before the next instruction starts."""
        name, *modifiers = self.opcode.split(".")
        results = [operand for operand in self.operands if not re.fullmatch(r"!?U?P[T\d]", operand)]
        if "SETP" in name or name in _NO_RESULT or name == "HGMMA":
            return range(0)
        return _registers(results[0], _width(name, modifiers)) if results else range(0)


class _Matmul(NamedTuple):
    address: int
    a: range
    accumulators: range


def hazards(sass: str) -> list[str]:
    """Each instruction that overwrites a register of a wgmma in flight, as a sentence, by address.

    Args:
        sass: of one kernel, as `cuobjdump -sass` prints it.
    """
    program = [
        _Instruction(int(address, 16), bool(predicate), opcode, [x.strip() for x in operands.split(",")])
        for address, predicate, opcode, operands in _LINE.findall(sass)
    ]
    index = {instruction.address: i for i, instruction in enumerate(program)}
    matmuls = {i: _matmul(each) for i, each in enumerate(program) if each.opcode.startswith("HGMMA")}
    found: dict[int, str] = {}
    paths: list[tuple[int, Groups]] = [(0, ((),))] if matmuls else []
    seen: set[tuple[int, Groups]] = set()
    while paths:
        i, groups = paths.pop()
        while i < len(program) and (i, groups) not in seen:
            seen.add((i, groups))
            instruction = program[i]
            if sentence := _overwritten(instruction, [matmuls[j] for group in groups for j in group]):
                found[instruction.address] = sentence
            groups = _after(instruction, i, groups)
            target = re.search(r"0x([0-9a-f]+)", instruction.operands[-1])
            if instruction.opcode.startswith("BRA") and target:
                paths.append((index[int(target[1], 16)], groups))
            if instruction.leaves:
                break
            i += 1
    return [found[address] for address in sorted(found)]


def _matmul(instruction: _Instruction) -> _Matmul:
    """HGMMA.64xNxK accumulators, A, B, accumulators: N / 2 accumulators a thread in float32, four registers of A."""
    accumulators, a, *_ = instruction.operands
    shape = re.search(r"\.64x(\d+)x\d+\.(F16|F32)", instruction.opcode)
    assert shape is not None, instruction.opcode
    count = int(shape[1]) // (2 if shape[2] == "F32" else 4)
    return _Matmul(instruction.address, _registers(a, 4), _registers(accumulators, count))


def _after(instruction: _Instruction, i: int, groups: Groups) -> Groups:
    """The groups in flight after an instruction."""
    *closed, open_group = groups
    if instruction.opcode.startswith("HGMMA"):
        closed, open_group = [*closed], (*open_group, i)
        if "gsb0" in instruction.operands:
            closed, open_group = [*closed, open_group], ()
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        left = int(instruction.operands[-1], 16)
        closed = closed[len(closed) - left :] if left else []
    return (*closed[-MOST:], open_group)


def _overwritten(instruction: _Instruction, in_flight: list[_Matmul]) -> str | None:
    written = instruction.written
    for matmul in in_flight:
        for kept, what in ((matmul.a, "A"), (matmul.accumulators, "its accumulators")):
            both = [register for register in written if register in kept]
            if both:
                return (
                    f"{instruction.opcode} at {instruction.address:#x} overwrites R{both[0]}, "
                    f"of {what} of the wgmma in flight at {matmul.address:#x}"
                )
    return None


def _registers(operand: str, count: int) -> range:
    first = re.match(r"R(\d+)", operand)
    return range(int(first[1]), int(first[1]) + count) if first else range(0)


def _width(name: str, modifiers: list[str]) -> int:
    """How many registers an instruction writes."""
    if name == "LDSM":
        return int(modifiers[-1]) if modifiers[-1].isdecimal() else 1
    if name in ("HMMA", "IMMA"):
        return 2 if modifiers[1:2] == ["F16"] else 4
    if "128" in modifiers:
        return 4
    wide = "64" in modifiers or "WIDE" in modifiers or (name == "CS2R" and "32" not in modifiers)
    return 2 if wide or name in ("DADD", "DMUL", "DFMA") else 1
