"""Power cuts, replayed: what a run has written is followed event by event, and at each one a disk is made that keeps less.

A simple model of a file system. It keeps for sure what was flushed: the content of a file at its last fsync, the names in a
folder at the folder's last fsync. Of the rest it may keep all, nothing, or names without their content:

    flushed   nothing but what was flushed
    empty     all names; a file without its fsync is empty, an older one as it was flushed
    torn      all names; of what was not flushed the first half
    killed    everything: what kill -9 leaves, no power cut
"""

import hashlib
import json
import os
import re
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from . import commands
from .events import watch
from .place import Failed, Place
from .scenario import Scenario

Names = dict[str, int]  # of a folder: the inode of each
Tree = dict[str, bytes | None]  # by path; None: a folder
IGNORED = ("texts",)


class Disk:
    """The files of a folder as this process sees them, and as a disk without power would have them."""

    def __init__(self, folder: Path, states: Path) -> None:
        self.folder, self.states = folder, states
        self.contents: dict[int, bytes] = {}  # as flushed, by inode
        self.names: dict[int, Names] = {}  # as flushed, by inode of the folder
        self.open: dict[int, int] = {}  # an open file's inode is not used again
        self.seen: set[bytes] = set()
        self.number = 0
        names, _ = self._scan()
        self.names |= names
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    def event(self, name: str, flushed: int | None = None) -> None:
        """Something is about to change, or a file has been flushed: keep the states that a power cut may leave now."""
        self.number += 1
        promised = self._promised()
        for kind, tree in self.left(flushed).items():
            self._keep(f"{self.number:04d}-{kind}-{promised}-{name}", tree)

    def left(self, flushed: int | None = None) -> dict[str, Tree]:
        """What a power cut may leave now, by kind.

        Args:
            flushed: the inode of a file or folder that has just been flushed.
        """
        names, contents = self._scan()
        if flushed in names:
            self.names[flushed] = names[flushed]
        elif flushed in contents:
            self.contents[flushed] = contents[flushed]

        def old(inode: int) -> bytes:
            return self.contents.get(inode, b"")

        def now(inode: int) -> bytes:
            return contents.get(inode, b"")

        def torn(inode: int) -> bytes:
            before, after = old(inode), now(inode)
            return after[: (len(before) + len(after)) // 2] if after.startswith(before) else before

        root = self.folder.stat().st_ino
        kinds = {
            "flushed": (self.names, old),
            "empty": (names, old),
            "torn": (names, torn),
            "killed": (names, now),
        }
        return {kind: dict(self._tree(root, *parts)) for kind, parts in kinds.items()}

    def _promised(self) -> int:
        """The newest checkpoint that was finished for sure: training has logged a later step."""
        file = self.folder / "run" / "metrics.jsonl"
        logged = (
            [json.loads(line)["step"] for line in file.read_bytes().split(b"\n")[:-1]]
            if file.exists()
            else []
        )
        return max(0, max(logged, default=0) - 1) // commands.SAVES * commands.SAVES

    def _scan(self) -> tuple[dict[int, Names], dict[int, bytes]]:
        """Names by inode of the folder, contents by inode of the file, as they are."""
        names: dict[int, Names] = {}
        contents: dict[int, bytes] = {}
        for path, folders, files in os.walk(self.folder):
            if Path(path) == self.folder:
                folders[:] = [folder for folder in folders if folder not in IGNORED]
            found = names[os.stat(path).st_ino] = {}
            for name in (*folders, *files):
                descriptor = os.open(os.path.join(path, name), os.O_RDONLY)
                inode = found[name] = os.fstat(descriptor).st_ino
                if name in files:
                    size = os.fstat(descriptor).st_size
                    contents[inode] = os.pread(descriptor, size, 0)
                else:
                    names.setdefault(inode, {})
                if self.open.setdefault(inode, descriptor) != descriptor:
                    os.close(descriptor)
        return names, contents

    def _tree(
        self, inode: int, names: dict[int, Names], content: Callable[[int], bytes], path: str = ""
    ) -> Iterator[tuple[str, bytes | None]]:
        for name, child in names.get(inode, {}).items():
            if name in IGNORED:
                continue
            folder = stat.S_ISDIR(os.stat(self.open[child]).st_mode)
            yield f"{path}{name}", None if folder else content(child)
            if folder:
                yield from self._tree(child, names, content, f"{path}{name}/")

    def _keep(self, name: str, tree: Tree) -> None:
        digest = hashlib.sha256(repr(sorted(tree.items())).encode()).digest()
        if digest in self.seen:
            return
        self.seen.add(digest)
        folder = self.states / name
        folder.mkdir()
        for path, data in tree.items():
            if data is None:
                (folder / path).mkdir()
            else:
                (folder / path).write_bytes(data)


def record(states: Path) -> None:
    """Follow this process's changes in its working folder; in a forked process, before the command."""
    disk, flush = Disk(Path.cwd(), states), os.fsync
    inodes: list[int] = []

    def noting(file: object) -> None:
        inodes.append(os.fstat(file if isinstance(file, int) else file.fileno()).st_ino)  # type: ignore[attr-defined]
        flush(file)  # type: ignore[arg-type]

    os.fsync = noting  # type: ignore[assignment]
    watch(Path.cwd(), lambda name: disk.event(name, inodes.pop() if name == "flush" else None))


def replay(state: Path, reference: Path) -> None:
    """Go on from a state as a supervisor does: the run continues or begins, loses no finished checkpoint, and ends as it is to.

    Raises:
        Failed: it does not.
    """
    place, promised = Place(state.with_name(f"{state.name}-on"), reference), int(state.name.split("-")[2])
    for path in state.iterdir():
        path.rename(place.folder / path.name)
    ended = place.go_on().expect(0)
    found = re.search(r"continued from step ([\d,]+)", ended.output)
    if promised and (not found or int(found[1]) < promised):
        raise Failed(f"step {promised} was saved; {found[0] if found else 'begun anew'}")
    place.require_equal("run")
    shutil.rmtree(place.folder)


def power_cuts(part: int, parts: int, place: Place) -> int:
    """Cut the power at each event of a run, or at every so many-th of them; returns the number of states tried."""
    states = place.folder.with_name(f"{place.folder.name}-states")
    states.mkdir()
    place.gpt(commands.TRAIN, partial(record, states)).expect(0)
    chosen = sorted(states.iterdir())[part::parts]
    wrong = []
    for state in chosen:
        try:
            replay(state, place.reference)
        except Failed as failure:
            wrong.append(f"{state.name}: {failure}")
    if wrong:
        raise Failed(f"{len(wrong)} of {len(chosen)} states: {'; '.join(wrong)}")
    shutil.rmtree(states)
    return len(chosen)


PARTS = 8
SCENARIOS = (
    *(
        Scenario("power cut", f"states {part + 1}, {part + 1 + PARTS}, ...", partial(power_cuts, part, PARTS))
        for part in range(PARTS)
    ),
    Scenario("power cut", "every 40th state", partial(power_cuts, 25, 40), True),
)
