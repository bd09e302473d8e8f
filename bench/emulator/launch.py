"""Triton's JIT with an emulated GPU behind it: a driver whose launches run the compiled PTX on CPU tensors.

Specialisation, compilation to PTX, tensor descriptors and launch metadata are Triton's own; ptxas, its launcher in C and the CUDA driver are
replaced. Written for Triton 3.6 to 3.9.
"""

import functools
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import JITFunction

from .counting import LaunchCounts, Sampler
from .global_memory import GlobalMemory, Region
from .machine import Finding, Machine
from .ptx import Module, parse
from .tensor_map import SWIZZLES, TensorMap
from .threads import EmulatorError, Unsupported

# Bytes of shared memory that a CTA may take, by architecture. (CUDA C++ Programming Guide, compute capabilities)
SHARED_MEMORY = {
    **dict.fromkeys(("sm_80", "sm_87"), 163 * 1024),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 * 1024),
    "sm_90": 227 * 1024,
}
GRID_LIMITS = (2**31 - 1, 65535, 65535)
FORMATS = {
    **{
        "i1": "B",
        "i8": "b",
        "i16": "h",
        "i32": "i",
        "i64": "q",
        "u8": "B",
        "u16": "H",
        "u32": "I",
        "u64": "Q",
    },
    **{"fp32": "f", "f32": "f", "fp64": "d", "fp16": "e"},
}
BATCH = 1024  # threads that a machine takes at once, about


@dataclass
class Emulation:
    """What an emulated GPU did. `findings`: the text of each, and how often it was made."""

    architecture: str
    timing: str
    order: str
    seed: int
    edit: Callable[[str, str], str] | None
    count: Sampler | None = None
    findings: dict[str, int] = field(default_factory=dict)
    launches: list[tuple[str, tuple[int, int, int], float]] = field(
        default_factory=list
    )  # kernel, grid, seconds
    covered: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # (kernel, PTX): lines that ran
    counts: list[LaunchCounts] = field(
        default_factory=list, repr=False
    )  # a launch each, where `count` is given
    texts: dict[str, str] = field(default_factory=dict, repr=False)  # of a finding, by its place

    def add(self, finding: Finding) -> None:
        """Count a finding; one at a place, with the details of the first."""
        text = self.texts.setdefault(finding.place, f"{finding.place}: {finding.detail}")
        self.findings[text] = self.findings.get(text, 0) + finding.count


@contextmanager
def emulate(
    architecture: str,
    timing: str = "early",
    order: str = "lockstep",
    seed: int = 0,
    edit: Callable[[str, str], str] | None = None,
    count: Sampler | None = None,
) -> Iterator[Emulation]:
    """Run every Triton launch of this process in the emulator; tensors are on the CPU.

    Args:
        architecture: "sm_80", "sm_86", "sm_87", "sm_89", "sm_90" or "sm_120".
        timing: when asynchronous copies, bulk copies and wgmma take place: "early", when issued, or "late", when waited for.
        order: "lockstep", all warps together, or "random", one warp at a time.
        seed: of the random order.
        edit: takes a kernel's name and its PTX, returns the PTX to run instead.
        count: fill `counts`; takes a kernel's name and its grid, returns the programs to run, or None for all of them. Races in
            global memory are not looked for then.

    Yields:
        the Emulation, whose `findings` name races, missing waits and fences, reads of unwritten shared memory and lanes that disagree.

    Raises:
        ValueError: an unknown option.
        RuntimeError: TRITON_INTERPRET is set.
        EmulatorError: from a launch: an access out of bounds, a deadlock, what the driver would refuse, an instruction that the emulator lacks.
    """
    for name, value, known in (
        ("architecture", architecture, [*SHARED_MEMORY]),
        ("timing", timing, ["early", "late"]),
        ("order", order, ["lockstep", "random"]),
    ):
        if value not in known:
            raise ValueError(f"emulate: {name} {value!r} is not known; it is one of {', '.join(known)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "emulate: TRITON_INTERPRET is set, so that nothing is compiled; start Python without it"
        )
    emulation = Emulation(architecture, timing, order, seed, edit, count)
    driver = triton.runtime.driver
    # apart from the binaries of a GPU: an entry of this cache has no cubin
    cache = Path(triton.knobs.cache.dir) / "emulator"
    cache_before = triton.knobs.cache.dir
    emulated = _Driver(emulation)
    with (
        _forgotten(emulated.device),
        mock.patch.object(CUDABackend, "__init__", _stop_at_ptx(CUDABackend.__init__)),
        mock.patch.object(CUDABackend, "add_stages", _without_cubin(CUDABackend.add_stages)),
        mock.patch.object(driver, "_active", emulated),
    ):
        triton.knobs.cache.dir = str(cache)
        try:
            yield emulation
        finally:
            triton.knobs.cache.dir = cache_before


@contextmanager
def _forgotten(device: str) -> Iterator[None]:
    """At the end, take what kernels keep for a device out of them: nothing else ends an emulation's memory."""
    run, used = JITFunction.run, {}

    @functools.wraps(run)
    def noted(self: JITFunction, *args: Any, **options: Any) -> Any:
        used[id(self)] = self
        return run(self, *args, **options)

    try:
        with mock.patch.object(JITFunction, "run", noted):
            yield
    finally:
        for kernel in used.values():
            kernel.device_caches.pop(device, None)


def _stop_at_ptx(initialise: Callable) -> Callable:
    @functools.wraps(initialise)
    def __init__(self: Any, target: GPUTarget) -> None:
        initialise(self, target)
        self.binary_ext = "ptx"

    return __init__


def _without_cubin(add_stages: Callable) -> Callable:
    @functools.wraps(add_stages)
    def stages_to_ptx(self: Any, stages: dict, *rest: Any) -> None:
        add_stages(self, stages, *rest)
        stages.pop("cubin", None)

    return stages_to_ptx


class _Utilities:
    """What Triton asks of a driver's C module."""

    def __init__(self, emulation: Emulation):
        self.emulation = emulation

    def load_binary(self, name: str, binary: bytes | str, shared: int, device: str) -> tuple:
        ptx = binary.decode() if isinstance(binary, bytes) else binary
        if self.emulation.edit is not None:
            ptx = self.emulation.edit(name, ptx)
        registers, spills, max_threads = 0, 0, 1024
        return None, (name, ptx), registers, spills, max_threads

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: str) -> dict[str, int]:
        shared = SHARED_MEMORY[self.emulation.architecture]
        return {
            "max_shared_mem": shared,
            "multiprocessor_count": 2,
            "max_num_regs": 65536,
            "warpSize": 32,
        }


class _Driver(DriverBase):
    def __init__(self, emulation: Emulation):
        self.emulation = emulation
        self.utils = _Utilities(emulation)
        self.launcher_cls = functools.partial(_Launcher, emulation)
        self.capability = int(emulation.architecture.removeprefix("sm_"))
        # Triton keeps a loaded kernel by device, and its launcher with it: each emulation is a device of its own.
        self.device = f"emulated {emulation.architecture} {id(emulation)}"

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return self.device

    def set_current_device(self, device: str) -> None:
        pass

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise EmulatorError(
            "an emulated GPU measures no time: give the kernel one configuration instead of autotuning"
        )


class _Launcher:
    """One compiled kernel, called at each launch as Triton calls its launcher in C."""

    def __init__(self, emulation: Emulation, source: Any, metadata: Any):
        self.emulation, self.metadata = emulation, metadata
        self.signature = source.signature
        self.divisible = {
            path
            for path, attributes in (getattr(source, "attrs", None) or {}).items()
            if ["tt.divisibility", 16] in [list(a) for a in attributes]
        }

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args) -> None:  # type: ignore[no-untyped-def]
        name, ptx = function
        grid = (x, y, z)
        if 0 in grid:
            return
        module = _module(ptx)
        threads = self.metadata.num_warps * 32
        self.check_limits(name, grid, threads)
        arguments = Arguments(name, self.metadata, self.divisible)
        for i, (label, kind, value) in enumerate(
            zip(self.signature, self.signature.values(), args, strict=True)
        ):
            arguments.add((i,), kind, value, label)
        memory = GlobalMemory(arguments.regions.values())
        began = time.perf_counter()
        emulation = self.emulation
        programs = (emulation.count and emulation.count(name, grid)) or list(
            product(range(x), range(y), range(z))
        )
        counts = None
        if emulation.count is not None:
            counts = LaunchCounts(name, ptx, grid, len(programs), threads, self.metadata.shared)
            emulation.counts.append(counts)
        size = max(BATCH // threads, 1)
        for i in range(0, len(programs), size):
            batch = programs[i : i + size]
            machine = _machine(
                ptx, threads, len(batch), self.metadata.shared, emulation.timing, emulation.order == "random"
            )
            parameters, maps = arguments.pack(module)
            machine.run(batch, grid, parameters, maps, memory, emulation.seed + i, counts)
            self.collect(name, ptx, machine)
        self.emulation.launches.append((name, grid, time.perf_counter() - began))

    def check_limits(self, name: str, grid: tuple[int, int, int], threads: int) -> None:
        """Raise EmulatorError for what the driver would refuse."""
        shared = SHARED_MEMORY[self.emulation.architecture]
        problems = [
            (
                any(n > most for n, most in zip(grid, GRID_LIMITS, strict=True)),
                f"a grid of {grid}; it takes {GRID_LIMITS}",
            ),
            (threads > 1024, f"a CTA of {threads} threads; it takes 1024"),
            (
                self.metadata.shared > shared,
                f"{self.metadata.shared} bytes of shared memory; a CTA has {shared}",
            ),
            (
                getattr(self.metadata, "global_scratch_size", 0) > 0,
                "global scratch memory, which the emulator does not have",
            ),
        ]
        found = [text for wrong, text in problems if wrong]
        if found:
            raise EmulatorError(
                f"{name} cannot be launched on {self.emulation.architecture}: {'; '.join(found)}"
            )

    def collect(self, name: str, ptx: str, machine: Machine) -> None:
        for finding in (*machine.findings.values(), *machine.missing_fences):
            self.emulation.add(finding)
        self.emulation.covered.setdefault((name, ptx), set()).update(machine.covered_lines())


@functools.lru_cache(maxsize=256)
def _module(ptx: str) -> Module:
    return parse(ptx)


@functools.lru_cache(maxsize=40)
def _machine(ptx: str, threads: int, ctas: int, shared: int, timing: str, random_order: bool) -> Machine:
    return Machine(_module(ptx), threads, ctas, shared, timing, random_order)


class Arguments:
    """A launch's arguments as the kernel's parameters, and the memory that they name."""

    def __init__(self, kernel: str, metadata: Any, divisible: set[tuple[int, ...]]):
        self.kernel, self.divisible = kernel, divisible
        self.descriptors = iter(getattr(metadata, "tensordesc_meta", None) or [])
        self.values: list[tuple[str, Any]] = []  # (type, value), in the order of the parameters
        self.regions: dict[int, Region] = {}

    def add(self, path: tuple[int, ...], kind: Any, value: Any, label: str) -> None:
        if isinstance(kind, tuple):
            for i, (k, v) in enumerate(zip(kind, value, strict=True)):
                self.add((*path, i), k, v, f"{label}[{i}]")
        elif kind == "constexpr":
            pass
        elif kind.startswith("tensordesc"):
            self.add_descriptor(value, label)
        elif kind.startswith("*"):
            address = 0 if value is None else value.data_ptr()
            if path in self.divisible and address % 16:
                raise EmulatorError(
                    f"{self.kernel}: the pointer {label} is {address:#x}; the kernel was compiled for a multiple of 16"
                )
            if value is not None:
                self.region(value, label)
            self.values.append(("u64", address))
        else:
            self.values.append((kind, value))

    def region(self, tensor: torch.Tensor, label: str) -> Region | None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return None
        found = self.regions.get(storage.data_ptr())
        if found is None:
            found = self.regions[storage.data_ptr()] = Region(storage.data_ptr(), storage.nbytes(), label)
        elif label not in found.name.split(", "):
            found.name += f", {label}"
        return found

    def add_descriptor(self, descriptor: Any, label: str) -> None:
        base, sizes, strides = descriptor.base, descriptor.shape, descriptor.strides
        region, meta = self.region(base, label), next(self.descriptors, None)
        if (
            meta is None
        ):  # an architecture without bulk copies: the fields, which the kernel makes addresses of
            self.values.append(("u64", base.data_ptr()))
            self.values += [("i64", n) for n in (*sizes, *strides)]
            self.values.append(("i1", descriptor.padding == "nan"))
            self.values.append(("i1", getattr(descriptor, "round_f32_to_tf32", False)))
        else:
            element = meta["elem_size"]
            tensor_map = TensorMap(
                name=label,
                base=base.data_ptr(),
                element=element,
                dtype=str(base.dtype).removeprefix("torch."),
                sizes=[int(n) for n in sizes][::-1],
                strides=[element * int(n) for n in strides][::-1],
                box=list(meta["block_size"])[::-1],
                swizzle=SWIZZLES[meta["swizzle"]],
                nan=descriptor.padding == "nan",
                region=region,
            )
            tensor_map.check()
            self.values.append(("map", tensor_map))
        self.values += [("i32", n) for n in sizes] + [("i64", n) for n in strides]

    def pack(self, module: Module) -> tuple[np.ndarray, dict[int, TensorMap]]:
        """The parameters as bytes, and the tensor maps by their offset in them."""
        values = [*self.values, ("u64", 0), ("u64", 0)]  # scratch memory that no kernel here has
        if len(values) != len(module.parameters):
            raise Unsupported(
                f"{self.kernel}: {len(values)} arguments for the {len(module.parameters)} parameters of its PTX"
            )
        packed, maps = np.zeros(module.parameter_bytes + 64, np.uint8), {}
        for (kind, value), (offset, size) in zip(values, module.parameters.values(), strict=True):
            if kind == "map":
                maps[offset] = value
                continue
            if kind not in FORMATS or struct.calcsize(FORMATS[kind]) != size:
                raise Unsupported(
                    f"{self.kernel}: an argument of type {kind} for a parameter of {size} bytes"
                )
            data = struct.pack("<" + FORMATS[kind], value if FORMATS[kind] in "fde" else int(value))
            packed[offset : offset + size] = np.frombuffer(data, np.uint8)
        return packed, maps
