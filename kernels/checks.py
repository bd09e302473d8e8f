"""Argument checks shared by the operators. An error names the operator, the argument, what it got and what it takes."""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, bfloat16, dtype, float16, float32, float64, int32, int64

FLOATS = (float32, bfloat16, float16, float64)  # float64 runs in the reference only: it is the tests' oracle
INTEGERS = (int32, int64)
_NUMBERS = {float: (float, int, Real, torch.SymFloat, torch.SymInt), int: (int, Integral, torch.SymInt)}


def floating(operator: str, **tensors: Tensor | None) -> None:
    """Require a supported floating dtype (TypeError) and one device (ValueError) of all given tensors."""
    _tensors(operator, FLOATS, tensors)


def integers(operator: str, **tensors: Tensor | None) -> None:
    """Require int32 or int64 (TypeError) and one device (ValueError) of all given tensors."""
    _tensors(operator, INTEGERS, tensors)


def _tensors(operator: str, dtypes: tuple, tensors: dict[str, Tensor | None]) -> None:
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} is {describe(tensor)}; it takes a tensor")
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{operator}: {name} has dtype {str(tensor.dtype)[6:]}; it takes {_names(dtypes)}"
            )
        if first is None:
            first = name, tensor
        elif tensor.device != first[1].device:
            same_device(operator, *first, name, tensor)


def describe(value: Any) -> str:
    """A value for an error message: strings, None and dtypes in full, anything else by its type."""
    if value is None or isinstance(value, str | dtype):
        return repr(value)
    return f"of type {type(value).__name__}"


def _names(dtypes: tuple) -> str:
    return ", ".join(str(dtype)[6:] for dtype in dtypes)


def out_dtype(operator: str, wanted: dtype | None) -> None:
    """Require a supported floating dtype, or None."""
    if wanted is not None and not (isinstance(wanted, dtype) and wanted in FLOATS):
        raise TypeError(f"{operator}: out_dtype is {describe(wanted)}; it takes {_names(FLOATS)}")


def numbers(operator: str, kind: type, **values: Any) -> None:
    """Require Python numbers, of kind `float` (integers too) or `int`."""
    for name, value in values.items():
        if not isinstance(value, _NUMBERS[kind]):
            wanted = "a number" if kind is float else "an integer"
            raise TypeError(f"{operator}: {name} is {describe(value)}; it takes {wanted}")


def one_of(operator: str, name: str, value: Any, *choices: str) -> None:
    """Require one of several strings."""
    if value not in choices:
        raise ValueError(
            f"{operator}: {name} is {describe(value)}; it takes {', '.join(map(repr, choices[:-1]))} "
            f"or {choices[-1]!r}"
        )


def same_device(operator: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Require that two tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{operator}: {other_name} is on {other.device} but {name} on {tensor.device}; move them to one device"
        )


def shape(operator: str, name: str, tensor: Tensor | None, *expected: int) -> None:
    """Require a shape, where the tensor is given."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}; it takes {expected}")


def dropout(operator: str, p: float, seed: Tensor | None, x: Tensor, stream: int = 0) -> None:
    """Require a probability in [0, 1] and, where it is not 0, an int64 seed of one element on x's device."""
    numbers(operator, float, probability=p)
    numbers(operator, int, stream=stream)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{operator}: dropout probability {p} is outside [0, 1]")
    if p == 0.0:
        return
    if seed is None:
        raise ValueError(f"{operator}: dropout probability {p} needs a seed: an int64 tensor of one element")
    if not isinstance(seed, Tensor):
        raise TypeError(f"{operator}: seed is {describe(seed)}; it takes an int64 tensor of one element")
    if seed.dtype != int64 or seed.numel() != 1:
        raise TypeError(
            f"{operator}: seed is {str(seed.dtype)[6:]} of shape {tuple(seed.shape)}; it takes int64 with one element"
        )
    same_device(operator, "the input", x, "seed", seed)
