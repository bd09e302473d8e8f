"""Rows, goals, the model's error and pages of `bench counts`, from launches made up by hand; and no kernel is worse than the committed counts."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.bench import readme
from fusedgpt.bench.__main__ import main
from fusedgpt.bench.compare import run_compare
from fusedgpt.bench.counts import goals, known, pages, regression, report, run
from fusedgpt.bench.counts.measure import Measured
from fusedgpt.bench.counts.pictures import counts_picture
from fusedgpt.bench.counts.rates import GPUS
from fusedgpt.bench.counts.work import Work
from fusedgpt.bench.emulator.run import processes
from fusedgpt.bench.ops.harness import BACKWARD, BOTH, FORWARD
from fusedgpt.bench.traffic import Operation

SIZES: dict[str, float] = {"M": 65536, "C": 768}
LEAST = 2 * 2 * 65536 * 768 + 8 * 65536.0  # bytes of LayerNorm's forward
LIGER = "liger-kernel 0.1"
UNASKED = "bytes moved for nothing"


def work(instructions: float = 1e6, moved: float = LEAST, **changes: Any) -> Work:
    made = Work(
        kernel="a_kernel",
        grid=(528, 1, 1),
        warps=4,
        registers=64,
        spilled=0,
        shared_bytes=1024,
        instructions={"float": instructions},
        tensor_flops=0.0,
        special=0.0,
        asked_bytes=moved,
        sectors=moved / 32,
        dram_read=moved / 2,
        dram_written=moved / 2,
        shared_wavefronts=100.0,
        shared_at_best=100.0,
        matrix_shared_bytes=0.0,
        barriers=4.0,
        in_flight=0.0,
    )
    return replace(made, **changes)


def row(
    side: str, *works: Work, name: str = "layer_norm", direction: str = FORWARD, **more: Any
) -> report.Row:
    sizes = more.pop("sizes", SIZES)
    measured = Measured(name, sizes, direction, side, list(works), more.pop("library", []))
    return report.row_of(measured, "sm_90", [GPUS["H200"], GPUS["H100"]])


def record(*rows: report.Row, date: str = "2026-11-24") -> dict[str, Any]:
    versions = {"device": "PTX emulator, sm_90", "torch": "2", "triton": "3.9.0"}
    return {"kind": "counts", "date": date, "commit": "abc", "versions": versions, "rows": list(rows)}


def test_the_librarys_matmuls_stand_apart_and_its_passes_do_not() -> None:
    library = [Operation("mm", 10**9, 10**9, flops=10**12), Operation("sum", 3 * 10**6, 10**6)]
    found = row("fusedgpt", work(1e3, 3e6), work(1e3, 2e6), work(1e3, 3e6), library=library)
    assert (found["library_flops"], found["library_bytes"]) == (1e12, 2e9)
    assert (found["instructions"], found["dram_bytes"]) == (3e3, 12e6)
    assert [(launch["times"], launch["dram_read"]) for launch in found["launches"]] == [(2, 1.5e6), (1, 1e6)]
    bound = found["bounds"]["H200"]
    assert bound["microseconds"] == pytest.approx(12e6 / 4.27e6)
    assert bound["matmuls"] == pytest.approx(1e12 / 989.4e6, rel=1e-3)
    assert bound["unit"] == "dram"


def test_ours_over_the_best_peer_of_each_figure() -> None:
    rows = [
        row("torch", work(4e6, 1e8)),
        row("fusedgpt", work(2e6, 2e8)),
        row(LIGER, work(1e6, 4e8)),
        report.failed("layer_norm", SIZES, "broken", "sm_90", "failed: x"),
    ]
    (group, _) = report.groups(rows)
    assert [r["side"] for r in group] == ["fusedgpt", "torch", LIGER]
    lines = list(report.table_of(rows, ["H200"]))
    assert "bound H200" in lines[0]
    assert lines[1] == "layer_norm: M 65536, C 768, forward, sm_90"
    assert lines[2].split() == ["fusedgpt", "2.0", "M", "200.0", "MB", "100%", "0.0%", "46.8", "µs", "dram"]
    assert f"instructions 2.00 ({LIGER}), DRAM bytes 2.00 (torch), bound on H200 2.00 (torch)" in lines[5]
    assert lines[7] == "    broken: failed: x"


def test_a_peer_with_matmuls_of_its_own_is_no_match() -> None:
    ours = row("fusedgpt", work(2e6), library=[Operation("mm", 1, 1, flops=10**12)])
    group = [
        ours,
        row("cut", work(1e6)),
        row(LIGER, work(4e6), library=[Operation("mm", 1, 1, flops=10**12)]),
    ]
    peer, ratio = report.best(group, "instructions")
    assert peer is not None
    assert (peer["side"], ratio) == (LIGER, 0.5)
    assert any(line.endswith("its matmuls included") for line in report.block(group, ["H200"]))


def verdicts(*rows: report.Row) -> dict[tuple[str, str, str], bool | None]:
    return {(goal.operator, goal.direction, goal.what): goal.met for goal in goals.goals(rows)}


def test_goals_of_layer_norm() -> None:
    key = ("layer_norm", FORWARD)
    ours, liger = row("fusedgpt", work(0.8e6)), row(LIGER, work(1e6))
    assert verdicts(ours, liger) == {
        (*key, what): True
        for what in (
            "instructions",
            "its kernels' DRAM bytes",
            "binding unit, H200",
            "bank conflicts",
            UNASKED,
        )
    }
    assert verdicts(ours)[*key, "instructions"] is None
    assert not verdicts(row("fusedgpt", work(0.81e6)), liger)[*key, "instructions"]
    assert not verdicts(row("fusedgpt", work(moved=1.031 * LEAST)))[*key, "its kernels' DRAM bytes"]
    assert not verdicts(row("fusedgpt", work(5e8)))[*key, "binding unit, H200"]
    assert not verdicts(liger), "ours was not counted"
    assert not verdicts(ours | {"bounds": {}}), "for another GPU"
    assert not verdicts(row("fusedgpt", work(shared_wavefronts=106.0)))[*key, "bank conflicts"]
    assert not verdicts(row("fusedgpt", work(asked_bytes=0.96 * LEAST)))[*key, UNASKED]


def test_goals_of_attention() -> None:
    """Dropout is held to the same operator without."""
    sizes = {"B": 64, "T": 1024, "H": 12, "D": 64}
    flex = row("FlexAttention", work(1e8), name="attention", direction=BACKWARD, sizes=sizes)
    ours = row("fusedgpt", work(8e7, special=1e9), name="attention", direction=BACKWARD, sizes=sizes)
    name = "attention, dropout 0.1"
    dropped = row("fusedgpt", work(8e7 * 1.36), name=name, direction=BACKWARD, sizes=sizes | {"p": 0.1})
    found = verdicts(ours, flex, dropped)
    assert found["attention", BACKWARD, "instructions"]
    assert found["attention", BACKWARD, "binding unit, H200"]
    assert not found[name, BACKWARD, "instructions"]
    assert not found[name, BACKWARD, "binding unit, H200"]


def test_the_models_error_on_known_times() -> None:
    library = [Operation("mm", 0, 0, flops=int(989.4e9 * 10))]
    rows = [
        row("fusedgpt", work()),
        row(LIGER, work(moved=4.27e12 * 34e-6)),
        row(LIGER, work(moved=4.27e12 * 2e-3), name="linear_cross_entropy", direction=BOTH, library=library),
    ]
    first, head = known.errors(record(*rows))
    assert (first.side, first.measured, first.unit) == (LIGER, 0.068, "dram")
    assert first.share == pytest.approx(0.5)
    assert head.bound == pytest.approx(12, rel=1e-3)
    assert known.summary([first, head]) == "37% to 50% of the 2 times that are known, on one H200"
    assert known.summary([]) == "no known time beside it"
    (_, line, _) = report.error_lines(record(*rows))
    assert "bound   0.034 ms (dram), measured   0.068 ms: 50%" in line


def test_pages_and_picture_are_functions_of_the_record(tmp_path: Path) -> None:
    rows = [
        row("fusedgpt", work(1e6), work(3e6)),
        row("fusedgpt", work(1e6), direction=BACKWARD),
        row(LIGER, work(8e6, 4 * LEAST)),
        row(LIGER, work(2e6), direction=BACKWARD),
        row("forward alone", work(1.0)),
        report.failed("layer_norm", SIZES, "broken", "sm_90", "failed: x"),
    ]
    for name, date, some in (("new", "2026-11-24", rows), ("old", "2026-11-23", rows[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(*some, date=date)))
    newest = readme.newest_results(sorted(tmp_path.glob("*.json")))
    assert [(kind, file.name) for kind, (file, _) in newest.items()] == [("counts", "new.json")]
    short = readme.short_block(newest)
    assert (
        "| layer_norm | 0.50 (liger-kernel) | 0.60 (liger-kernel) | 0.60 (liger-kernel) | 142 µs | dram |"
        in short
    )
    assert "no GPU involved. A bound is no time: bounds are" in short
    full = readme.full_block(newest, tmp_path)
    assert "| **layer_norm, forward** |" in full
    assert "| layer_norm, backward: `a_kernel` | H200 | 4 | 64 | 1.0 KiB | 8 | registers | 0.50 | – |" in full
    assert "- layer_norm, M 65536, C 768, sm_90, broken: failed: x" in full
    assert "bench-counts.png" in full
    assert "of the limit" not in full, "another benchmark's table"
    assert full == readme.full_block(newest, tmp_path)
    assert counts_picture(json.loads((tmp_path / "new.json").read_text())) is not None
    assert counts_picture(record(rows[-1])) is None
    assert list(pages.short(record(rows[-1]))) == []
    alone = "\n".join(pages.full(record(rows[2], rows[-1])))
    assert LIGER in alone
    assert list(pages.short(record(rows[2]))) == [], "ours was not counted"


def test_records_of_counts_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for i, instructions in enumerate((1e6, 1.5e6)):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(record(row("fusedgpt", work(instructions)))))
    (change,) = run_compare(*files)
    assert (change.figure, change.ratio) == ("instructions", 1.5)
    assert "1.50 x   1,000,000 ->  1,500,000" in capsys.readouterr().out


def test_an_unknown_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["counts", "softmax"]) == 2
    assert "no operator is called softmax; there are attention, gelu_mlp" in capsys.readouterr().err


def test_packages_that_are_missing_are_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours comes first, whatever finishes first; what fails gets a row, what is not installed a line."""
    todo = [run.Job(4, package, "sm_90", None) for package in ("fusedgpt", "Inductor", "a", "b")]
    todo += [job._replace(number=5) for job in todo[2:]]
    why = {"Inductor": ("failed: x", False), "a": ("no a", True)}

    def progress(pool: None, jobs: list[run.Job], title: str) -> Iterator[Any]:
        for job in reversed(jobs):
            counted = (
                [] if job.package in why else [Measured(job.case.name, SIZES, FORWARD, job.package, [work()])]
            )
            yield job, counted, *why.get(job.package, ("", False))

    monkeypatch.setattr(run, "processes", lambda _: nullcontext())
    monkeypatch.setattr(run, "progress", progress)
    rows = list(run.printed(todo, ["H200"]))
    assert [(r["name"], r["side"], r.get("note")) for r in rows] == [
        ("layer_norm", "fusedgpt", None),
        ("layer_norm", "Inductor", "failed: x"),
        ("layer_norm", "b", None),
        ("add_layer_norm", "b", None),
    ]
    shown = capsys.readouterr().out
    assert shown.count("a is left out: no a") == 1
    assert "ours over the best peer's: instructions 1.00 (b)" in shown


def test_jobs_are_ours_and_the_peers_that_have_the_operator() -> None:
    found = {
        (job.case.name, job.package) for job in run.jobs(["layer_norm", "dropout"], ["sm_80", "sm_90"], None)
    }
    assert {
        ("layer_norm", "fusedgpt"),
        ("layer_norm", "liger-kernel"),
        ("dropout, dropout 0.1", "fusedgpt"),
    } <= found
    assert len([package for name, package in found if name.startswith("dropout")]) == 1


# ---- the counts that kernels are held to


def test_what_is_worse() -> None:
    """Kernel and figure are named; more is worse, but for what is resident and in flight; 3 % are allowed."""
    before = {
        "a": {"instructions": 1000, "spilled": 0, "resident": 3, "in_flight": 0},
        "gone": {"special": 1},
    }
    same = {"a": {"instructions": 1030, "spilled": 0, "resident": 4, "in_flight": 9}, "gone": {"special": 0}}
    assert list(regression.worse(before, same)) == []
    now = {"a": {"instructions": 1031, "spilled": 8, "resident": 2, "in_flight": 0}, "b": {"special": 1}}
    assert list(regression.worse(before, now)) == [
        "gone is not launched any more",
        "a: instructions 1,000 -> 1,031 (+3.1%)",
        "a: spilled 0 -> 8",
        "a: resident 3 -> 2 (-33.3%)",
        "b is new",
    ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_kernel_is_worse(architecture: str) -> None:
    before = regression.committed(architecture)
    if before is None:
        pytest.skip(f"{regression.FILE.name} is not of {regression.TRITON}, whose counts are others")
    with processes(1) as pool:
        now = pool.submit(regression.count, architecture).result()
    found = list(regression.worse(before, now))
    remedy = "`python -m fusedgpt.bench counts --accept` takes the new counts"
    assert not found, "\n".join([f"worse on {architecture}; {remedy}:", *found])
