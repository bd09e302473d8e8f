"""Peers counted in the emulator, like our operators: launches by direction, and what they leave to PyTorch's library."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import driver

from ....kernels.examples import Example, as_tuple, draw
from ...emulator import Emulation, emulate
from ...ops.harness import BACKWARD, BOTH, FORWARD
from ...traffic import Traffic
from ..measure import UNCOMPUTED, Case, Measured, inputs
from ..work import work_of
from . import inductor
from .gpu import pretended, tensors_on_gpu
from .table import TABLE, Setting


def measure_peer(package: str, case: Case, architecture: str, clones: Path | None = None) -> list[Measured]:
    """Count a package's implementation of an operator, forward and backward, as `counts.measure` counts ours.

    Args:
        package: a key of `TABLE`.
        clones: a folder with clones of repositories, for kernels that no package installs.

    Returns:
        Nothing where the package has no such operator.

    Raises:
        ModuleNotFoundError, FileNotFoundError: the package or the clone is not there; anything that its own code raises.
        EmulatorError: a kernel does what a GPU would stop at.
    """
    load = TABLE[package].get(case.name)
    if load is None:
        return []
    tensors = list(arguments(case.example).values())
    with emulate(architecture):
        try:
            peer = load(Setting(case, tensors, architecture, clones))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error}; pip install {package}") from error
    tensors = list(arguments(case.example, peer.random, peer.dtype).values())
    with (
        emulate(architecture, timing="late", count=peer.programs) as emulation,
        on_gpu(emulation),
        Traffic(UNCOMPUTED) as traffic,
    ):
        outputs = [y for y in as_tuple(peer.call(*tensors)) if y.requires_grad]
        launched, called = len(emulation.counts), len(traffic.operations)
        incoming = [torch.ones_like(y) for y in outputs]
        del traffic.operations[called:]  # no work of the operator's
        torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], incoming)
    works = [work_of(counts, architecture) for counts in emulation.counts]
    directions = {
        FORWARD: (works[:launched], traffic.operations[:called]),
        BACKWARD: (works[launched:], traffic.operations[called:]),
    }
    if case.example.operator == "linear_cross_entropy":
        directions = {BOTH: (works, traffic.operations)}
    return [
        Measured(case.name, case.sizes, direction, peer.name, some, operations)
        for direction, (some, operations) in directions.items()
    ]


def arguments(
    example: Example, random: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """What peers take, in the example's order: all of one dtype, and no seed.

    Without dropout no bias of x either: their matmul before it adds that, in its epilogue.
    """
    tensors = draw(example, "cpu", dtype) if random else inputs(example)
    without = {"seed"} if "seed" in example.integers else {"x_bias"}
    names = [n for n in (*example.activations, *example.parameters, *example.integers) if n not in without]
    return {
        n: tensors[n].detach().to(dtype).requires_grad_() if tensors[n].is_floating_point() else tensors[n]
        for n in names
    }


@contextmanager
def on_gpu(emulation: Emulation) -> Iterator[None]:
    """Within it peers launch their kernels as on a GPU of the emulation's architecture.

    Where they would time configurations of a kernel, one that executes the fewest instructions is taken if the emulation counts, and the first
    if it does not.
    """
    order = itertools.count()

    def instructions(launch: Callable[[], None], **_: Any) -> float:
        """In place of the time of a configuration."""
        if emulation.count is None:
            return next(order)
        before = len(emulation.counts)
        launch()
        found = sum(counts.scale * counts.executed.total() for counts in emulation.counts[before:])
        del emulation.counts[before:]
        return found

    with (
        pretended(emulation.architecture),
        tensors_on_gpu(),
        inductor.launching(instructions),
        mock.patch.object(driver.active, "get_benchmarker", return_value=instructions),
        torch.compiler.set_stance("force_eager"),
    ):
        yield
