"""Tensor maps, which describe a tensor to the bulk copies, and the rules of the driver for them.

Source: CUDA driver API, cuTensorMapEncodeTiled; PTX ISA, 5.5 tensors.
"""

from dataclasses import dataclass

import numpy as np

from .global_memory import Region
from .threads import EmulatorError

SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle: bytes


@dataclass
class TensorMap:
    """Lists are innermost dimension first."""

    name: str
    base: int  # address
    element: int  # bytes
    dtype: str  # torch's name of it
    sizes: list[int]
    strides: list[int]  # bytes
    box: list[int]
    swizzle: int  # bytes: 0, 32, 64 or 128
    nan: bool  # what is read outside the tensor: NaN, or zero
    region: Region | None

    def check(self) -> None:
        """Raise EmulatorError where the driver would refuse to encode it."""
        row = self.box[0] * self.element
        problems = [
            (not 1 <= len(self.box) <= 5, f"{len(self.box)} dimensions are outside 1 to 5"),
            (self.base % 16, f"the address {self.base:#x} is no multiple of 16"),
            (
                any(s % 16 or not 0 < s < 1 << 40 for s in self.strides[1:]),
                f"the strides {self.strides[1:]} bytes are not multiples of 16 between 16 and 2^40",
            ),
            (row % 16, f"a row of the box has {row} bytes, no multiple of 16"),
            (
                self.swizzle and row > self.swizzle,
                f"a row of the box has {row} bytes, more than the swizzle's {self.swizzle}",
            ),
            (any(not 0 < b <= 256 for b in self.box), f"the box {self.box} is outside 1 to 256"),
            (any(not 0 < d <= 1 << 32 for d in self.sizes), f"the sizes {self.sizes} are outside 1 to 2^32"),
            (self.strides[0] != self.element, f"the innermost stride is {self.strides[0]} bytes"),
        ]
        found = [text for wrong, text in problems if wrong]
        if found:
            raise EmulatorError(f"the driver refuses the tensor map of {self.name}: {'; '.join(found)}")

    @property
    def bytes(self) -> int:
        """Of a box."""
        return int(np.prod(self.box)) * self.element

    def window(self, coordinates: list[int]) -> tuple[np.ndarray, tuple[slice, ...]] | None:
        """The part of the tensor under the box at these coordinates, outermost dimension first, and its place in the box."""
        low = [max(c, 0) for c in coordinates]
        high = [min(c + b, d) for c, b, d in zip(coordinates, self.box, self.sizes, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return None
        first = self.base + sum(a * s for a, s in zip(low, self.strides, strict=True))
        end = self.base + sum((b - 1) * s for b, s in zip(high, self.strides, strict=True)) + self.element
        if self.region is None or not (self.region.low <= first and end <= self.region.high):
            raise EmulatorError(
                f"memcheck: the tensor map of {self.name} reaches beyond its tensor: bytes {first:#x} to {end:#x}"
            )
        flat = self.region.bytes[first - self.region.base :]
        flat = flat[: len(flat) // self.element * self.element].view(f"u{self.element}")
        shape = [b - a for a, b in zip(low, high, strict=True)][::-1]
        window = np.lib.stride_tricks.as_strided(flat, shape, self.strides[::-1])
        place = (slice(a - c, b - c) for a, b, c in zip(low, high, coordinates, strict=True))
        return window, tuple(place)[::-1]


def swizzled(offset: np.ndarray, swizzle: int) -> np.ndarray:
    """Byte offsets from an aligned base as the hardware swizzles them. (PTX ISA, 5.5.7)"""
    if not swizzle:
        return offset
    return offset ^ ((offset >> 7 & swizzle // 16 - 1) << 4)
