"""The operators of this package in the emulator: their Triton kernels on CPU tensors, with the tiles of an architecture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...kernels import use_backend
from ...kernels.tiles import Hardware
from ..gpu.launches import kernels_on_cpu_tensors
from . import Emulation, emulate


@contextmanager
def emulated(architecture: str, multiprocessors: int = 2, **options: Any) -> Iterator[Emulation]:
    """Within it `fusedgpt.kernels` runs what Triton compiles for an architecture; float64 takes the reference.

    Args:
        architecture: such as "sm_90"; decides tiles and code.
        multiprocessors: how many the launchers count on: few, so that small inputs fill them.
        options: of `emulate`.
    """
    where = Hardware(architecture, multiprocessors)
    with kernels_on_cpu_tensors(where), use_backend("auto"), emulate(architecture, **options) as emulation:
        yield emulation
