"""What the launchers launch, caught where Triton would compile it: on CPU tensors, for any architecture, without a GPU.

Nothing runs, so outputs hold whatever was in memory. Not under TRITON_INTERPRET=1.
"""

import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ...kernels import backend, ops, tiles, use_backend
from ...kernels.ops.attention.tile_io import Meta

# name: (Triton's backend, its architecture, lanes of a warp, bytes of shared memory a program may take)
ARCHITECTURES: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 166_912),
    "sm_90": ("cuda", 90, 32, 232_448),
    "sm_100": ("cuda", 100, 32, 232_448),
    "gfx942": ("hip", "gfx942", 64, 65_536),
}
MULTIPROCESSORS = 2  # few, so that small inputs fill them


class Row(NamedTuple):
    """A row of a table in tiles.py, and where it stands."""

    table: str
    architecture: str
    tile: Any


class Launch(NamedTuple):
    """One variant of a kernel, as Triton's compiler is asked for it."""

    module: str
    kernel: str
    signature: dict[str, Any]  # the type of each argument, in order
    constants: dict[tuple[int, ...], Any]  # by position
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    row: Row | None  # whose number of warps it has

    @property
    def key(self) -> str:
        """The same for launches of the same binary."""
        return repr(self[:-1])

    @property
    def elements(self) -> int:
        """How many elements a program's tile has; the kernel takes the tile whole, in a tuple, or size by size."""
        value = {name: self.constants.get((i,)) for i, name in enumerate(self.signature)}
        if "meta" in value:  # attention: queries by keys
            at = list(value).index("meta")
            rows, block = (self.constants[at, Meta._fields.index(name)] for name in ("BLOCK_M", "BLOCK_N"))
            return rows.value * block.value
        if tile := value.get("tile"):
            return tile.rows * tile.block
        return (value.get("ROWS") or 1) * (value.get("BLOCK") or value.get("WIDTH") or 1)


@contextmanager
def caught(architecture: str) -> Iterator[list[Launch]]:
    """Within it the public functions take their kernels for CPU tensors; the list receives every launch."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    launches: list[Launch] = []
    where = tiles.Hardware(architecture, MULTIPROCESSORS)

    class Device:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*ARCHITECTURES[architecture][:3])

        def get_current_device(self) -> str:  # Triton keeps what it learns of a kernel by device
            return architecture

        def get_current_stream(self, device: str) -> int:
            return 0

    def catch(
        kernel: Any,
        key: Any,
        signature: Any,
        device: str,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> None:
        row = getattr(options.num_warps, "row", None)
        asked = {**vars(options), "num_warps": int(options.num_warps)}
        launches.append(
            Launch(kernel.__module__, kernel.__name__, signature, constants, attributes, asked, row)
        )

    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(driver, "_active", Device()))
        stack.enter_context(
            patch(JITFunction, "_do_compile", catch)
        )  # without a result Triton launches nothing
        for name, table in tables().items():
            marked = {
                key: tuple(_marked(Row(name, key, tile)) for tile in rows) for key, rows in table.items()
            }
            stack.enter_context(mock.patch.dict(table, marked))
        stack.enter_context(kernels_on_cpu_tensors(where))
        stack.enter_context(use_backend("triton"))
        yield launches


@contextmanager
def kernels_on_cpu_tensors(where: tiles.Hardware) -> Iterator[None]:
    """Within it the public functions take their kernels for CPU tensors, with the tiles of `where`; not for float64."""

    def obstacle(_: str, x: Tensor, others: tuple[Tensor | None, ...]) -> str | None:
        wide = any(t is not None and t.dtype == torch.float64 for t in (x, *others))
        return "float64 exists in plain PyTorch only" if wide else None

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "_obstacle", obstacle))
        for name, module in list(sys.modules.items()):
            if name.startswith(tiles.__package__ or "") and hasattr(module, "hardware"):
                stack.enter_context(mock.patch.object(module, "hardware", return_value=where))
        yield


class _Warps(int):
    """A row's number of warps, which still knows the row when it arrives in a launch."""

    row: Row


def _marked(row: Row) -> Any:
    warps = _Warps(row.tile.warps)
    warps.row = row
    return row.tile._replace(warps=warps)


def tables() -> dict[str, dict[str, tuple[Any, ...]]]:
    """Every table of tiles.py by name."""
    tables = {
        name: table for name, table in vars(tiles).items() if isinstance(table, dict) and "any" in table
    }
    return {name: table for name, table in tables.items() if isinstance(table["any"], tuple)}


def rows(architecture: str) -> set[Row]:
    """The rows that an architecture reads and that launch something."""
    found = set()
    for name, table in tables().items():
        keys = {architecture if architecture in table else "any"}
        if name.startswith("ATTENTION"):
            keys |= {"float32", tiles.DESCRIPTORS.get(architecture, architecture)}
        found |= {Row(name, key, tile) for key in keys & table.keys() for tile in table[key] if tile.warps}
    return found


def kernels() -> set[tuple[str, str]]:
    """Module and name of every kernel of the operators."""
    modules = [import_module(found.name) for found in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    return {
        (module.__name__, name)
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and kernel.__module__ == module.__name__
    }
