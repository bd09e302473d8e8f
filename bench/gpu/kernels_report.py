"""Every kernel at every tile row, compiled without a GPU: what the compilers say it costs on each architecture.

    python -m fusedgpt.bench.gpu.kernels_report [--json FILE] [--architecture sm_90 ...] [--kernel WORD]

Prints registers, spilled bytes, stack, shared memory, instruction counts and warnings; exits with 1 where a kernel
breaks one of `faults`. Registers and spills come from `ptxas -v` (NVIDIA) and from the metadata in the assembly (AMD).
A process under TRITON_INTERPRET=1 cannot compile.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from ...kernels._triton import INTERPRETED
from ...kernels.selfcheck import ptxas_version
from ...kernels.tiles import Case

# A file with kernels joins here and lists its cases in `compile_cases`.
SOURCES = [
    import_module(f"...kernels.ops.{name}", __package__)
    for name in (
        "dropout",
        "layer_norm.backward",
        "attention.backward",
        "column_sum",
        "embedding_kernels",
        "mlp.gelu",
        "mlp.fused_matmul",
        "cross_entropy_kernels",
        "attention.backward_one_pass",
    )
]

# name: (Triton's backend, its architecture, lanes of a warp, bytes of shared memory a program may take)
ARCHITECTURES: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}


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
    if row.programs > row.resident:
        found.append(f"{row.programs} persistent programs where {row.resident} are resident")
    return found


def cases(architecture: str) -> list[Case]:
    return [case for source in SOURCES for case in source.compile_cases(architecture)]


def uncovered(architecture: str) -> set[str]:
    """Kernels (`*_kernel`) that no case compiles, of the sources that have any case for the architecture."""
    sources = [source for source in SOURCES if source.compile_cases(architecture)]
    kernels = {name for source in sources for name in vars(source) if name.endswith("_kernel")}
    return kernels - {case.kernel.__name__ for case in cases(architecture)}


def compile_case(case: Case, architecture: str) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, lanes, most = ARCHITECTURES[architecture]
    names = case.kernel.arg_names
    missing = set(names) ^ set(case.arguments)
    if missing:
        raise ValueError(f"{case.name}: the case and {case.kernel.__name__} differ in {sorted(missing)}")
    types = {name: case.arguments[name] for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if isinstance(kind, str) and (kind.startswith("*") or kind.endswith(":16"))
    }
    source = ASTSource(
        case.kernel,
        signature={
            name: kind.removesuffix(":16") if isinstance(kind, str) else "constexpr"
            for name, kind in types.items()
        },
        constexprs={name: kind for name, kind in types.items() if not isinstance(kind, str)},
        attrs=aligned,
    )
    options = {"num_warps": case.tile.warps}
    compiled = triton.compile(source, target=GPUTarget(backend, arch, lanes), options=options)
    measured = _amd(compiled.asm["amdgcn"]) if isinstance(arch, str) else _nvidia(compiled.asm, arch)
    registers = -(-measured["registers"] // 8) * 8  # handed out by eights
    # registers of a multiprocessor: 64 Ki; of each of an AMD compute unit's four SIMDs: 512 a lane
    warps = 4 * (512 // registers) if isinstance(arch, str) else 65_536 // (registers * lanes)
    # shared memory: NVIDIA sets aside 1 KiB for each program, out of one more than a program may take
    reserved = 0 if isinstance(arch, str) else 1024
    room = most + reserved
    elements = case.tile.rows * case.tile.block / (case.tile.warps * lanes)
    return Row(
        case=case.name,
        kernel=case.kernel.__name__,
        architecture=architecture,
        shared=compiled.metadata.shared,
        resident=min(warps // case.tile.warps, room // max(compiled.metadata.shared + reserved, 1)),
        programs=case.tile.programs,
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
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?(?!NOP)([A-Z][A-Z0-9_.]*)", sass)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spilled": _number(r"(\d+) bytes spill stores", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "instructions": len(opcodes),
        "matrix": sum(op.startswith(("HMMA", "HGMMA", "IMMA", "UTCHMMA", "UTCQMMA")) for op in opcodes),
        "special": sum(op.startswith("MUFU") for op in opcodes),
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
        "warnings": "",
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}")
    return int(found[1])


def report(architectures: Iterable[str], word: str = "") -> list[Row]:
    """Compile the cases whose name contains `word`, on all cores; Triton's cache makes a second time fast."""
    jobs = [(case.name, name) for name in architectures for case in cases(name) if word in case.name]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_named, *zip(*jobs, strict=True), chunksize=4))


def _compile_named(name: str, architecture: str) -> Row:
    case = next(case for case in cases(architecture) if case.name == name)
    return compile_case(case, architecture)


def versions() -> dict[str, str]:
    import triton

    found = {f"ptxas {name}": ptxas_version(name) for name in ARCHITECTURES}
    return {"triton": triton.__version__, **{name: version for name, version in found.items() if version}}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernel", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    if INTERPRETED:
        print("error: kernels cannot be compiled under TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    print(" · ".join(f"{name} {version}" for name, version in versions().items()))
    rows = report(options.architecture, options.kernel)
    print_table(rows)
    wrong = [f"{row.architecture} {row.case}: {', '.join(faults(row))}" for row in rows if faults(row)]
    for name in options.architecture:
        wrong += [f"{name} {kernel}: no table row covers it" for kernel in sorted(uncovered(name))]
    print("\n".join(wrong) or "no faults")
    if options.json:
        content = {"versions": versions(), "faults": wrong, "kernels": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
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
        "",
    )
    lines = [(row.architecture, row.case, *row[3:]) for row in rows]
    widths = [max(len(str(line[i])) for line in [heads, *lines]) for i in range(len(heads))]
    for line in [heads, *lines]:
        left = [str(cell).ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [str(cell).rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(left + right).rstrip())


if __name__ == "__main__":
    sys.exit(main())
