"""The house's rules, read from the sources: imports run one way, files stay readable, and imports stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# bench -> gpt -> {kernels, data}: what each folder may import of the four.
ALLOWED = {
    "kernels": {"kernels"},
    "data": {"data"},
    "gpt": {"gpt", "kernels", "data"},
    "bench": {"bench", "gpt", "kernels", "data"},
}
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in (*ALLOWED, "tests", "tools", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported_modules(source: str, package: list[str]) -> Iterator[str]:
    """Every module name that `source`, a file of `package` (["fusedgpt", "gpt", "train"]), may import, in full."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*start, alias.name]) for alias in node.names)


def wrong_arrows(source: str, path: str) -> list[str]:
    """The imports of the file at `path` (relative to the root) that its folder may not make, or that only work from the clone."""
    folders = path.split("/")[:-1]
    wrong = []
    for name in imported_modules(source, ["fusedgpt", *folders]):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        bare = top in ALLOWED  # a top-level `kernels` is Hugging Face's, and nothing here is installed as one
        upward = top == "fusedgpt" and target in ALLOWED and target not in ALLOWED.get(folders[0], ALLOWED)
        if bare or upward:
            wrong.append(name)
    return wrong


def test_imports_run_one_way() -> None:
    wrong = {name: wrong_arrows(path.read_text(), name) for name, path in FILES.items()}
    assert not {name: imports for name, imports in wrong.items() if imports}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/mlp.py", "from ..gpt.config import ModelConfig"),
        ("kernels/mlp.py", "def late():\n    from .. import data"),
        ("kernels/mlp.py", "import fusedgpt.data.tales"),
        ("data/tokenizers/bpe.py", "from ...kernels import linear"),
        ("data/corpus.py", "from fusedgpt import gpt"),
        ("gpt/train/loop.py", "from ...bench import timing"),
        ("gpt/model.py", "import kernels"),
        ("gpt/model.py", "from kernels import linear"),
        ("tests/data/test_tales.py", "from data.tales import sample"),
    ],
)
def test_an_arrow_that_runs_back_up_is_seen(path: str, source: str) -> None:
    assert wrong_arrows(source, path)


def test_arrows_down_the_house_are_allowed() -> None:
    assert not wrong_arrows(
        "from ...data.loader import Loader\nfrom ..model import GPT\nimport torch", "gpt/train/loop.py"
    )
    assert not wrong_arrows(
        "from .backend import choose\nfrom ..kernels.checks import check", "kernels/mlp.py"
    )
    assert not wrong_arrows("from fusedgpt.kernels import linear", "tests/kernels/test_linear.py")


def training_imports(source: str, path: str) -> list[str]:
    """The imports from gpt/train that the file at `path` makes without being a part of it."""
    package = ["fusedgpt", *path.split("/")[:-1]]
    names = imported_modules(source, package)
    return [name for name in names if f"{name}.".startswith("fusedgpt.gpt.train.")]


def test_only_commands_and_the_bench_know_of_training() -> None:
    """A run is loaded, used and drawn by what lies in gpt/ itself."""
    others = [
        name
        for name in FILES
        if name.count("/") == 1 and name.startswith("gpt/") and name != "gpt/commands.py"
    ]
    wrong = {name: training_imports(FILES[name].read_text(), name) for name in others}
    assert not {name: imports for name, imports in wrong.items() if imports}


@pytest.mark.parametrize(
    "source",
    [
        "from .train.step import TrainStep",
        "def late():\n    from . import train",
        "import fusedgpt.gpt.train.loop",
    ],
)
def test_an_import_from_training_is_seen(source: str) -> None:
    assert training_imports(source, "gpt/run.py")
    assert not training_imports("from .settings import read_run", "gpt/run.py")


# What only these files do, so that there is one way to write what must last and one to read what cannot be trusted.
ONE_PLACE = {
    "json.loads": "data/untrusted.py",
    "json.load": "data/untrusted.py",
    "tomllib.loads": "data/untrusted.py",
    "tomllib.load": "data/untrusted.py",
    "os.replace": "data/files.py",
    "os.rename": "data/files.py",
    "os.fsync": "data/files.py",
    ".write_text": "data/files.py",
    ".write_bytes": "data/files.py",
    "load_file": "gpt/tensors.py",
    "safe_open": "gpt/tensors.py",
    "save_file": "gpt/tensors.py",
    "torch.load": "",
    "torch.save": "",
    "pickle.load": "",
    "pickle.loads": "",
    "eval": "",
    "exec": "",
}


def calls_elsewhere(source: str, path: str) -> list[str]:
    """The calls in the file at `path` that belong into another file of the house, or nowhere."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {call if call in ONE_PLACE else f".{call.rpartition('.')[2]}" for call in calls}
    return sorted(name for name in names if path != ONE_PLACE.get(name, path))


def test_durable_writes_and_untrusted_reads_have_one_place() -> None:
    own = [name for name in FILES if name.startswith(("data/", "gpt/"))]
    wrong = {name: calls_elsewhere(FILES[name].read_text(), name) for name in own}
    assert not {name: calls for name, calls in wrong.items() if calls}


def test_a_write_past_the_house_is_seen() -> None:
    assert calls_elsewhere("path.write_text('x')", "gpt/run.py") == [".write_text"]
    assert calls_elsewhere("json.loads(x); torch.load(f)", "gpt/run.py") == ["json.loads", "torch.load"]
    assert not calls_elsewhere("json.dumps(x); model.eval(); os.replace(a, b)", "data/files.py")


def test_every_file_says_what_it_holds() -> None:
    silent = [name for name, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, "no module docstring"


def test_every_file_can_be_read_in_one_sitting() -> None:
    long = [name for name, path in FILES.items() if len(path.read_text().splitlines()) > 600]
    assert not long, "aim for 500 lines: split the file"


def run_fresh(code: str) -> None:
    """Runs code in a process of its own, away from the checkout, and fails with what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_kernels_needs_neither_triton_nor_a_gpu() -> None:
    run_fresh("""
import sys
import torch

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def touched(*args, **kwargs):
    raise AssertionError("the import touched the GPU")

sys.meta_path.insert(0, NoTriton())
kept = torch.cuda.is_available
for name in ("_lazy_init", "is_available", "device_count", "get_device_capability", "get_device_properties"):
    setattr(torch.cuda, name, touched)
import fusedgpt.kernels
assert not torch.cuda.is_initialized()
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)

torch.cuda.is_available = kept
y = fusedgpt.kernels.layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2))
assert torch.allclose(y, torch.tensor([[-1.0, 1.0]]), atol=1e-4), y
""")


def test_help_comes_before_the_heavy_imports() -> None:
    run_fresh("""
import sys
from fusedgpt.gpt.cli import main

sys.argv = ["gpt", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "triton", "numpy", "matplotlib"} & sys.modules.keys()
assert not heavy, f"gpt --help imports {sorted(heavy)}"
""")
