"""What all of these tests share: results without faults, made once for all workers, and places that other users can enter."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedgpt.bench.soak.place import Place, make_references


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = tmp_path_factory.getbasetemp()
    if shared.name.startswith("popen-"):  # of one of several workers
        shared = shared.parent
    with (shared / "reference.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = shared / "reference"
        return found if found.exists() else make_references(found)


@pytest.fixture
def place(reference: Path) -> Iterator[Place]:
    """A folder that a fault may ruin; some faults run as another user, to whom pytest's folders are closed."""
    folder = Path(tempfile.mkdtemp(prefix="fusedgpt-faults-"))
    folder.chmod(0o755)
    yield Place(folder / "place", reference)
    shutil.rmtree(folder, ignore_errors=True)
