"""The kill loop: kill -9 at a random moment of a command, go on as a supervisor would, compare with a run that was never killed.

A moment is a time, or a change of a file, before which the process kills itself: between two of them lies what can be half
done. Half of them are killed twice, the second time while going on.
"""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import causes, commands
from .place import LENGTHS, Ended, Failed, Place


class Length(NamedTuple):
    """How long a job is where nothing kills it."""

    seconds: float
    events: int


class Kill(NamedTuple):
    """A job that was killed once or twice: the moments, and what was wrong in the end (empty: nothing)."""

    job: str
    moments: tuple[str, ...]
    problem: str


def length(job: commands.Job, reference: Path) -> Length:
    """That of a job while its reference was made."""
    return Length(*json.loads((reference / LENGTHS).read_text())[job.name])


def kill(job: commands.Job, place: Place, seed: int) -> Kill:
    """Kill a job at moments drawn with `seed`, go on, compare; the folder stays where something is wrong."""
    draw, moments = random.Random(seed), list[str]()
    whole = length(job, place.reference)
    place.take_needs(job)
    result, command = place.folder / job.makes, job.command
    try:
        for _ in range(draw.choice((1, 2))):
            ended = _killed(place, command, whole, draw, moments)
            if ended.code != -9:  # it came too late
                ended.expect(0)
            if result.exists():
                if not job.again:
                    break
                command = job.again
        if job.again or not result.exists():
            place.gpt(command).expect(0)
        place.require_equal(job.makes, job.reference)
    except Failed as failure:
        return Kill(job.name, tuple(moments), str(failure))
    shutil.rmtree(place.folder)
    return Kill(job.name, tuple(moments), "")


def _killed(
    place: Place, command: list[str], whole: Length, draw: random.Random, moments: list[str]
) -> Ended:
    if draw.random() < 0.5:
        number = draw.randint(1, whole.events)
        moments.append(f"before change {number} of {whole.events}")
        return place.gpt(command, partial(causes.at_event, number, causes.die))
    seconds = draw.uniform(0, 1.05 * whole.seconds)
    moments.append(f"after {seconds:.3f} of {whole.seconds:.3f} s")
    child = place.start(command)
    child.process.join(seconds)
    child.process.kill()
    return child.wait()
