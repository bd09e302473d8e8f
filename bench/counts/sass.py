"""How often each machine instruction of a kernel is executed, from how often its PTX was.

The emulator counts PTX, a GPU issues SASS, which ptxas makes of it: other instructions, and other numbers of them. ptxas keeps a line number
for each, so the PTX is compiled once more with a line number at each of its own instructions. The executions of a basic block of
SASS are then those of the PTX lines that most of its instructions came from: an instruction that was moved out of a loop counts with its neighbours there.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..emulator.counting import LaunchCounts
from ..emulator.ptx import Module, parse

_LINE = re.compile(r'//## File ".*?", line (\d+)')
_LABEL = re.compile(r"^\s*\.L_x?\w*:")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)")
_ENDS_BLOCK = ("BRA", "EXIT", "BRX", "JMP", "RET", "CALL", "BRXU", "JMX")


class Sass(NamedTuple):
    """A compiled kernel."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    blocks: list[list[tuple[str, int]]]  # (opcode, PTX line) of each instruction


def executions(counts: LaunchCounts, architecture: str) -> Counter[str]:
    """Warp instructions that the programs of a launch executed, by opcode of the SASS without its modifiers."""
    by_line = {ins.line: counts.executed[ins.index] for ins in module_of(counts.ptx).code}
    found: Counter[str] = Counter()
    for block in compiled(counts.ptx, architecture).blocks:
        times = Counter(by_line.get(line, 0) for _, line in block)
        often = max(times, key=lambda n: (times[n], n))
        for opcode, _ in block:
            found[opcode] += often
    return found


@lru_cache(maxsize=64)
def module_of(ptx: str) -> Module:
    return parse(ptx)


@lru_cache(maxsize=64)
def compiled(ptx: str, architecture: str) -> Sass:
    """Compile PTX with Triton's ptxas and disassemble it.

    Raises:
        subprocess.CalledProcessError: ptxas or nvdisasm fails.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    number = int(architecture.removeprefix("sm_"))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text("\n".join(_with_line_numbers(ptx)))
        target = f"--gpu-name={sm_arch_from_capability(number)}"
        log = _run(get_ptxas(number).path, "-v", "-lineinfo", target, source, "-o", cubin).stderr
        listing = _run(knobs.nvidia.nvdisasm.path, "-g", cubin).stdout
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spilled is None:
        raise ValueError(f"ptxas does not say how many registers it used: {log}")
    return Sass(int(registers[1]), int(spilled[1]), list(_blocks(listing)))


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)


def _with_line_numbers(ptx: str) -> Iterator[str]:
    """The PTX with a .loc at every line of code, which names that line."""
    starts = {ins.line for ins in module_of(ptx).code}
    for number, line in enumerate(ptx.splitlines(), 1):
        text = line.strip()
        if text.startswith(".section"):  # debug information to the end
            return
        if number in starts:
            yield f"\t.loc 1 {number} 0"
        if text.startswith(".target"):
            yield line.replace(", debug", "")
        elif text.startswith(".address_size"):
            yield f'{line}\n\t.file 1 "kernel.ptx"'
        elif not text.startswith((".loc", ".file")):
            yield line


def _blocks(listing: str) -> Iterator[list[tuple[str, int]]]:
    """Basic blocks of the code in nvdisasm's listing."""
    block: list[tuple[str, int]] = []
    line = 0
    code = listing[listing.index("\n.text.") :]
    for text in code.splitlines():
        if found := _LINE.search(text):
            line = int(found[1])
        elif _LABEL.match(text) and block:
            yield block
            block = []
        elif found := _INSTRUCTION.match(text):
            opcode = found[2].split(".")[0]
            block.append((opcode, line))
            if opcode in _ENDS_BLOCK:
                yield block
                block = []
    if block:
        yield block
