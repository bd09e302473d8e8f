"""Faults of the disk: full, over quota, not writable; folders and files that go away under a running job."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import causes, commands
from .place import Failed, Place, Skipped, steps
from .scenario import Scenario, finish_from_newest, records

NOBODY = 65534
PAGE = 4096


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("a file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def full(share: float, place: Place) -> None:
    """A disk with room for so much of what a run takes. With more room it goes on."""
    files = [file for file in (place.reference / "run").rglob("*") if file.is_file()]
    size = int(share * sum(-(-file.stat().st_size // PAGE) * PAGE for file in files)) // PAGE * PAGE
    disk, run = place.folder / "disk", place.folder / "disk" / "run"
    train = [*commands.TRAIN[:-1], str(run)]
    with small_disk(disk, max(size, PAGE)):
        ended = place.gpt(train)
        lost: tuple[str, ...] = ()
        if ended.code == 0:  # what failed was a sample or a picture
            lost = ("samples.txt",) if "samples.txt" in ended.output else ()
        else:
            ended.refused("No space left on device", "disk")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, capture_output=True)
        newest = steps(run)[-1:]
        if run.exists():
            ended = place.gpt(["train", "--resume", str(run)]).expect(0)
            if newest and 0 < newest[0] < commands.STEPS:
                ended.says(f"continued from step {newest[0]}")
        else:
            place.gpt(train).expect(0)
        place.require_equal("disk/run", "run", lost)


def quota_between_files(place: Place) -> None:
    """The model of a checkpoint can be written, its optimizer cannot: training ends, and goes on once there is room."""
    place.gpt(commands.TRAIN, _quota(place, 5)).refused("optimizer.safetensors", "File too large")
    finish_from_newest(place)


def quota_and_on(place: Place) -> None:
    """The same where the configuration says to go on: the next checkpoint is written."""
    argv = [*commands.TRAIN, "--on-save-error", "continue"]
    lift = partial(causes.at_step, 7, causes.lift_limit)
    place.gpt(argv, _quota(place, 5), lift).expect(0).says("File too large")
    place.require_equal("run", passing=("config.toml", "state.json", "manifest.json"))


def quota_in_background(place: Place) -> None:
    """A checkpoint that cannot be written in the background: training says so at the next one, and goes on later."""
    ended = place.gpt(commands.BACKGROUND, _quota(place, 5))
    ended.refused("optimizer.safetensors", "File too large")
    place.go_on().expect(0)
    place.require_equal("run", "background")


def _quota(place: Place, step: int) -> partial[None]:
    sizes = [
        (place.reference / "stopped" / "checkpoints" / "step-000006" / f"{name}.safetensors").stat().st_size
        for name in ("model", "optimizer")
    ]
    return partial(causes.at_step, step, partial(causes.limit_files, sum(sizes) // 2))


def short_write(place: Place) -> None:
    """The log takes a part of a record only: nothing of it stays, and training says so."""
    limit = partial(causes.limit_growth, Path("run/metrics.jsonl"), 40)
    place.gpt(commands.TRAIN, partial(causes.at_step, 5, limit)).refused("File too large")
    records(place.run)
    finish_from_newest(place)


def _as_nobody(place: Place) -> partial[None]:
    if os.getuid():
        raise Skipped("only root can become another user")
    for path in (place.folder, *place.folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    return partial(causes.become, NOBODY)


def unwritable(place: Place) -> None:
    """A run folder cannot be created: refused, and nothing is left."""
    nobody = _as_nobody(place)
    place.folder.chmod(0o555)
    place.gpt(commands.TRAIN, nobody).refused("Permission denied")
    place.folder.chmod(0o755)
    if place.run.exists():
        raise Failed("something is left of the run")
    place.gpt(commands.TRAIN, nobody).expect(0)
    place.require_equal("run")


def unwritable_run(place: Place) -> None:
    """A run folder that cannot be written is not continued."""
    place.take("stopped", "run")
    nobody = _as_nobody(place)
    place.run.chmod(0o555)
    place.gpt(commands.RESUME, nobody).refused("run", "Permission denied")
    place.run.chmod(0o755)
    finish_from_newest(place)


def unwritable_checkpoints(place: Place) -> None:
    """The folder of the checkpoints loses its permission while training runs."""
    nobody = _as_nobody(place)
    lock = partial(causes.at_step, 5, partial(os.chmod, "run/checkpoints", 0o555))
    place.gpt(commands.TRAIN, nobody, lock).refused("checkpoints", "Permission denied")
    (place.run / "checkpoints").chmod(0o755)
    finish_from_newest(place)


def removed(place: Place) -> None:
    """The run folder is removed while training runs: it ends with an error instead of training into nothing."""
    place.gpt(commands.TRAIN, partial(causes.at_step, 4, partial(shutil.rmtree, "run"))).refused("run")
    place.finish()


def moved(place: Place) -> None:
    """The run folder is moved while training runs; moved back, it goes on."""
    place.gpt(commands.TRAIN, partial(causes.at_step, 4, partial(os.rename, "run", "moved"))).refused("run")
    if place.run.exists():
        raise Failed("another run folder has appeared")
    (place.folder / "moved").rename(place.run)
    finish_from_newest(place)


def lost_file(name: str, place: Place) -> None:
    """A file or folder of the run goes while training runs: it ends or goes on, and nothing is lost but that."""
    action = partial(shutil.rmtree if name == "checkpoints" else os.remove, f"run/{name}")
    ended = place.gpt(commands.TRAIN, partial(causes.at_step, 5, action)).expect(0, 2)
    if ended.code == 2:
        ended.refused("run")
    if name != "checkpoints" and not (place.run / name).exists():
        shutil.copy2(place.reference / "run" / name, place.run / name)
    place.finish()


SCENARIOS = (
    *(
        Scenario("disk", f"full: room for {share:.0%} of a run", partial(full, share), share in (0.35, 0.8))
        for share in (0.01, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.1, 1.3)
    ),
    Scenario("disk", "quota between model and optimizer", quota_between_files, True),
    Scenario("disk", "the same, --on-save-error continue", quota_and_on, True),
    Scenario("disk", "the same, --async-save", quota_in_background, True),
    Scenario("disk", "a short write in the log", short_write, True),
    Scenario("disk", "a folder that cannot be written", unwritable, True),
    Scenario("disk", "a run that cannot be written is resumed", unwritable_run, True),
    Scenario("disk", "checkpoints/ loses its permission", unwritable_checkpoints, True),
    Scenario("run folder", "removed while running", removed, True),
    Scenario("run folder", "moved while running", moved, True),
    Scenario("run folder", "config.toml removed while running", partial(lost_file, "config.toml")),
    Scenario("run folder", "tokenizer.json removed while running", partial(lost_file, "tokenizer.json")),
    Scenario("run folder", "checkpoints/ removed while running", partial(lost_file, "checkpoints")),
)
