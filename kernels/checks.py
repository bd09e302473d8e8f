"""What every operator asks of its arguments: errors that name the argument, what it got and what it takes."""

from torch import Tensor, bfloat16, dtype, float16, float32, float64, int32, int64

FLOATS = (float32, bfloat16, float16, float64)  # float64 runs on the reference only: it is the tests' oracle
INTEGERS = (int32, int64)


def floating(operator: str, **tensors: Tensor | None) -> None:
    """Every tensor given is of a supported floating dtype (TypeError) and on one device (ValueError)."""
    _tensors(operator, FLOATS, tensors)


def integers(operator: str, **tensors: Tensor | None) -> None:
    """Every tensor given is int32 or int64 (TypeError) and on one device (ValueError)."""
    _tensors(operator, INTEGERS, tensors)


def _tensors(operator: str, dtypes: tuple, tensors: dict[str, Tensor | None]) -> None:
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} is a {type(tensor).__name__}; it takes a tensor")
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{operator}: {name} has dtype {str(tensor.dtype)[6:]}; it takes {_names(dtypes)}"
            )
        if first is None:
            first = name, tensor
        elif tensor.device != first[1].device:
            same_device(operator, *first, name, tensor)


def _names(dtypes: tuple) -> str:
    return ", ".join(str(dtype)[6:] for dtype in dtypes)


def out_dtype(operator: str, wanted: dtype | None) -> None:
    """The dtype asked for, where one is, is a supported floating one."""
    if wanted is not None and wanted not in FLOATS:
        raise TypeError(f"{operator}: out_dtype is {str(wanted)[6:]}; it takes {_names(FLOATS)}")


def same_device(operator: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{operator}: {other_name} is on {other.device} but {name} on {tensor.device}; move them to one device"
        )


def shape(operator: str, name: str, tensor: Tensor | None, *expected: int) -> None:
    """The tensor, where given, has exactly the expected shape."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}; it takes {expected}")


def dropout(operator: str, p: float, seed: Tensor | None, x: Tensor) -> None:
    """The probability is in [0, 1] and comes with a seed of the right kind where it is not 0."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{operator}: dropout probability {p} is outside [0, 1]")
    if p == 0.0:
        return
    if seed is None:
        raise ValueError(f"{operator}: dropout probability {p} needs a seed: an int64 tensor of one element")
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"{operator}: seed is a {type(seed).__name__}; it takes an int64 tensor of one element"
        )
    if seed.dtype != int64 or seed.numel() != 1:
        raise TypeError(
            f"{operator}: seed is {str(seed.dtype)[6:]} of shape {tuple(seed.shape)}; it takes int64 with one element"
        )
    same_device(operator, "the input", x, "seed", seed)
