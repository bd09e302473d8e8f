"""Damaged files in every position of a run folder: refused or skipped with their name, never loaded."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import commands
from .place import Failed, Place
from .scenario import Scenario, finish_from_newest, unchanged

NEWEST, OLDER = "checkpoints/step-000006", "checkpoints/step-000003"  # of the reference's stopped run
CHECKPOINT = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
LOGS = ("metrics.jsonl", "samples.txt")
FILES = ("config.toml", "tokenizer.json", *LOGS, *(f"{NEWEST}/{name}" for name in CHECKPOINT))
Damage = Callable[[Path], None]


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 100)


def flip(file: Path) -> None:
    """Flip the lowest bit of a byte: in text a letter or digit becomes another one."""
    data = bytearray(file.read_bytes())
    place = next(i for i in range(len(data) * 3 // 4, len(data)) if chr(data[i]).isalnum())
    data[place] ^= 1
    file.write_bytes(data)


def foreign(file: Path) -> None:
    file.write_bytes(b"<!doctype html><title>404 Not Found</title>\n")


def other_file(file: Path) -> None:
    """Another file of the same folder, well-formed in its own place."""
    other = {"model.safetensors": "optimizer.safetensors", "optimizer.safetensors": "model.safetensors"}
    other |= {"state.json": "manifest.json", "manifest.json": "state.json", "config.toml": "tokenizer.json"}
    other |= {"tokenizer.json": "config.toml", "metrics.jsonl": "samples.txt", "samples.txt": "metrics.jsonl"}
    shutil.copyfile(file.with_name(other[file.name]), file)


def other_step(file: Path) -> None:
    """The same file of another checkpoint."""
    if file.parent.name.startswith("step-"):
        shutil.copyfile(file.parent.with_name(Path(OLDER).name) / file.name, file)


def future(file: Path) -> None:
    """What a newer version may write: another number of the format where there is one, an unknown setting."""
    if file.suffix == ".json":
        content = json.loads(file.read_bytes())
        for key in content.keys() & {"format", "version"}:
            file.write_text(json.dumps(content | {key: 99}))
    elif file.suffix == ".toml":
        file.write_text("format = 99\n" + file.read_text())
    elif file.suffix == ".safetensors":
        data = file.read_bytes()
        file.write_bytes(b"\x09" + data[1:])


def remove(file: Path) -> None:
    file.unlink()


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGES: dict[str, Damage] = {
    "empty": empty,
    "half of it": halve,
    "longer": lengthen,
    "a flipped bit": flip,
    "a web page": foreign,
    "another file of its folder": other_file,
    "that of another step": other_step,
    "of a newer version": future,
    "missing": remove,
    "a folder": folder,
    "a pipe": pipe,
}


def damaged(name: str, damage: Damage, place: Place) -> None:
    """Resume a stopped run with a damaged file.

    Either it is refused by name, nothing is rewritten, and with the file put back it goes on; or the run ends equal to one
    without damage, having named what it skipped. A log may differ in what was damaged in it.
    """
    place.take("stopped", "run")
    file = place.run / name
    damage(file)
    if file.is_file() and file.read_bytes() == (place.reference / "stopped" / name).read_bytes():
        return  # nothing of this kind can happen to it
    before = place.folder / "run-damaged"
    shutil.move(place.run, before)  # copytree would wait for a pipe
    shutil.move(before, place.run)
    ended = place.gpt(commands.RESUME).expect(0, 2)
    own = (file.name,) if name in LOGS else ()
    if ended.code == 0:
        if name.startswith(NEWEST) and "step-000006" not in ended.output:
            raise Failed(f"a damaged {name} was passed over in silence")
        place.require_equal("run", passing=own)
        return
    ended.refused(file.name)
    if file.is_dir():
        file.rmdir()
    elif file.exists():
        file.unlink()
    shutil.copyfile(place.reference / "stopped" / name, file)
    finish_from_newest(place)


def all_damaged(place: Place) -> None:
    """No checkpoint is whole: the run is refused, never begun anew, and nothing is rewritten."""
    place.take("stopped", "run")
    for step in (NEWEST, OLDER):
        flip(place.run / step / "model.safetensors")
    with unchanged(place.run):
        place.gpt(commands.RESUME).refused("model.safetensors")
    shutil.rmtree(place.run)
    place.take("stopped", "run")
    finish_from_newest(place)


def spare(name: str, content: bytes, place: Place) -> None:
    """A file that is not the program's own lies in the run folder: it changes nothing and stays."""
    place.take("stopped", "run")
    file = place.run / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    place.gpt(commands.RESUME).expect(0)
    if name != ".lock" and file.read_bytes() != content:
        raise Failed(f"{name} was changed")
    place.require_equal("run", passing=(file.name, file.parent.name) if "/" in name else (file.name,))


QUICK = {
    ("config.toml", "half of it"), ("tokenizer.json", "a flipped bit"), ("metrics.jsonl", "half of it"), ("samples.txt", "a pipe"),
    *((f"{NEWEST}/{name}", "a flipped bit") for name in CHECKPOINT),
    (f"{NEWEST}/model.safetensors", "that of another step"), (f"{NEWEST}/optimizer.safetensors", "another file of its folder"),
    (f"{NEWEST}/optimizer.safetensors", "missing"), (f"{NEWEST}/manifest.json", "of a newer version"),
}  # fmt: skip
SCENARIOS = (
    *(
        Scenario("damaged files", f"{name}: {what}", partial(damaged, name, damage), (name, what) in QUICK)
        for name in FILES
        for what, damage in DAMAGES.items()
    ),
    *(
        Scenario("damaged files", f"{OLDER}/{name}: a flipped bit", partial(damaged, f"{OLDER}/{name}", flip))
        for name in CHECKPOINT
    ),
    Scenario("damaged files", "every checkpoint", all_damaged, True),
    Scenario("damaged files", ".lock of another program", partial(spare, ".lock", b"\xff" * 99)),
    Scenario("damaged files", "a foreign file", partial(spare, "notes.txt", b"mine")),
    Scenario("damaged files", "a foreign folder step-12", partial(spare, "checkpoints/step-12/x", b"mine")),
)
