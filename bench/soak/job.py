"""Faults of a job in memory: its data changes under it, a second process comes, memory runs out, gradients are not numbers."""

import os
import shutil
import struct
from functools import partial
from pathlib import Path

from . import causes, commands
from .place import Failed, Place, steps
from .scenario import Scenario, finish_from_newest, records

SHARD = Path("shards/train_000000.bin")


# ---- data


def running_on_shards(name: str, place: Place) -> None:
    """A shard is cut, changed or removed while training reads it, and put back."""
    place.take("shards")
    actions = {
        "cut": partial(causes.cut, SHARD, 2048),
        "changed": partial(zero, SHARD),
        "removed": partial(os.remove, SHARD),
    }
    ended = place.gpt(commands.SHARDED, partial(causes.at_step, 5, actions[name])).expect(0, 2)
    if ended.code == 2:
        ended.refused(SHARD.name)
    shutil.copy2(place.reference / SHARD, place.folder / SHARD)
    place.gpt(commands.RESUME).expect(0)
    place.require_equal("run", "sharded")


def zero(file: Path) -> None:
    """Overwrite the tokens of a shard in place: size and times stay."""
    times = file.stat()
    with file.open("r+b") as tokens:
        tokens.seek(1024)
        tokens.write(bytes(times.st_size - 1024))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def changed_between(name: str, place: Place) -> None:
    """Data that changed between two sessions at equal size and time is refused; put back, the run goes on."""
    place.take("shards")
    argv = commands.SHARDED if name == "shard" else commands.TRAIN
    place.gpt(argv, partial(causes.at_step, 8, causes.die)).expect(-9)
    file = place.folder / (SHARD if name == "shard" else commands.TEXT)
    original = file.read_bytes()
    causes.change(file)
    place.gpt(commands.RESUME).refused()
    times = file.stat()
    file.write_bytes(original)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    place.gpt(commands.RESUME).expect(0)
    place.require_equal("run", "sharded" if name == "shard" else "run")


def cached_shard(name: str, place: Place) -> None:
    """A shard in the cache is cut or changed between two sessions: refused by name, or made again."""
    place.gpt(commands.TRAIN, partial(causes.at_step, 8, causes.die)).expect(-9)
    (shard,) = (place.folder / "cache").glob("fusedgpt/tokens/*/train_000000.bin")
    causes.cut(shard, 4096) if name == "cut" else causes.change(shard)
    ended = place.gpt(commands.RESUME).expect(0, 2)
    if ended.code == 2:
        ended.refused()
        shutil.rmtree(place.folder / "cache")
        place.gpt(commands.RESUME).expect(0)
    place.require_equal("run")


def text_removed(place: Place) -> None:
    """The text goes while training runs: nothing reads it any more."""
    place.gpt(commands.TRAIN, partial(causes.at_step, 5, partial(os.remove, commands.TEXT))).expect(0)
    place.require_equal("run")


def foreign_shard(place: Place) -> None:
    """A shard of a later version."""
    place.take("shards")
    with (place.folder / SHARD).open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<i", 99))
    place.gpt(commands.SHARDED).refused(SHARD.name, "99")
    if place.run.exists():
        raise Failed("the refusal has left a run folder")


# ---- a second process


def second_process(place: Place) -> None:
    """The second process in a run folder is refused; the first one is not disturbed."""
    go, note = place.folder / "go", place.folder / "waiting"
    wait = partial(causes.at_step, 5, partial(causes.wait_for, go, note))
    first = place.start(commands.TRAIN, wait)
    try:
        while not note.exists() and first.process.is_alive():
            first.process.join(0.02)
        place.gpt(commands.RESUME).refused("run")
    finally:
        go.touch()
        ended = first.wait()
    ended.expect(0)
    place.require_equal("run")


def second_after_kill(place: Place) -> None:
    """The lock of a killed process does not outlive it."""
    place.gpt(commands.TRAIN, partial(causes.at_step, 5, causes.die)).expect(-9)
    finish_from_newest(place)


# ---- memory and numbers


def no_memory(name: str, place: Place) -> None:
    """Memory runs out: a clear message, and nothing half written."""
    more = {
        "for the model": ["--n-embd", "4096", "--n-head", "32"],
        "for a step": ["--batch-size", "4096", "--micro-batch", "4096"],
    }
    ended = place.gpt([*commands.TRAIN, *more[name]], partial(causes.limit_memory, 200 << 20))
    ended.refused("GiB")
    if place.run.exists():
        shutil.rmtree(place.run)
    place.finish()


def no_memory_later(place: Place) -> None:
    """Memory runs out in the middle of training, and is there again later."""
    ended = place.gpt(commands.TRAIN, partial(causes.at_step, 5, causes.exhaust_memory))
    ended.refused("memory")
    finish_from_newest(place)


def one_bad_step(place: Place) -> None:
    """NaN in the gradients of one step: it is skipped, counted and logged; training goes on."""
    place.gpt(commands.TRAIN, partial(causes.spoil_gradients, 5, 1)).expect(0)
    skipped = [record["skipped"] for record in records(place.run) if record.get("skipped")]
    if skipped != [1]:
        raise Failed(f"the log counts {skipped} skipped steps, not one")
    if b"NaN" in (place.run / "metrics.jsonl").read_bytes():
        raise Failed("NaN in metrics.jsonl, which JSON does not have")


def many_bad_steps(place: Place) -> None:
    """NaN from a step on: training stops with a report, and a checkpoint is there; its weights, which no skipped step has touched, go on."""
    argv = [*commands.TRAIN, "--max-skipped", "3"]
    place.gpt(argv, partial(causes.spoil_gradients, 7)).refused("skipped", "checkpoint of step")
    if not steps(place.run):
        raise Failed("no checkpoint")
    place.gpt(commands.RESUME).expect(0)
    if b"NaN" in (place.run / "metrics.jsonl").read_bytes():
        raise Failed("NaN in metrics.jsonl, which JSON does not have")


def diverging(place: Place) -> None:
    """A learning rate of 10,000: training does not end as if all were well while good checkpoints are lost."""
    ended = place.gpt([*commands.TRAIN, "--lr", "1e4", "--muon-lr", "1e4"]).expect(0, 2)
    if b"NaN" in (place.run / "metrics.jsonl").read_bytes():
        raise Failed("NaN in metrics.jsonl, which JSON does not have")
    if ended.code == 2:
        ended.refused()


SCENARIOS = (
    Scenario("data", "a shard is cut while running", partial(running_on_shards, "cut"), True),
    Scenario("data", "a shard is changed while running", partial(running_on_shards, "changed"), True),
    Scenario("data", "a shard is removed while running", partial(running_on_shards, "removed"), True),
    Scenario(
        "data",
        "a shard changed between sessions, equal size and time",
        partial(changed_between, "shard"),
        True,
    ),
    Scenario(
        "data", "a text changed between sessions, equal size and time", partial(changed_between, "text"), True
    ),
    Scenario("data", "a cached shard is cut between sessions", partial(cached_shard, "cut"), True),
    Scenario("data", "a cached shard is changed between sessions", partial(cached_shard, "changed"), True),
    Scenario("data", "the text is removed while running", text_removed),
    Scenario("data", "a shard of a newer version", foreign_shard),
    Scenario("processes", "a second process in a run folder", second_process, True),
    Scenario("processes", "a process after one that was killed", second_after_kill),
    Scenario("memory", "too little for the model", partial(no_memory, "for the model"), True),
    Scenario("memory", "too little for a step", partial(no_memory, "for a step"), True),
    Scenario("memory", "none left in the middle of training", no_memory_later, True),
    Scenario("numbers", "NaN in the gradients of one step", one_bad_step, True),
    Scenario("numbers", "NaN in all gradients from a step on", many_bad_steps, True),
    Scenario("numbers", "a learning rate of 10,000", diverging),
)
