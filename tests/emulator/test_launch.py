"""What a launch refuses, as the driver would, and options that `emulate` does not take."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusedgpt.bench.emulator import EmulatorError, emulate
from fusedgpt.bench.emulator.global_memory import Region
from fusedgpt.bench.emulator.launch import Arguments, Emulation, _Launcher
from fusedgpt.bench.emulator.tensor_map import TensorMap


@pytest.mark.parametrize("options", [("sm_100",), ("sm_90", "sometimes"), ("sm_90", "early", "backwards")])
def test_an_unknown_option_names_the_known_ones(options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="it is one of"), emulate(*options):
        pass


def launcher(**metadata: Any) -> _Launcher:
    source = SimpleNamespace(signature={}, attrs={})
    emulation = Emulation("sm_86", "early", "lockstep", 0, None)
    return _Launcher(emulation, source, SimpleNamespace(**{"num_warps": 4, "shared": 0} | metadata))


@pytest.mark.parametrize(
    ("metadata", "grid", "threads", "says"),
    [
        ({}, (1, 65536, 1), 128, "a grid of"),
        ({}, (1, 1, 1), 2048, "a CTA of 2048 threads; it takes 1024"),
        ({"shared": 100 * 1024}, (1, 1, 1), 128, "102400 bytes of shared memory; a CTA has 101376"),
        ({"global_scratch_size": 8}, (1, 1, 1), 128, "global scratch memory"),
    ],
)
def test_limits_of_a_launch(metadata: dict, grid: tuple[int, int, int], threads: int, says: str) -> None:
    launcher().check_limits("kernel", (2**31 - 1, 65535, 65535), 1024)
    with pytest.raises(EmulatorError, match=f"kernel cannot be launched on sm_86: {says}"):
        launcher(**metadata).check_limits("kernel", grid, threads)


def test_a_pointer_that_is_not_aligned_as_the_kernel_was_compiled_for() -> None:
    x = torch.zeros(8)
    Arguments("kernel", None, {(0,)}).add((0,), "*fp32", x, "x")
    Arguments("kernel", None, set()).add((0,), "*fp32", x[1:], "x")
    with pytest.raises(EmulatorError, match="compiled for a multiple of 16"):
        Arguments("kernel", None, {(0,)}).add((0,), "*fp32", x[1:], "x")


GOOD: dict[str, Any] = {
    "base": 0,
    "element": 2,
    "sizes": [64, 8],
    "strides": [2, 128],
    "box": [64, 4],
    "swizzle": 128,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": 8}, "no multiple of 16"),
        ({"strides": [2, 120]}, "the strides"),
        ({"strides": [4, 256]}, "innermost stride is 4"),
        ({"box": [4, 4]}, "a row of the box has 8 bytes, no multiple of 16"),
        ({"box": [64, 512]}, "outside 1 to 256"),
        ({"swizzle": 64}, "a row of the box has 128 bytes, more than the swizzle's 64"),
        ({"sizes": [64, 0]}, "outside 1 to 2"),
        ({"sizes": [1] * 6, "strides": [2] + [16] * 5, "box": [8] + [1] * 5}, "6 dimensions"),
    ],
)
def test_rules_of_a_tensor_map(change: dict[str, Any], says: str) -> None:
    region = Region(torch.zeros(64, 8).data_ptr(), 16, "x")

    def tensor_map(**changed: Any) -> TensorMap:
        return TensorMap(name="x", dtype="bfloat16", nan=False, region=region, **GOOD | changed)

    tensor_map().check()
    with pytest.raises(EmulatorError, match=f"refuses the tensor map of x: .*{says}"):
        tensor_map(**change).check()
