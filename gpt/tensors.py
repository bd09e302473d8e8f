"""Tensors on disk, as safetensors only: nothing is unpickled, and nothing is read before its name, shape and dtype are checked."""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..data.untrusted import InputError, MissingFile

Spec = tuple[tuple[int, ...], torch.dtype]

MAX_HEADER = 8 << 20  # bytes; the largest of our own, GPT-2 XL's optimizer under AdamW, has 0.2 MB
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def describe_tensors(file: Path, remedy: str) -> dict[str, Spec]:
    """The shape and dtype of each tensor by name, from the file's header alone.

    Raises:
        MissingFile: there is no such file.
        InputError: it cannot be read, is no safetensors file, or its header does not fit its size.
    """
    with _opened(file, remedy) as opened:
        return _describe(opened, file, remedy)


def read_tensors(file: Path, expected: Mapping[str, Spec] | None, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own: what happens to the file later does not touch them.

    Args:
        file: in the safetensors format.
        expected: shape and dtype of each tensor by name; the file must have exactly these. None: any.
        remedy: what to do where the file cannot be used.

    Raises:
        MissingFile: there is no such file.
        InputError: that of `describe_tensors`, or the tensors are not those expected; no data was read then.
    """
    with _opened(file, remedy) as opened:
        found = _describe(opened, file, remedy)
        if expected is not None and (wrong := differences(found, expected)):
            what = wrong[0] if len(wrong) == 1 else f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:4])}"
            raise InputError(file, what, remedy)
        return {name: opened.get_tensor(name) for name in found}


def differences(found: Mapping[str, Spec], expected: Mapping[str, Spec]) -> list[str]:
    """What is wrong with the tensors found, one phrase each; empty if they are exactly those expected."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} does not belong there" for name in found if name not in expected]
    for name, (shape, dtype) in found.items():
        if name not in expected:
            continue
        if shape != expected[name][0]:
            wrong.append(f"{name} has shape {shape} instead of {expected[name][0]}")
        elif dtype != expected[name][1]:
            wrong.append(f"{name} is {_short(dtype)} instead of {_short(expected[name][1])}")
    return wrong


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write contiguous tensors, of any device, as a safetensors file. Other threads run meanwhile.

    Raises:
        OSError: the file cannot be written; it is named.
    """
    try:
        save_file(dict(tensors), file, {"format": "pt"})  # transformers asks for it
    except SafetensorError as error:  # which is no OSError, and gives the number in its text only
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        raise OSError(f"{file} cannot be written: {error}") from error


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(opened: Any, file: Path, remedy: str) -> dict[str, Spec]:
    found = {}
    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
        view = opened.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise InputError(file, f"{name} has the dtype {view.get_dtype()}, which is not read here", remedy)
        found[name] = (tuple(view.get_shape()), DTYPES[view.get_dtype()])
    return found


@contextmanager
def _opened(file: Path, remedy: str) -> Iterator[Any]:
    """The file through safetensors, which compares the header with the file's size.

    It is read by `pread`, not mapped: a mapped file that is cut while it is read ends the process with SIGBUS.
    """
    try:
        if not file.is_file():
            if file.exists():
                raise InputError(file, "it is no file", remedy)
            raise MissingFile(file, "there is no such file", remedy)
        with file.open("rb") as start:
            (length,) = struct.unpack("<Q", start.read(8).ljust(8, b"\0"))
        if length > MAX_HEADER:
            raise InputError(file, f"its header would have {length:,} bytes; it is damaged", remedy)
        with safe_open(file, "pt", backend="pread") as opened:
            yield opened
    except SafetensorError as error:
        raise InputError(file, f"it is damaged or no safetensors file ({error})", remedy) from None
    except MemoryError:
        what = f"its {file.stat().st_size:,} bytes do not fit into the memory"
        raise InputError(file, what, "free some, or take a machine that has more") from None
    except OSError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(file, f"it cannot be read ({error.strerror or error})", remedy) from None
