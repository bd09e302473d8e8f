"""The soak's own parts: what it compares, what its model of a disk keeps, and that a failure is counted and ends with 1."""

import os
import shutil
from pathlib import Path

import pytest

from fusedgpt.bench import readme
from fusedgpt.bench.soak import powercut, report, run
from fusedgpt.bench.soak.place import Ended, Failed, Place, differences
from fusedgpt.bench.soak.scenario import Scenario


def test_a_difference_is_seen_in_every_file_but_not_of_the_clock(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    (one / "checkpoints" / "step-000001").mkdir(parents=True)
    (one / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens_per_second": 10}\n')
    (one / "checkpoints" / "step-000001" / "model.safetensors").write_bytes(b"abc")
    shutil.copytree(one, other)
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "tokens_per_second": 11}\n')
    assert not list(differences(one, other))
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 2.25, "tokens_per_second": 10}\n')
    (other / "checkpoints" / "step-000001" / "model.safetensors").write_bytes(b"abd")
    (other / ".step.tmp").mkdir()
    assert list(differences(other, one)) == [
        ".step.tmp is left over",
        "model.safetensors has other content",
        "metrics.jsonl has other content",
    ]


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (1, "error: a.bin is empty"),
        (2, "a.bin is empty"),
        (2, "error: b.bin is empty"),
        (2, "error: a.bin is empty\nbut only in part"),
        (2, "Traceback (most recent call last):\nerror: a.bin is empty"),
        (2, f"error: a.bin {'x' * 500}"),
    ],
)
def test_a_refusal_is_one_line_with_code_2_and_the_file(code: int, output: str) -> None:
    Ended(2, "hello\nerror: a.bin is empty\n", 0.0).refused("a.bin")
    with pytest.raises(Failed):
        Ended(code, output, 0.0).refused("a.bin")


def test_a_disk_without_power_keeps_what_was_flushed(tmp_path: Path) -> None:
    """A file as of its last fsync, a name as of its folder's."""
    folder = tmp_path / "folder"
    folder.mkdir()
    disk = powercut.Disk(folder, tmp_path)
    (folder / "a").write_bytes(b"12345678")
    assert disk.left() == {
        "flushed": {},
        "empty": {"a": b""},
        "torn": {"a": b"1234"},
        "killed": {"a": b"12345678"},
    }
    assert disk.left(os.stat(folder / "a").st_ino)["flushed"] == {}, "the name is not"
    assert disk.left(os.stat(folder).st_ino)["flushed"] == {"a": b"12345678"}
    with (folder / "a").open("ab") as file:
        file.write(b"9abc")
    (folder / "b").write_bytes(b"new")
    os.replace(folder / "b", folder / "a")
    left = disk.left()
    assert left["flushed"] == {"a": b"12345678"}, "the rename is not flushed"
    assert left["empty"] == {"a": b""}
    (folder / "a").unlink()
    assert disk.left()["flushed"] == {"a": b"12345678"}
    assert disk.left(os.stat(folder).st_ino)["flushed"] == {}


def test_the_states_of_a_disk_tell_which_checkpoint_is_promised(tmp_path: Path) -> None:
    """That of step 6 once step 7 has been logged; each state is written once."""
    (tmp_path / "folder" / "run").mkdir(parents=True)
    (tmp_path / "states").mkdir()
    disk = powercut.Disk(tmp_path / "folder", tmp_path / "states")
    for step in (6, 7):
        with (tmp_path / "folder" / "run" / "metrics.jsonl").open("a") as log:
            log.write(f'{{"step": {step}}}\n')
        disk.event("open")
        disk.event("open")
    names = sorted(state.name for state in (tmp_path / "states").iterdir())
    assert [name for name in names if "killed" in name] == ["0001-killed-3-open", "0003-killed-6-open"]


def test_a_failure_is_counted_and_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Place) -> None:
        raise Failed("lost")

    def breaks(_: Place) -> None:
        raise KeyError("a mistake in the scenario")

    scenarios = (Scenario("a", "b", fails), Scenario("a", "c", breaks), Scenario("a", "d", lambda _: 7))
    monkeypatch.setattr(run, "SCENARIOS", scenarios)
    outcomes = [
        run.try_scenario(number, Place(place.folder / str(number), place.reference)) for number in range(3)
    ]
    tally = run.Tally()
    for outcome in outcomes:
        tally.add(("fault", "a"), outcome.tried, outcome.problem, outcome.skipped)
    assert tally.rows() == [
        {"benchmark": "soak", "name": "fault", "case": "a", "tried": 9, "survived": 7, "skipped": 0}
    ]
    assert [Path(place.folder, name).exists() for name in "012"] == [True, True, False]
    assert len(tally.problems) == 2


def test_a_run_that_differs_is_noticed(place: Place) -> None:
    """A file of the reference is changed: as if the run had come out otherwise."""
    place.finish()
    (place.run / "samples.txt").write_text("other")
    with pytest.raises(Failed, match=r"samples\.txt has other content"):
        place.require_equal("run")


def test_the_page_shows_the_newest_records(tmp_path: Path) -> None:
    """Counts of kills and faults a row each, mutated inputs in one, and what saving costs."""
    about = {"date": "2026-01-02", "versions": {"device": "a CPU", "torch": "2"}, "commit": "abc"}
    counts = [
        ("kill -9", "training", 8, 8, 0),
        ("input", "config", 900, 900, 0),
        ("input", "shard", 100, 99, 0),
    ]
    names = ("name", "case", "tried", "survived", "skipped")
    rows = [dict(zip(names, row, strict=True)) for row in counts]
    costs = [{"case": "tiny", "side": "in place", "step": 20.0, "milliseconds": 50.0, "share": 0.005}]
    soak = {**about, "kind": "soak", "rows": rows, "minutes": 30.0, "seed": 0}
    newest = {
        "soak": (tmp_path / "soak.json", soak),
        "saving": (tmp_path / "saving.json", {**about, "kind": "saving", "rows": costs}),
    }
    lines = report.block(newest).splitlines()
    assert "| kill -9 | training | 8 | 8 | – |" in lines
    assert "| mutated input | 2 kinds of files and flags | 1,000 | 999 | – |" in lines
    assert "| **all** |  | 1,008 | 1,007 | – |" in lines
    assert "| tiny | in place | 20.0 ms | 50.0 ms | 0.50% |" in lines
    assert readme.blocks(newest, tmp_path)["docs/reliability.md"] == report.block(newest)
    assert readme.blocks(newest, tmp_path)["README.md"] == ""
