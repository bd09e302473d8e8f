"""Makes `.venv` and installs this project there, editable: `python3 tools/setup_env.py [EXTRA ...]`, the Makefile's first step.

It exists so that a fresh clone needs Python and make, nothing else: standard library only. Silent when there is nothing to do.
It lies in a folder of its own because a module at the root would be one of the package.
- `.venv/set-up.log` is the first file written (so a `.venv` with it is ours), `.venv/set-up.json` the last: what was installed, for
  which Python, from which pyproject.toml and constraints.txt. Without that stamp `.venv` is half-made, and built anew.
- Changed project files or a new extra: pip runs again in the same `.venv`. Another Python, a moved clone or a GPU that was not
  there before: built anew.
"""

import os
import subprocess
import sys

# Before anything that an older Python would stumble over: it has to read this file far enough to say what is missing.
if sys.version_info < (3, 11):  # noqa: UP036
    for newer in ("python3.14", "python3.13", "python3.12", "python3.11"):
        try:
            subprocess.check_output([newer, "-c", ""], stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            continue
        os.execvp(newer, [newer, *sys.argv])
    have = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        f"set-up: Python 3.11 or newer is needed; python3 is {have} ({sys.executable}) and no newer one is on PATH.\n"
        "set-up: install one, or put its folder on PATH, then run make again."
    )

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "set-up.log"
STAMP = VENV / "set-up.json"
OLD = ROOT / ".venv.old"  # on its way out

WIPE = "\r\x1b[K" if sys.stdout.isatty() else ""  # takes pip's current step off the terminal's last line

# pip's lines that announce a CUDA build of torch, before it is fetched. Where the index offers metadata, all is resolved before the
# first large file and "Collecting nvidia-..." comes in time; where it does not, the size of torch's own wheel tells (CPU: 200 MB).
CUDA_LINE = re.compile(r"Collecting nvidia-|Downloading torch-\S+ \((?:[4-9]\d\d|\d{4,})\.\d MB\)")
CUDA_NOTICE = (
    "this torch brings NVIDIA's CUDA libraries: about 3 GB to download and 6 GB in {venv} ({free:.0f} GB free)",
    "no GPU here uses them. To do without: Ctrl-C, then give pip the index of CPU builds that PyTorch's installation page names "
    "(PIP_EXTRA_INDEX_URL=...) and run make again",
)


def say(message: str) -> None:
    print(f"{WIPE}set-up: {message}", flush=True)


def fail(message: str) -> NoReturn:
    sys.exit(f"{WIPE}set-up: {message}")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[int]:
    """Holds `.venv.lock`, waiting for another set-up of this clone; gives the lock's descriptor."""
    with (ROOT / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another make that is setting up .venv")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def read_stamp() -> dict:
    """The stamp of a finished `.venv`, or {}."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def python_of_venv() -> str:
    """The version `.venv/bin/python` reports; empty where it does not run (its base interpreter was removed, say)."""
    ask = [PYTHON, "-c", "import sys; print(sys.version)"]
    try:
        return subprocess.run(ask, capture_output=True, text=True).stdout
    except OSError:
        return ""


def gpu_answers() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def system_pip_installs_elsewhere() -> bool:
    """Whether this interpreter has a pip that knows `--python` (22.3 on)."""
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= (22, 3)


def follow(command: list, lock: int, gpu: bool) -> None:
    """Runs a command with its output in the log, its current step on the terminal, and the CUDA notice when its time comes.

    The lock goes to the child too: a pip that outlives a killed make keeps the next one out.
    """
    noticed = False
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with LOG.open("a") as log, subprocess.Popen(command, **pipes, text=True, pass_fds=[lock]) as child:
        for line in child.stdout:
            log.write(line)
            if not noticed and CUDA_LINE.search(line):
                noticed = True
                free = shutil.disk_usage(ROOT).free / 1e9
                for notice in CUDA_NOTICE[: 1 if gpu else 2]:
                    say(notice.format(venv=VENV, free=free))
            if WIPE and line.lstrip().startswith(("Collecting", "Downloading", "Installing", "Building")):
                width = shutil.get_terminal_size().columns - 1
                print(f"{WIPE}{line.strip()[:width]}", end="", flush=True)
    if child.returncode:
        print(f"{WIPE}...", *LOG.read_text().splitlines()[-15:], sep="\n", flush=True)
        fail(f"{' '.join(map(str, command[1:4]))} failed: above, the end of {LOG}. make starts it over.")


def set_up(extras: set[str], lock: int) -> None:
    """Brings `.venv` to where it holds this project with `extras`."""
    began = time.monotonic()
    stamp = read_stamp()
    # A GPU once seen counts: a driver that does not answer today must not cost a working .venv.
    place = {"root": str(ROOT), "python": python_of_venv(), "gpu": bool(stamp.get("gpu")) or gpu_answers()}
    sources = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    wanted = place | {
        "sources": hashlib.sha256(sources).hexdigest(),
        "extras": sorted(extras.union(stamp.get("extras", ()))),
    }
    if wanted == stamp:
        return

    if OLD.exists():
        shutil.rmtree(OLD)
    if VENV.is_symlink() or (VENV.exists() and not LOG.exists()):
        fail(f"{VENV} was not made by this script. Move it away, or use it: make PYTHON={PYTHON} ...")
    ensurepip, own_pip = importlib.util.find_spec("ensurepip"), system_pip_installs_elsewhere()
    if not importlib.util.find_spec("venv") or not (ensurepip or own_pip):
        fail("this Python has no venv or no pip. On Debian and Ubuntu: sudo apt-get install python3-venv")
    # Debian keeps ensurepip in python3-venv: without it the system's pip fills a .venv that begins without one.
    pip = [PYTHON, "-m", "pip"] if ensurepip else [sys.executable, "-m", "pip", "--python", PYTHON]

    if any(stamp.get(key) != value for key, value in place.items()):
        if VENV.exists():
            say(f"replacing .venv: {'its Python, place or GPU has changed' if stamp else 'it is half-made'}")
            VENV.rename(OLD)  # at once: a .venv half-deleted could not be told from somebody else's
            shutil.rmtree(OLD)
        say(f"making .venv with Python {'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")
        VENV.mkdir()
        LOG.touch()
        bare = [] if ensurepip else ["--without-pip"]
        follow([sys.executable, "-m", "venv", *bare, VENV], lock, place["gpu"])
    else:
        say("updating .venv: a new extra, or pyproject.toml or constraints.txt has changed")
        STAMP.unlink()

    name = "fusedgpt" + (f"[{','.join(wanted['extras'])}]" if wanted["extras"] else "")
    torch = "the newest torch, for the GPU" if place["gpu"] else "the torch of constraints.txt (no GPU found)"
    say(f"installing {name} with {torch}; pip's words are in {LOG.relative_to(ROOT)}")
    target = f"{ROOT}{name.removeprefix('fusedgpt')}"
    pinned = [] if place["gpu"] else ["--constraint", ROOT / "constraints.txt"]
    follow([*pip, "install", "--no-input", *pinned, "pip", "--editable", target], lock, place["gpu"])

    wanted["python"] = python_of_venv()
    half = STAMP.with_suffix(".tmp")
    half.write_text(json.dumps(wanted, indent=1))
    half.replace(STAMP)
    say(f"done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    if Path(sys.prefix).resolve() == VENV:  # activated: only the Python beneath it can replace it
        base = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        os.execv(base, [base, *sys.argv])
    try:
        with one_at_a_time() as held:
            set_up(set(sys.argv[1:]), held)
    except KeyboardInterrupt:
        fail("stopped; the next make starts it over")
