"""The repository's root is the package: as a clone, installed editable, and as a wheel, beside Hugging Face's `kernels` and without.

Six environments of their own, cheap because each sees the libraries of the running interpreter through a .pth file. pip builds from
a copy of the checkout, so that nothing is written into it and nothing left there from an earlier build gets in.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
FOLDERS = ("kernels", "data", "gpt", "bench")

USE_IT = """
import importlib.util, sys
origin = (importlib.util.find_spec("kernels") or sys).__dict__.get("origin")
import fusedgpt.kernels
import torch
from transformers import GPT2Config, GPT2LMHeadModel
config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=16, bos_token_id=0, eos_token_id=0)
hidden = GPT2LMHeadModel(config).eval().transformer(torch.zeros(1, 3, dtype=torch.long)).last_hidden_state
ours = fusedgpt.kernels.layer_norm(hidden, torch.ones(8), torch.zeros(8))
torch.testing.assert_close(ours, torch.nn.functional.layer_norm(hidden, (8,)))
if origin:
    import kernels
    assert kernels.get_kernel, kernels
print(fusedgpt.__file__, origin)
"""


def run(*command: object, cwd: Path, **env: str) -> str:
    """Runs a command away from this process's import settings; its output, or a failure that shows it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip_install(python: Path, *what: object) -> None:
    """Installs into another interpreter's environment, as a user would, but with what is at hand only."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout in a folder of another name."""
    copy = tmp_path_factory.mktemp("packaging") / "any name-2"
    dropped = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests", "tools"
    )
    shutil.copytree(ROOT, copy, ignore=dropped)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(checkout, folder / "source")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def hf_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face's `kernels`, from the package index, in a folder of its own."""
    folder = tmp_path_factory.mktemp("hf")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--target",
        folder,
    ]
    done = subprocess.run([*command, "--retries=1", "kernels"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"pip cannot get Hugging Face's `kernels` here: {last}")
    return folder


@pytest.fixture(params=["absent", "present"])
def hf(request: pytest.FixtureRequest) -> Path | None:
    """Where Hugging Face's `kernels` is to come from; None: nowhere."""
    if request.param == "present":
        return request.getfixturevalue("hf_kernels")
    if importlib.util.find_spec("kernels"):
        pytest.skip(
            "the running interpreter has Hugging Face's `kernels`: no environment can be made without it"
        )
    return None


@pytest.fixture
def python(tmp_path: Path, hf: Path | None) -> Path:
    """The interpreter of a new environment that sees the libraries here, this project's own installation excepted."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    [packages] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "z.pth").write_text("\n".join(map(str, [*filter(None, [hf]), *LIBRARIES])))
    return tmp_path / "env" / "bin" / "python"


def check(python: Path, hf: Path | None, package: Path, **env: str) -> None:
    """`fusedgpt` comes from `package` and works, and so does transformers, with Hugging Face's `kernels` where there is one."""
    file, _, origin = run(python, "-c", USE_IT, cwd=python.parent, **env).strip().rpartition(" ")
    assert Path(file).resolve() == package / "__init__.py"
    assert origin == (str(hf / "kernels" / "__init__.py") if hf else "None")


def test_clone(python: Path, hf: Path | None, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "fusedgpt").symlink_to(checkout)
    check(python, hf, checkout, PYTHONPATH=str(tmp_path / "link"))


def test_editable(python: Path, hf: Path | None, checkout: Path) -> None:
    pip_install(python, "--editable", checkout)
    check(python, hf, checkout)
    if not hf:
        assert "usage: gpt" in run(python.with_name("gpt"), "--help", cwd=python.parent)


def test_wheel(python: Path, hf: Path | None, wheel: Path) -> None:
    pip_install(python, wheel)
    [package] = python.parents[1].glob("lib/python*/site-packages/fusedgpt")
    check(python, hf, package)
    if not hf:
        assert "usage: gpt" in run(python.with_name("gpt"), "--help", cwd=python.parent)


@pytest.mark.parametrize("hf", ["present"], indirect=True)
def test_in_the_clone_itself_transformers_works(python: Path, checkout: Path) -> None:
    """There a plain `python` puts our folders on sys.path, so that `import kernels` finds ours, not Hugging Face's."""
    code = "from transformers import GPT2LMHeadModel; import kernels; print(kernels.__file__)"
    assert Path(run(python, "-c", code, cwd=checkout).strip()) == checkout / "kernels" / "__init__.py"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [entry_points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert archive.read(entry_points).decode().split() == [
            "[console_scripts]",
            "gpt",
            "=",
            "fusedgpt.gpt.__main__:start",
        ]
    [info] = {name.partition("/")[0] for name in names if not name.startswith("fusedgpt/")}
    assert info.endswith(".dist-info")
    assert f"{info}/licenses/LICENSE" in names
    sources = {path.relative_to(checkout) for folder in FOLDERS for path in (checkout / folder).rglob("*.py")}
    sources = {path for path in sources if not path.name.startswith("test_")}  # those of `pytest bench`
    expected = {f"fusedgpt/{path}" for path in [*sources, "__init__.py", "py.typed"]}
    assert {name for name in names if name.startswith("fusedgpt/")} == expected
