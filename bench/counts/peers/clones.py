"""Kernels that no package installs, or only with an extension in CUDA, read from clones of their repositories.

A clone lies in the folder that `bench counts --clones` names, under the repository's name. Left out is flash-attention's attention in Triton: the
file is written for Triton 2.0, and `dot` has no `trans_b` since 2.1.
"""

import os
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import triton
from torch import Tensor

from ...ops import peers
from ...ops.cases import EPS


def tutorial(n_head: int, folder: Path | None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Triton's tutorial on attention. Returns its name and its call.

    It takes heads apart and contiguous, and gives (B, H, T, D), since its backward wants that gradient contiguous too. Of its
    configurations it has the one that its own test takes.

    Raises:
        FileNotFoundError: there is no clone of triton-lang/triton.
    """
    path = Path("python/tutorials/06-fused-attention.py")
    with mock.patch.dict(os.environ, PYTEST_VERSION=""):
        module = _module("fused_attention", _clone(folder, "triton-lang/triton") / path)

    def call(qkv: Tensor) -> Tensor:
        q, k, v = (t.contiguous() for t in peers.heads(qkv, n_head))
        return module.attention(q, k, v, True, q.shape[-1] ** -0.5, False)

    return f"Triton's tutorial, triton {triton.__version__}, float16", call


def flash_layer_norm(p: float, add: bool, folder: Path | None) -> tuple[str, Callable]:
    """flash-attention's LayerNorm in Triton; with `add` dropout and the residual's addition are in it. Returns its name and its call.

    Raises:
        FileNotFoundError: there is no clone of Dao-AILab/flash-attention.
    """
    name, module = _flash_attention(folder, "ops.triton.layer_norm")
    norm = partial(module.layer_norm_fn, eps=EPS)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *x_bias: Tensor) -> Any:
        x = x + x_bias[0] if x_bias else x
        return norm(x, weight, bias, residual=residual, dropout_p=p, prenorm=True)

    return name, add_norm if add else norm


def _flash_attention(folder: Path | None, module: str) -> tuple[str, ModuleType]:
    """A module of the package and the package's name, without the CUDA extension that its __init__ imports."""
    source = _clone(folder, "Dao-AILab/flash-attention") / "flash_attn"
    version = re.search(r'__version__ = "(.+?)"', (source / "__init__.py").read_text())
    package = ModuleType("flash_attn")
    package.__path__ = [str(source)]
    sys.modules.setdefault("flash_attn", package)
    path = source.joinpath(*module.split(".")).with_suffix(".py")
    return f"flash-attention {version and version[1]}", _module(f"flash_attn.{module}", path)


def _clone(folder: Path | None, repository: str) -> Path:
    name = repository.rpartition("/")[2]
    if folder is None or not (folder / name).is_dir():
        raise FileNotFoundError(
            f"--clones DIR takes a folder with a clone of github.com/{repository} in {name}/"
        )
    return folder / name


def _module(name: str, path: Path) -> Any:
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
