"""Compiled Triton kernels on a CPU: `emulate` runs the PTX of every launch, checks its memory accesses and its synchronisation.

    with emulate("sm_90", timing="late") as emulation:
        kernel[grid](x, y, ...)
    assert not emulation.findings

docs/emulator.md says what this proves and what it cannot.
"""

from .launch import Emulation, emulate
from .threads import EmulatorError

__all__ = ["Emulation", "EmulatorError", "emulate"]
