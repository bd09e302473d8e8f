"""PTX as data: one entry function with its parameters, registers, shared arrays, labels and instructions.

Names are those of the PTX ISA (NVIDIA, "PTX ISA 9.0"); it parses what Triton emits. Sections: 4.4 (identifiers and constants), 5.2 (types),
6.4 (operands), 7.1 (functions), 11.1 (directives).
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from .threads import Unsupported

# Register files by width: predicates, 16, 32 and 64 bits. `h` and `w` are a half and a word, `d` a double word.
FILES = {"pred": "p"}
FILES |= dict.fromkeys(("b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16"), "h")
FILES |= dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), "w")
FILES |= dict.fromkeys(("b64", "u64", "s64", "f64"), "d")
SIZE = {"8": 1, "16": 2, "32": 4, "64": 8}
WRITES_NOTHING = frozenset(
    (
        "st",
        "bra",
        "cp",
        "mbarrier",
        "bar",
        "barrier",
        "stmatrix",
        "fence",
        "red",
        "wgmma",
        "prefetch",
        "ret",
        "exit",
        "membar",
    )
)


class Reg(NamedTuple):
    file: str  # a value of FILES
    number: int


class Imm(NamedTuple):
    text: str


class Sym(NamedTuple):
    """A parameter, a shared array, a special register, or the sink `_`."""

    name: str
    offset: int = 0


class Vec(NamedTuple):
    items: tuple[Any, ...]


class Mem(NamedTuple):
    """An address in brackets; coordinates are those of a tensor map."""

    base: Any  # Reg, Sym or Imm
    offset: int
    coordinates: tuple[Any, ...] = ()


class Pair(NamedTuple):
    """Two destinations, `a|b`."""

    first: Any
    second: Any


class Not(NamedTuple):
    reg: Reg


@dataclass(eq=False)
class Instruction:
    op: str
    args: list[Any]  # a branch's is the name of its label
    pred: Reg | Not | None
    line: int  # in the PTX, from 1
    source: str  # the place in the kernel's Python file
    text: str
    index: int  # in Module.code
    parts: list[str] = field(init=False)  # of op, between its dots

    def __post_init__(self) -> None:
        self.parts = self.op.split(".")

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]

    @property
    def control(self) -> bool:
        """True where threads may part, wait or end: it closes a basic block."""
        second = self.parts[1] if len(self.parts) > 1 else ""
        return (
            self.name in ("bra", "ret", "exit")
            or (self.name in ("bar", "barrier") and second != "warp")
            or (self.name == "mbarrier" and second in ("try_wait", "test_wait"))
            or self.multiplies
        )

    @property
    def multiplies(self) -> bool:
        return self.op.startswith("wgmma.mma_async")

    @cached_property
    def touched(self) -> tuple[frozenset[Reg], frozenset[Reg]]:
        """The registers that it reads and those that it writes."""
        reads, writes = set(registers(self.pred)), set[Reg]()
        for i, argument in enumerate(self.args):
            is_target = i == 0 and self.name not in WRITES_NOTHING and not isinstance(argument, Mem)
            (writes if is_target else reads).update(registers(argument))
        if self.multiplies:
            writes.update(registers(self.args[0]))
        if self.op.startswith(("mbarrier.try_wait", "mbarrier.test_wait")):
            writes.update(registers(self.args[0]))
        return frozenset(reads), frozenset(writes)


def registers(operand: Any) -> list[Reg]:
    if isinstance(operand, Reg):
        return [operand]
    if isinstance(operand, Not):
        return [operand.reg]
    if isinstance(operand, Vec):
        return [r for item in operand.items for r in registers(item)]
    if isinstance(operand, Pair):
        return [*registers(operand.first), *registers(operand.second)]
    if isinstance(operand, Mem):
        return [*registers(operand.base), *(r for c in operand.coordinates for r in registers(c))]
    return []


@dataclass
class Module:
    name: str  # of the entry function
    target: str
    threads: int  # of a CTA, 0 where it is not declared
    parameters: dict[str, tuple[int, int]]  # name: (offset, bytes)
    parameter_bytes: int
    registers: dict[str, int]  # file: how many
    shared: dict[str, tuple[int, int]]  # static arrays, name: (offset, bytes)
    shared_bytes: int
    code: list[Instruction]
    labels: dict[str, int]  # name: index of the instruction behind it


def parse(ptx: str) -> Module:
    """Parse a PTX module.

    Raises:
        Unsupported: it has more than one function.
    """
    return _Parser(ptx).module


_PARAMETER = r"\.param\s+(?:\.align\s+(\d+)\s+)?.*?\.[busf](\d+)\b.*?([\w$]+)(?:\[(\d+)\])?$"
_SHARED = re.compile(r"^\s*\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", re.M)
_STATEMENT = r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$"
_LABEL = re.compile(r"([\w$]+):(?!:)")


class _Parser:
    def __init__(self, ptx: str):
        self.files = dict.fromkeys("phwd", 0)
        self.ranges: dict[str, tuple[str, int]] = {}  # `%r<40>`: prefix: (file, its first index)
        self.scopes: list[dict[str, Any]] = [{}]  # of registers and labels in braces, innermost last
        self.operands: dict[str, Any] = {}
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)", ptx, re.S)
        if entry is None or ptx.count(".entry") > 1 or re.search(r"^\s*(\.visible\s+)?\.func\b", ptx, re.M):
            raise Unsupported("the PTX has more than one function, or none")
        target, threads = re.search(r"\.target\s+(\w+)", ptx), re.search(r"\.(?:req|max)ntid\s+(\d+)", ptx)
        parameters, parameter_bytes = self.parameters(entry[2])
        shared, shared_bytes = {}, 0
        for align, name, size in _SHARED.findall(ptx):
            shared_bytes = _round_up(shared_bytes, int(align))
            shared[name] = (shared_bytes, int(size))
            shared_bytes += int(size)
        lines = ptx.splitlines()
        first = next(i for i in range(ptx[: entry.end()].count("\n"), len(lines)) if lines[i].strip() == "{")
        self.body(lines, first + 1)
        self.module = Module(
            entry[1],
            target[1] if target else "",
            int(threads[1]) if threads else 0,
            parameters,
            parameter_bytes,
            self.files,
            shared,
            shared_bytes,
            self.code,
            self.labels,
        )

    def parameters(self, text: str) -> tuple[dict[str, tuple[int, int]], int]:
        found, end = {}, 0
        for piece in filter(None, (p.strip() for p in text.split(","))):
            align, bits, name, count = _groups(_PARAMETER, piece)
            size = SIZE[bits]
            offset = _round_up(end, int(align or size))
            end = offset + size * int(count or 1)
            found[name] = (offset, end - offset)
        return found, end

    def body(self, lines: list[str], first: int) -> None:
        pending, line, source = "", 0, ""
        for number in range(first, len(lines)):
            code = lines[number].split("//")[0].strip()
            if code.startswith(".loc"):
                source = _location(lines[number], code)
                continue
            if not code:
                continue
            line = line if pending else number + 1
            pending = f"{pending} {code}".strip()
            while pending:
                if pending[0] in "{}":
                    if pending[0] == "{":
                        self.scopes.append({})
                    else:
                        self.scopes.pop()
                        if not self.scopes:
                            return
                    pending = pending[1:].strip()
                elif label := _LABEL.match(pending):
                    self.labels[self.label(label[1])] = len(self.code)
                    pending = pending[label.end() :].strip()
                elif ";" in pending:
                    statement, pending = (t.strip() for t in pending.split(";", 1))
                    if statement:
                        self.statement(statement, line, source)
                    line = number + 1
                else:
                    break

    def label(self, name: str) -> str:
        """The label's name in the whole module; labels in braces are those of inline assembly and come in many copies."""
        if len(self.scopes) == 1 or name.startswith("$L__BB"):
            return name
        return self.scopes[-1].setdefault(name, f"{name}@{len(self.code)}")

    def statement(self, text: str, line: int, source: str) -> None:
        if text.startswith(".reg"):
            return self.declare(text)
        if text.startswith("."):  # .pragma and the like
            return
        negated, pred, op, rest = _groups(_STATEMENT, text)
        guard: Any = self.operand(pred) if pred else None
        if op in ("bra", "bra.uni"):
            args = [self.label(rest.strip())]
        else:
            args = [self.operand(a) for a in _split(rest)]
        self.code.append(
            Instruction(op, args, Not(guard) if negated else guard, line, source, text, len(self.code))
        )

    def declare(self, text: str) -> None:
        kind, names = _groups(r"\.reg\s+\.(\w+)\s+(.*)", text)
        file = FILES[kind]
        for name in (n.strip() for n in names.split(",")):
            many = re.match(r"(%?\w+)<(\d+)>", name)
            if many:
                self.ranges[many[1]] = (file, self.files[file])
            else:
                self.scopes[-1][f"register {name}"] = Reg(file, self.files[file])
            self.files[file] += int(many[2]) if many else 1

    def operand(self, text: str) -> Any:
        text = text.strip()
        if len(self.scopes) > 1:  # a scope may give its own meaning to a name
            return self.parse_operand(text)
        if text not in self.operands:
            self.operands[text] = self.parse_operand(text)
        return self.operands[text]

    def parse_operand(self, text: str) -> Any:
        if text[0] == "{":
            return Vec(tuple(self.operand(x) for x in _split(text[1:-1])))
        if text[0] == "[":
            return self.address(_split(text[1:-1]))
        if text[0] == "!":
            return Not(self.operand(text[1:]))
        if "|" in text:
            return Pair(*(self.operand(x) for x in text.split("|")))
        for scope in reversed(self.scopes):
            if f"register {text}" in scope:
                return scope[f"register {text}"]
        if text[0].isdigit() or text[0] == "-":
            return Imm(text)
        ranged = re.match(r"(%[a-z]+)(\d+)$", text)
        if ranged and ranged[1] in self.ranges:
            file, first = self.ranges[ranged[1]]
            return Reg(file, first + int(ranged[2]))
        name, offset = _groups(r"([\w$%.]+)(?:\s*\+\s*(\d+))?$", text)
        return Sym(name, int(offset or 0))

    def address(self, pieces: list[str]) -> Mem:
        coordinates = self.operand(pieces[1]).items if len(pieces) > 1 else ()
        name, offset = _groups(r"([\w$%.]+?)\s*(?:\+\s*(-?\w+))?$", pieces[0])
        base, shift = self.operand(name), int(offset, 0) if offset else 0
        if isinstance(base, Sym):
            return Mem(Sym(base.name, base.offset + shift), 0, coordinates)
        return Mem(base, shift, coordinates)


def _groups(pattern: str, text: str) -> tuple[Any, ...]:
    found = re.match(pattern, text, re.S)
    if found is None:
        raise Unsupported(f"the PTX {text!r}")
    return found.groups()


def _location(raw: str, code: str) -> str:
    place = re.search(r"//\s*(\S+)", raw)
    inlined = re.search(r"inlined_at\s+\d+\s+(\d+)", code)
    return (place[1] if place else code) + (f" (from line {inlined[1]})" if inlined else "")


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    pieces, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += c
    return [piece.strip() for piece in pieces if piece.strip()]
