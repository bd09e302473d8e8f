"""The tolerances of the tests in float64, and how results are compared; in narrower dtypes by the rule of `kernels/examples.py`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusedgpt.kernels.examples import compare

TOLERANCES = {
    "float64": 1e-13,  # the same mathematics in double precision: only the order of sums differs
    "gradcheck": 1e-6,  # central differences with a step of 1e-6 in double precision
}


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """The norm of the difference over the norm of the oracle; the norm itself where the oracle is zero."""
    actual, oracle = actual.double(), oracle.double()
    return ((actual - oracle).norm() / (oracle.norm() or 1.0)).item() if oracle.numel() else 0.0


def assert_equal_maths(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every named float64 result has the expected shape and value, NaN where NaN is expected."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == torch.float64, f"{name}: {actual[name].dtype}"
        assert actual[name].shape == value.shape, f"{name}: {tuple(actual[name].shape)}"
        assert torch.equal(actual[name].isnan(), value.isnan()), f"{name}: NaN in other places"
        error = relative_error(actual[name].nan_to_num(), value.nan_to_num())
        assert error <= TOLERANCES["float64"], f"{name}: relative error {error:.1e}"


def assert_no_less_exact(
    actual: Mapping[str, Tensor],
    rival: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    slack: str = "rounding",
) -> None:
    """Every named result is within the rule: `compare` holds it against the rival's in the same dtype and float64."""
    assert actual.keys() == rival.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert actual[name].shape == exact.shape, f"{name}: {tuple(actual[name].shape)}"
        found = compare(actual[name], rival[name], exact, slack)
        assert found.ok, f"{name}: relative error {found.error:.2e}, allowed {found.allowed:.2e}"
