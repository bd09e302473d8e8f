"""What training found of the kernels on a device, kept in the user's cache: a file for each device, driver, torch, Triton
and state of the kernels' sources. `train/verify.py` writes it, `gpt doctor` shows what is wrong.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from .. import __version__, kernels
from ..data.cache import cache_dir
from ..data.files import make_folder, write_file
from ..data.untrusted import InputError, read_json
from ..kernels._triton import triton
from .device import driver


def read_verdicts(device: torch.device) -> dict[str, str]:
    """The fault of every example that was compared on this device, by the example's operator, size and dtype; "" for none."""
    try:
        return read_json(_file(device), dict[str, str], "it is written anew")
    except InputError:  # none yet, or damaged: they are compared again
        return {}


def write_verdicts(device: torch.device, verdicts: dict[str, str]) -> None:
    """Replace what is kept for this device."""
    file = _file(device)
    try:
        make_folder(file.parent)
        write_file(file, json.dumps(verdicts, indent=1))
    except OSError as error:
        print(f"warning: what was found of the kernels is not kept: {error}", file=sys.stderr)


def _file(device: torch.device) -> Path:
    gpu = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if gpu else str(device)
    versions = (driver() if gpu else "", torch.__version__, triton.__version__, __version__)
    digest = hashlib.sha256("\n".join((card, *versions)).encode())
    for source in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return cache_dir() / "verified" / f"{card.replace(' ', '-')}-{digest.hexdigest()[:16]}.json"
