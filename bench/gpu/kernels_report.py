"""Every kernel at every tile row, compiled without a GPU: what the compilers report for each architecture.

    python -m fusedgpt.bench kernels-report [--json FILE] [--architecture sm_90 ...] [--kernel WORD]

Compiled is what the launchers launch for `examples.compiled`, forward and backward, and for the matmuls that the tile
sweep tries. Prints registers, spilled bytes, stack, shared memory, instruction counts and warnings; exits with 1 where
a kernel breaks one of `faults`. Registers and spills come from `ptxas -v` (NVIDIA) and from the metadata in the
assembly (AMD). A process under TRITON_INTERPRET=1 cannot compile.
"""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...kernels._triton import INTERPRETED
from ...kernels.examples import Example, compiled, draw, gelu_mlp, results
from ...kernels.selfcheck import ptxas_version
from ..tiles.candidates import TABLES, in_table
from .launches import ARCHITECTURES, Launch, caught, kernels, rows
from .pipelines import copies
from .wgmma_hazards import hazards

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Row(NamedTuple):
    case: str
    kernel: str
    architecture: str
    registers: int  # a thread; on AMD vector registers
    spilled: int  # bytes a thread written to memory for want of registers
    stack: int  # bytes a thread
    shared: int  # bytes a program
    instructions: int  # in the binary, all paths and loops counted once
    per_element: float | None  # of the above, for kernels over tiles of rows: each thread's share of the tile
    matrix: int  # matrix multiply-accumulate instructions
    special: int  # instructions of the special-function unit: exp2, tanh, reciprocal, square root
    resident: int  # programs that a multiprocessor's registers and shared memory have room for at once
    programs: int  # persistent programs that the table asks for; 0: not persistent
    stages: int  # that the table asks for; 0 on AMD, where a stage is registers
    pipelined: int  # copies that a loop issues for a later iteration, see `pipelines.py`
    exposed: int  # of these, copies that are awaited with no work since their issue
    hazard: str  # an overwritten register of a wgmma in flight, see `wgmma_hazards.py`
    warnings: str


def faults(row: Row) -> list[str]:
    """What makes a kernel unfit for a table."""
    found = []
    if row.spilled:
        found.append(f"spills {row.spilled} bytes")
    if "serialized" in row.warnings:
        found.append("matrix instructions are serialized")
    if row.shared > (limit := ARCHITECTURES[row.architecture][3]):
        found.append(f"takes {row.shared} bytes of shared memory of {limit}")
    if row.stages > 1 and not row.pipelined:
        found.append(f"asks for {row.stages} stages, and no loop is pipelined")
    if row.exposed:
        found.append(f"waits at once for {row.exposed} of {row.pipelined} copies of its pipelined loops")
    if row.hazard:
        found.append(row.hazard)
    if row.programs > row.resident:
        found.append(f"{row.programs} persistent programs where {row.resident} are resident")
    return found


def launches(architecture: str) -> dict[str, Launch]:
    """All variants that an architecture launches, each once, by a name that says what for."""
    found: dict[str, Launch] = {}
    seen = set()
    for example, dtype, title in _examples(architecture):
        with caught(architecture) as launched:
            results(example, draw(example, "cpu", dtype, torch.float32))
        for launch in launched:
            if launch.key in seen:
                continue
            seen.add(launch.key)
            name = f"{title} {launch.kernel.removesuffix('_kernel')}"
            again = sum(other.partition(" #")[0] == name for other in found)  # other options, in the backward
            found[f"{name} #{again + 1}" if again else name] = launch
    return found


def _examples(architecture: str) -> Iterator[tuple[Example, torch.dtype, str]]:
    for example, dtype in compiled():
        yield example, dtype, f"{example.operator} {example.size} {DTYPES[dtype]}"
    for table in ("MLP_UP", "MLP_DOWN_GRADIENT"):
        sweep, columns = TABLES[table], 768
        for tile in sweep.candidates(columns, architecture):
            for approximate in ("tanh", "none") if tile.rows else ():  # 0: the library's
                example = gelu_mlp(300, columns, b_proj=None, approximate=approximate)
                with in_table(sweep.table, architecture, tile):
                    yield example, torch.bfloat16, f"gelu_mlp {example.size} bf16 {tile.rows} x {tile.block}"


def measure(name: str, architecture: str, launch: Launch) -> Row:
    """Compile a variant; Triton's cache makes a second time fast."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, lanes, most = ARCHITECTURES[architecture]
    kernel = getattr(import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    binary = triton.compile(source, target=GPUTarget(backend, arch, lanes), options=launch.options)
    measured = _amd(binary.asm["amdgcn"]) if isinstance(arch, str) else _nvidia(binary.asm, arch)
    registers = -(-measured["registers"] // 8) * 8  # handed out by eights
    # registers of a multiprocessor: 64 Ki; of each of an AMD compute unit's four SIMDs: 512 a lane
    warps = 4 * (512 // registers) if isinstance(arch, str) else 65_536 // (registers * lanes)
    # shared memory: NVIDIA sets aside 1 KiB for each program, out of one more than a program may take
    reserved = 0 if isinstance(arch, str) else 1024
    per_program = launch.options["num_warps"]
    elements = launch.elements / (per_program * lanes)
    return Row(
        case=name,
        kernel=launch.kernel,
        architecture=architecture,
        shared=binary.metadata.shared,
        resident=min(warps // per_program, (most + reserved) // max(binary.metadata.shared + reserved, 1)),
        programs=launch.row.tile.programs if launch.row else 0,
        stages=launch.row.tile.stages if launch.row and backend == "cuda" else 0,
        per_element=round(measured["instructions"] / elements, 1),
        **measured,
    )


def _nvidia(asm: dict[str, Any], arch: int) -> dict[str, Any]:
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(asm["ptx"])
        cubin.write_bytes(asm["cubin"])
        target = f"--gpu-name={sm_arch_from_capability(arch)}"
        log = _run(get_ptxas(arch).path, "-v", target, ptx, "-o", "/dev/null").stderr
        sass = _run(knobs.nvidia.cuobjdump.path, "-sass", cubin).stdout
    pipelined, exposed = copies(asm["ttgir"])
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?(?!NOP)([A-Z][A-Z0-9_.]*)", sass)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spilled": _number(r"(\d+) bytes spill stores", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "instructions": len(opcodes),
        "matrix": sum(op.startswith(("HMMA", "HGMMA", "IMMA", "UTCHMMA", "UTCQMMA")) for op in opcodes),
        "special": sum(op.startswith("MUFU") for op in opcodes),
        "pipelined": pipelined,
        "exposed": exposed,
        "hazard": next(iter(hazards(sass)), ""),
        "warnings": " ".join(
            line.strip() for line in log.splitlines() if "warning" in line.lower() or "serialized" in line
        ),
    }


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True)


def _amd(asm: str) -> dict[str, Any]:
    opcodes = re.findall(r"^\t([vs]_\w+|ds_\w+|buffer_\w+|global_\w+)", asm, re.MULTILINE)
    special = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", asm),
        "spilled": 4
        * (_number(r"\.vgpr_spill_count:\s+(\d+)", asm) + _number(r"\.sgpr_spill_count:\s+(\d+)", asm)),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", asm),
        "instructions": len(opcodes),
        "matrix": sum(op.startswith("v_mfma") for op in opcodes),
        "special": sum(op.startswith(special) for op in opcodes),
        "pipelined": 0,
        "exposed": 0,
        "hazard": "",
        "warnings": "",
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}")
    return int(found[1])


def report(architectures: Iterable[str], word: str = "") -> tuple[list[Row], list[str]]:
    """The variants whose name contains `word`, compiled on all cores, and what is wrong."""
    found = {architecture: launches(architecture) for architecture in architectures}
    jobs = [
        (name, architecture, launch)
        for architecture, named in found.items()
        for name, launch in named.items()
        if word in name
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(measure, *zip(*jobs, strict=True), chunksize=4))
    wrong = [f"{row.architecture} {row.case}: {', '.join(faults(row))}" for row in rows if faults(row)]
    return rows, wrong + list(uncovered(found))


def uncovered(found: dict[str, dict[str, Launch]]) -> Iterator[str]:
    """What no example launches: a row of a table and, of launches for all architectures, a kernel."""
    for architecture, named in found.items():
        used = {launch.row for launch in named.values()}
        for row in rows(architecture) - used:
            yield f"{architecture} {row.table}, {row.architecture}: no example takes {row.tile}"
    if found.keys() == ARCHITECTURES.keys():
        launched = {(launch.module, launch.kernel) for named in found.values() for launch in named.values()}
        for module, kernel in sorted(kernels() - launched):
            yield f"{module}.{kernel}: no example launches it"


def versions() -> dict[str, str]:
    import triton

    found = {f"ptxas {name}": ptxas_version(name) for name in ARCHITECTURES}
    return {"triton": triton.__version__, **{name: version for name, version in found.items() if version}}


def run_kernels_report(
    json_file: Path | None = None, architectures: Iterable[str] = ARCHITECTURES, word: str = ""
) -> int:
    """Print the table, and write it as JSON where a file is given; 1 where something is wrong, else 0.

    Raises:
        ValueError: in a process whose kernels are interpreted.
    """
    if INTERPRETED:
        raise ValueError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    print(" · ".join(f"{name} {version}" for name, version in versions().items()))
    rows, wrong = report(architectures, word)
    print_table(rows)
    print("\n".join(wrong) or "no faults")
    if json_file:
        content = {"versions": versions(), "faults": wrong, "kernels": [row._asdict() for row in rows]}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if wrong else 0


def print_table(rows: list[Row]) -> None:
    heads = (
        "arch",
        "case",
        "regs",
        "spill",
        "stack",
        "shared",
        "instr",
        "/elem",
        "matrix",
        "special",
        "resident",
        "programs",
        "stages",
        "copies",
        "exposed",
        "",
    )
    lines = [(row.architecture, row.case, *row[3:-2], row.hazard or row.warnings) for row in rows]
    widths = [max(len(str(line[i])) for line in [heads, *lines]) for i in range(len(heads))]
    for line in [heads, *lines]:
        left = [str(cell).ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [str(cell).rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(left + right).rstrip())
