"""What each PTX instruction does. `build` makes a function of a mask of threads out of one; the modules register the opcodes they know."""

from . import arithmetic, async_copy, bulk_copy, convert, integer, loads, mbarrier, mma, warp, wgmma
from .table import build

__all__ = ["build"]

# imported for what they register
_ = (arithmetic, async_copy, bulk_copy, convert, integer, loads, mbarrier, mma, warp, wgmma)
