"""What moved between two records is found, and the measured tables are those of the committed results."""

import json
from pathlib import Path

import pytest

from fusedgpt.bench import readme
from fusedgpt.bench.__main__ import main
from fusedgpt.bench.compare import run_compare
from fusedgpt.bench.record import ROOT


def record(tmp_path: Path, name: str, device: str, rows: list[tuple], **versions: str) -> Path:
    file = tmp_path / name
    figures = {"gigabytes": 0.5, "ratio": 1.0}
    keys = ("benchmark", "name", "case", "side", "milliseconds")
    table = [figures | dict(zip(keys, row, strict=True)) for row in rows]
    found = {"kind": "all", "date": name.removesuffix(".json"), "commit": name, "rows": table}
    file.write_text(json.dumps(found | {"versions": {"device": device, "torch": "2", **versions}}))
    return file


def test_the_largest_change_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [
        ("step", "step", "tiny", "fusedgpt", 10.0),
        ("step", "step", "tiny", "transformers 5.1", 20.0),
        ("ops", "dropout", "a", "fusedgpt", 1.0),
        ("ops", "dropout", "gone", "fusedgpt", 1.0),
        ("decode", "decode", "1", "fusedgpt", 1.0),
        ("decode", "decode", "8", "fusedgpt", 1.0),
        ("ops", "dropout", "failed", "fusedgpt", None),
    ]
    after = [
        ("step", "step", "tiny", "fusedgpt", 10.4),
        ("step", "step", "tiny", "transformers 5.2.0", 5.0),
        ("ops", "dropout", "a", "fusedgpt", 1.5),
        ("ops", "dropout", "new", "fusedgpt", 1.0),
        ("ops", "dropout", "failed", "fusedgpt", 2.0),
    ]
    files = (
        record(tmp_path, "a.json", "one", before),
        record(tmp_path, "b.json", "other", after),
    )
    moved = run_compare(*files)
    assert [(change.key[3], change.ratio) for change in moved] == [("transformers", 0.25), ("fusedgpt", 1.5)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device:   one -> other  (another machine")
    assert lines[1] == "commit:   a.json -> b.json"
    assert lines[2].split()[:5] == ["0.25", "x", "20.000", "->", "5.000"]
    assert "2 of 3 figures moved by more than 5 %" in lines
    assert "only in a.json: ops · dropout · gone · fusedgpt" in lines
    assert "only in a.json: all of decode (2 figures)" in lines
    assert "only in b.json: ops · dropout · new · fusedgpt" in lines
    assert len(run_compare(*files, above=1.0)) == 3
    assert not run_compare(files[0], files[0])


def test_what_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a.json", "{"), ("b.json", "[]"), ("c.json", "{}"), ("d.json", "\xff")):
        (tmp_path / name).write_text(text, encoding="latin-1")
        assert main(["compare", str(tmp_path / name), str(tmp_path / name)]) == 2
        assert f"{name} is not a result of the bench" in capsys.readouterr().err


def test_the_newest_of_a_cpu_and_of_a_gpu(tmp_path: Path) -> None:
    files = [
        record(tmp_path, "2026-02-01.json", "a CPU", []),
        record(tmp_path, "2026-01-01.json", "a CPU", []),
        record(tmp_path, "2025-01-01.json", "a GPU", [], cuda="13"),
    ]
    newest = readme.newest_results(files)
    assert [(kind, file.name) for kind, (file, _) in newest.items()] == [
        ("gpu", "2025-01-01.json"),
        ("cpu", "2026-02-01.json"),
    ]


def test_only_the_blocks_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    rows = [("step", "step", "tiny, 2 x 3", "fusedgpt", 12.25), ("step", "step", "tiny, 2 x 3", "other", 6.0)]
    record(folder, "2026-02-01.json", "a CPU", rows)
    (tmp_path / "docs").mkdir()
    files = short, full = [tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"]
    for file in files:
        file.write_text(f"before\n{readme.BEGIN}old\n{readme.END}after\n")
    readme.run_readme(root=tmp_path)
    for file in files:
        text = file.read_text()
        assert text.startswith(f"before\n{readme.BEGIN}")
        assert text.endswith(f"{readme.END}after\n")
        assert "old" not in text
        assert "GPU" not in text, "there is no result of one"
        assert "|  |" not in text, "an empty cell"
    assert "| training step: tiny, 2 x 3 | 12.2 ms | other | 6.000 ms | 1.00 |" in short.read_text()
    assert "| training step | 12.2 ms | 6.0 ms |" in full.read_text()
    assert "](bench-cpu-step.png)" in full.read_text()
    assert (tmp_path / "docs" / "bench-cpu-step.png").exists()
    for file in files:
        text = file.read_text()
        file.write_text("no block")
        with pytest.raises(ValueError, match=f"{file.name} lacks the lines"):
            readme.run_readme(root=tmp_path)
        file.write_text(text)


def test_the_files_show_the_newest_committed_results() -> None:
    newest = readme.newest_results(sorted((ROOT / "bench" / "results").glob("*.json")))
    for name, block in readme.blocks(newest, ROOT).items():
        shown = (ROOT / name).read_text().partition(readme.BEGIN)[2].partition(readme.END)[0]
        assert shown == block, f"{name}: python -m fusedgpt.bench readme"
