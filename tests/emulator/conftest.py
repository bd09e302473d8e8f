"""A process of each worker in which kernels are compiled: the tests' own run under TRITON_INTERPRET."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from fusedgpt.bench.emulator.run import processes


@pytest.fixture(scope="session")
def compiling() -> Iterator[ProcessPoolExecutor]:
    """`compiling.submit(function, ...)` calls a function that can be imported in the process that compiles."""
    with processes(1) as pool:
        yield pool
