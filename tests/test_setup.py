"""tools/setup_env.py in clones made for the purpose: a .venv that is whole, half-made, stale, foreign, or wanted twice at once.

pip is played by a module that leads PYTHONPATH: it does what FAKE_PIP says and appends its arguments to a file. The real one runs
whenever `make` sets up a clone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Debian without python3-venv: `venv` is there, what it would take pip from is not. Making one then takes no seconds.
HIDDEN = """
import importlib.util as util, importlib.metadata as metadata
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "{module}" else find(name, *rest)
metadata.version = lambda name: "{pip}"
"""

FAKE_PIP = """
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parents[1]
with open(here / "calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
for step in os.environ.get("FAKE_PIP", "").split(";"):
    if step.startswith("print "):
        print(step[6:], flush=True)
    elif step == "break":
        sys.exit("no matching distribution")
    elif step.startswith("sleep "):
        (here / "asleep").write_text(str(os.getpid()))
        time.sleep(float(step[6:]))
"""


class Clone:
    """A folder with the files that the set-up reads, and an environment in which pip is the one above."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone-1.0"  # any name will do, a blank in it too
        (self.root / "tools").mkdir(parents=True)
        for name in ("tools/setup_env.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.fakes = folder / "fakes"
        self.add_module("pip/__init__.py", "")
        self.add_module("pip/__main__.py", FAKE_PIP)
        self.add_module("sitecustomize.py", HIDDEN.format(module="ensurepip", pip="22.3.1"))
        self.env = {
            "PATH": f"{self.fakes / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": str(self.fakes),
            "HOME": str(folder),
        }

    def add_module(self, path: str, source: str) -> None:
        target = self.fakes / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source)

    def add_program(self, name: str, script: str) -> None:
        self.add_module(f"bin/{name}", f"#!/bin/sh\n{script}\n")
        (self.fakes / "bin" / name).chmod(0o755)

    def start(self, *extras: str, pip: str = "") -> subprocess.Popen:
        command = [sys.executable, "tools/setup_env.py", *extras]
        env = self.env | {"FAKE_PIP": pip}
        return subprocess.Popen(
            command, cwd=self.root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *extras: str, pip: str = "") -> tuple[int, str]:
        process = self.start(*extras, pip=pip)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def pip_calls(self) -> list[list[str]]:
        calls = self.fakes / "calls"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    def sleeping_pip(self) -> int:
        """Waits until pip sleeps; its process id."""
        asleep = self.fakes / "asleep"
        deadline = time.monotonic() + 60
        while not (asleep.exists() and asleep.read_text()):
            assert time.monotonic() < deadline, "pip was never started"
            time.sleep(0.05)
        return int(asleep.read_text())

    def stamp(self) -> dict:
        return json.loads((self.root / ".venv" / "set-up.json").read_text())


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_a_fresh_clone_is_installed_once(clone: Clone) -> None:
    (clone.fakes / "sitecustomize.py").unlink()
    code, output = clone.run("test")
    assert code == 0, output
    [call] = clone.pip_calls()
    assert call[0] == "install"
    assert call[-1] == f"{clone.root}[test]"
    assert call[call.index("--constraint") + 1] == str(clone.root / "constraints.txt")
    assert clone.run("test") == (0, ""), "nothing to do, nothing to say"
    assert clone.run() == (0, ""), "no extras is less than [test]"
    assert len(clone.pip_calls()) == 1


def test_a_new_extra_or_changed_project_files_update_in_place(clone: Clone) -> None:
    clone.run("test")
    kept = clone.root / ".venv" / "kept"
    kept.touch()
    code, output = clone.run("bench")
    assert code == 0, output
    assert clone.pip_calls()[-1][-1] == f"{clone.root}[bench,test]"
    for name in ("pyproject.toml", "constraints.txt"):
        with (clone.root / name).open("a") as file:
            file.write("\n# changed\n")
        calls = len(clone.pip_calls())
        assert clone.run()[0] == 0
        assert len(clone.pip_calls()) == calls + 1
        assert clone.pip_calls()[-1][-1] == f"{clone.root}[bench,test]"
    assert kept.exists()
    assert clone.run() == (0, "")


def test_a_failed_install_shows_pips_words_and_leaves_no_stamp(clone: Clone) -> None:
    code, output = clone.run(pip="print what pip said;break")
    assert code == 1
    assert "what pip said" in output
    assert "no matching distribution" in output
    assert "Traceback" not in output
    assert not (clone.root / ".venv" / "set-up.json").exists()


def test_an_update_that_fails_is_not_trusted(clone: Clone) -> None:
    clone.run()
    assert clone.run("test", pip="break")[0] == 1
    code, output = clone.run()
    assert code == 0
    assert "half-made" in output


def test_a_half_made_venv_is_built_anew(clone: Clone) -> None:
    killed = clone.start(pip="sleep 60")
    pip = clone.sleeping_pip()
    killed.kill()
    half = clone.root / ".venv" / "half"
    half.touch()

    waiting = clone.start()
    assert waiting.stdout is not None
    assert "waiting" in waiting.stdout.readline(), "pip is still at work in there"
    os.kill(pip, signal.SIGKILL)
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, output
    assert "half-made" in output
    assert not half.exists()
    assert clone.run() == (0, "")


def test_a_deletion_that_was_stopped_is_finished(clone: Clone) -> None:
    left = clone.root / ".venv.old" / "left"
    left.parent.mkdir()
    left.touch()
    assert clone.run()[0] == 0
    assert not left.parent.exists()


def test_ctrl_c_is_no_traceback(clone: Clone) -> None:
    process = clone.start(pip="sleep 60")
    for pid in (clone.sleeping_pip(), process.pid):  # a terminal sends it to both
        os.kill(pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1] == "set-up: stopped; the next make starts it over"


def test_a_moved_clone_is_built_anew(clone: Clone) -> None:
    clone.run("test")
    moved = clone.root.with_name("moved")
    clone.root.rename(moved)
    clone.root = moved
    code, output = clone.run()
    assert code == 0, output
    assert clone.stamp()["root"] == str(moved)
    assert clone.pip_calls()[-1][-1] == f"{moved}[test]"


def test_a_python_that_is_gone_is_replaced(clone: Clone) -> None:
    clone.run()
    python = clone.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3.11")
    assert clone.run()[0] == 0
    assert python.exists()


def test_a_venv_of_the_users_own_is_left_alone(clone: Clone) -> None:
    own = clone.root / ".venv" / "own"
    own.parent.mkdir()
    own.touch()
    code, output = clone.run()
    assert code == 1
    assert "was not made by this script" in output
    assert own.exists()


def test_two_at_once_take_turns(clone: Clone) -> None:
    first = clone.start(pip="sleep 2")
    clone.sleeping_pip()
    code, output = clone.run()
    assert (code, output) == (0, "set-up: waiting for another make that is setting up .venv\n")
    assert first.wait() == 0
    first.communicate()
    assert len(clone.pip_calls()) == 1


def test_a_gpu_takes_the_newest_torch_and_says_what_it_costs(clone: Clone) -> None:
    clone.run()  # before the GPU was there
    clone.add_program("nvidia-smi", "echo GPU 0")
    code, output = clone.run(pip="print Collecting nvidia-cublas;print Collecting nvidia-cudnn")
    assert code == 0, output
    assert not any("constraints.txt" in word for word in clone.pip_calls()[-1])
    assert output.count("about 3 GB") == 1
    assert "Ctrl-C" not in output

    clone.add_program("nvidia-smi", "exit 9")
    assert clone.run() == (0, ""), "a driver that does not answer today costs no working .venv"


@pytest.mark.parametrize(
    "line",
    [
        "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (532.1 MB)",
        "Collecting nvidia-cublas==13.4.1.3",
    ],
)
def test_cuda_without_a_gpu_is_announced_with_the_way_out(clone: Clone, line: str) -> None:
    _, output = clone.run(pip=f"print {line};print Collecting nvidia-nccl-cu13")
    assert output.count("about 3 GB") == 1
    assert "PIP_EXTRA_INDEX_URL" in output
    assert output.index("about 3 GB") < output.index("done in")


def test_a_cpu_build_of_torch_is_no_news(clone: Clone) -> None:
    _, output = clone.run(
        pip="print   Downloading torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl (192.4 MB)"
    )
    assert "3 GB" not in output


def test_without_ensurepip_the_systems_pip_does_it(clone: Clone) -> None:
    code, output = clone.run()
    assert code == 0, output
    [call] = clone.pip_calls()
    assert call[:2] == ["--python", str(clone.root / ".venv" / "bin" / "python")]
    assert "pip" in call, "what was made without a pip gets one"


@pytest.mark.parametrize(("module", "pip"), [("venv", "26.3"), ("ensurepip", "22.0.2")])
def test_what_cannot_be_done_is_named_with_the_remedy(clone: Clone, module: str, pip: str) -> None:
    clone.add_module(
        "sitecustomize.py", HIDDEN.format(module=module, pip=pip)
    )  # 22.3 is the first pip with --python
    code, output = clone.run()
    assert code == 1
    assert len(output.splitlines()) == 1
    assert "sudo apt-get install python3-venv" in output
    assert not (clone.root / ".venv").exists()


def test_an_old_python_is_named_and_a_newer_one_taken(clone: Clone) -> None:
    clone.add_module("sitecustomize.py", "import sys; sys.version_info = (3, 9, 18, 'final', 0)")
    for name in ("python3.14", "python3.13", "python3.12", "python3.11"):
        clone.add_program(name, "exit 127")  # a pyenv shim without that version
    code, output = clone.run()
    assert code == 1
    assert "Python 3.11 or newer is needed; python3 is 3.9.18" in output
    assert "Traceback" not in output

    clone.add_program("python3.12", '[ "$1" = -c ] || echo taken: "$@"')
    assert clone.run("test") == (0, "taken: tools/setup_env.py test\n")
