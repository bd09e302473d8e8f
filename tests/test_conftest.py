"""What tests/conftest.py settles before the first import: interpreted or compiled, by what torch finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = """
import os
assert os.environ["OMP_NUM_THREADS"] and os.environ["TRITON_DEFAULT_FP_FUSION"]
assert "TRITON_INTERPRET" not in os.environ
class cuda:
    is_available = staticmethod(lambda: {available})
"""
PROGRAM = "import os, runpy, sys; runpy.run_path(sys.argv[1]); print(os.environ.get('TRITON_INTERPRET'))"


@pytest.mark.parametrize(("available", "interpreted"), [(True, "None"), (False, "1")])
def test_kernels_are_interpreted_where_torch_finds_no_gpu(
    available: bool, interpreted: str, tmp_path: Path
) -> None:
    """Device files say nothing: WSL2 has a GPU without /dev/nvidia0, and a torch for CPUs none beside it."""
    (tmp_path / "torch.py").write_text(TORCH.format(available=available))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).with_name("conftest.py"))]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == interpreted
