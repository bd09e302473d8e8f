"""What a scenario is: a fault, and the check that causes it and holds the program to what docs/reliability.md promises."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import commands
from .place import Ended, Failed, Place, differences, steps

Check = Callable[
    [Place], int | None
]  # returns how many faults it has caused (None: one), raises Failed, or Skipped where it cannot be tried here


class Scenario(NamedTuple):
    """A fault of docs/reliability.md's table."""

    group: str
    fault: str
    check: Check
    quick: bool = False  # also a part of `make test`


def resumed_from_newest(place: Place, ended: Ended) -> None:
    """Raise Failed unless a resumed run began at its newest checkpoint: none was half written."""
    newest = steps(place.run)[-1:]
    if newest and newest[0] and f"continued from step {newest[0]:,}" not in ended.output:
        raise Failed(f"did not continue from step {newest[0]}: {ended.output[:600]}")


def finish_from_newest(place: Place, *passing: str) -> None:
    """Go on to the last step from the newest checkpoint; the run then equals one without faults."""
    newest = steps(place.run)[-1:]
    ended = place.go_on().expect(0)
    if newest and newest[0] and newest[0] < commands.STEPS:
        ended.says(f"continued from step {newest[0]}")
    place.require_equal("run", passing=passing)


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Raise Failed where the block changes anything in a folder: a refusal rewrites nothing."""
    before = folder.with_name(f"{folder.name}-before")
    shutil.copytree(folder, before, symlinks=True)
    yield
    found = list(differences(folder, before))
    shutil.rmtree(before)
    if found:
        raise Failed(f"the refusal has changed the run: {'; '.join(found[:5])}")


def records(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl; Failed where one is no record."""
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise Failed(f"a line of metrics.jsonl is no record: {error}") from None
