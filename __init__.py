"""fusedgpt: GPT-2 training on fused Triton kernels, and the same in plain PyTorch on any CPU.

    from fusedgpt import GPT

    model = GPT.from_pretrained("runs/tales")
    print(model.generate("Once upon a time", max_new_tokens=80))

`import fusedgpt` is light: torch is imported when GPT is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GPT", "ModelConfig", "__version__"]

if TYPE_CHECKING:
    from .gpt.config import ModelConfig
    from .gpt.model import GPT
else:
    _MODULES = {"GPT": ".gpt.model", "ModelConfig": ".gpt.config"}

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name], __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
