"""What every test needs before its first import: this checkout as `fusedgpt`, the environment, and the files beside the checkout.

Whatever is installed, the tests run on this checkout: a folder holding a link `fusedgpt -> checkout` leads sys.path and, for
subprocesses, PYTHONPATH. The checkout itself is kept off both, else `import kernels` in transformers would find ours.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


_links = tempfile.TemporaryDirectory(prefix="fusedgpt-tests-")  # lives as long as this process
Path(_links.name, "fusedgpt").symlink_to(ROOT)
sys.path[:] = [_links.name, *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_links.name, os.environ.get("PYTHONPATH")]))
os.environ["PYTHONSAFEPATH"] = "1"

# Triton 3.10 changes this default: the same arithmetic on either side of it.
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
# The tests' tensors are small, and the bits must not depend on the core count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under nohup, or in the background of a script, these are ignored, and so they would be in every process of a test.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network is a mistake: it shall fail at once

import torch  # noqa: E402  # after the variables that it reads, before Triton, which it does not import

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if (SHARED / "tokenizer").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tokenizer"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker a core, or one in all where tests share a GPU's memory."""
    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public texts beside the checkout: the-verdict.txt, tinyshakespeare.txt, instruction-data.json."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: the public texts are not part of the repository")
    return folder


@pytest.fixture(scope="session")
def gpt2_tokenizer_cache() -> Path:
    """A folder that tiktoken can read GPT-2's vocabulary from, without a network (TIKTOKEN_CACHE_DIR names it)."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip(
            f"no {SHARED / 'tokenizer'} and no TIKTOKEN_CACHE_DIR: GPT-2's vocabulary is not part of the repository"
        )
    return Path(folder)
