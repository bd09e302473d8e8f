"""The tolerances of the operators' tests, by name, and the two ways of measuring against them.

One table, so that a number that had to be loosened is seen where it is compared with its neighbours.
"""

import torch
from torch import Tensor

TOLERANCES = {
    "float64": 1e-13,  # the same mathematics in double precision: only the order of sums differs
    "gradcheck": 1e-6,  # central differences with a step of 1e-6 in double precision
    "rule": 2.0,  # err(operator) <= 2 x err(PyTorch in the same dtype), both against float64
    "log-sum-exp": 16.0,  # units of the last place of a softmax made from its logarithm, up to 32, in float32
    "roundings": 2.0,  # where PyTorch happens to be exact: this many units of the result's last place
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
    actual: dict[str, Tensor],
    rival: dict[str, Tensor],
    oracle: dict[str, Tensor],
    roundings: str = "roundings",
) -> None:
    """Every named result is at most twice as far from the float64 oracle as the rival's in the same dtype."""
    assert actual.keys() == rival.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert actual[name].shape == exact.shape, f"{name}: {tuple(actual[name].shape)}"
        error, allowed = relative_error(actual[name], exact), relative_error(rival[name], exact)
        allowed = TOLERANCES["rule"] * allowed + TOLERANCES[roundings] * torch.finfo(actual[name].dtype).eps
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
