"""The sweep tries tiles that can be, puts the table back, throws out wrong results, and prints rows that can be pasted."""

import contextlib
from typing import Any

import pytest
import torch

from fusedgpt.bench.tiles import candidates as swept
from fusedgpt.bench.tiles import sweep as tile_sweep
from fusedgpt.kernels import _triton, use_backend
from fusedgpt.kernels.examples import Parity
from fusedgpt.kernels.ops.attention import operator as attention
from fusedgpt.kernels.tiles import (
    ANY,
    ATTENTION_KEY,
    ATTENTION_ONE_PASS,
    ATTENTION_QUERY,
    DESCRIPTORS,
    LAYER_NORM_FORWARD,
    LIBRARY,
    Hardware,
    MatmulTile,
    OnePassTile,
    Tile,
    attention_tile,
    select,
)

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(not _triton.INTERPRETED, reason="this process compiles its kernels")


@pytest.mark.parametrize("block", [64, 256, 768, 1024, 2048, 8192, 16384])
def test_candidates(block: int) -> None:
    tiles = list(swept.candidates(block))
    assert len(tiles) == len(set(tiles)) > 5
    for tile in tiles:
        assert 8 <= tile.rows * tile.block / (32 * tile.warps) <= 32
        assert tile.programs * tile.warps <= 64
        assert (tile.block < block) == (block > swept.WHOLE) == (tile.programs == 0)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_a_table_holds_the_candidate_and_is_put_back(architecture: str) -> None:
    before = dict(LAYER_NORM_FORWARD)
    tile = Tile(1024, 1024, 4, 8, 1, 3, "")
    with contextlib.suppress(KeyError), tile_sweep.in_table(LAYER_NORM_FORWARD, architecture, tile):
        assert select(LAYER_NORM_FORWARD, architecture, 5)[2:] == tile[2:]
        assert select(LAYER_NORM_FORWARD, "sm_100", 5)[2:] != tile[2:]
        raise KeyError
    assert before == LAYER_NORM_FORWARD


@pytest.mark.parametrize(
    "tile",
    [
        Tile(ANY, 4096, 1, 8, 1, 0, "measured"),
        Tile(64, 64, 16, 1, 2, 12, "x"),
        MatmulTile(1024, 128, 256, 64, 8, 4, 2, 1, "x"),
        LIBRARY,
        OnePassTile(64, 128, 64, 8, 2, 1, 75, 48, "x"),
    ],
)
def test_a_printed_row_is_the_tile(tile: Tile | MatmulTile | OnePassTile) -> None:
    text = tile_sweep._row(tile, tile.origin).removeprefix(f"{type(tile).__name__}(").removesuffix("),")
    *numbers, origin = text.replace("ANY", str(ANY)).split(", ")
    assert (*map(int, numbers), origin.strip('"')) == tile


# three rows are no power of two
SMALL = (Tile(8, 8, 2, 1, 1, 1, ""), Tile(8, 8, 3, 1, 1, 1, ""))
SMALL_MATMULS = (MatmulTile(8, 16, 32, 16, 1, 1, 2, 1, ""), MatmulTile(8, 3, 32, 16, 1, 1, 2, 1, ""))
SMALL_HEADS = (Tile(16, 16, 16, 1, 1, 0, ""), Tile(16, 16, 3, 1, 1, 0, ""))
SMALL_ONE_PASS = OnePassTile(16, 16, 16, 1, 1, 1, 75, 48, "")
SMALL_LOSS = (Tile(ANY, 64, 1, 1, 1, 0, ""), Tile(ANY, 24, 1, 1, 1, 0, ""))


def small(title: str) -> tuple[tuple[Any, ...], list[Any]]:
    """A tile that is right and, where that takes no time, one that cannot run; and the cases to try them at."""
    if title.startswith("ATTENTION"):
        tiles = (SMALL_ONE_PASS,) if title.endswith("PASS") else SMALL_HEADS[: 1 + title.endswith("FORWARD")]
        return tiles, [swept.Heads(16, 0.1)]
    if title == "CROSS_ENTROPY":
        return SMALL_LOSS, [140]
    return SMALL_MATMULS if title.startswith("MLP") else SMALL, [4, 8]


@pytest.fixture
def small_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"UNEVEN_ROWS": 5, "UNEVEN_LENGTH": 18, "LENGTH": 4, "HEADS": 1}.items():
        monkeypatch.setattr(swept, name, value)


@INTERPRETED
@pytest.mark.usefixtures("small_examples")
@pytest.mark.parametrize("title", swept.TABLES)
def test_a_sweep_in_the_interpreter(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiles, cases = small(title)
    sweep = swept.TABLES[title]._replace(candidates=lambda *_: tiles)
    present = sweep.present(sweep.table, "interpreter", cases[0])
    before = dict(sweep.table)
    with use_backend("triton"):
        results = list(tile_sweep._sweep(sweep, 8, cases, torch.float32, CPU, 4, 1, float("inf")))
    assert [result.tile[:-1] for result in results] == [present[:-1], tiles[0][:-1]]
    assert results[0].ratio == 1.0
    assert list(results[1].milliseconds) == cases
    assert before == sweep.table
    assert ("cannot run" in capsys.readouterr().out) == (len(tiles) > 1)


@INTERPRETED
@pytest.mark.usefixtures("small_examples")
@pytest.mark.parametrize("title", [title for title in swept.TABLES if title.startswith("ATTENTION")])
def test_attention_is_timed_by_the_rows_that_are_swept(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tile, *_), cases = small(title)
    seen: list[tuple[str, int]] = []

    def run(kernel: Any, programs: int, tile: Any, *arguments: Any, **constants: Any) -> None:
        seen.append((kernel.fn.__name__, tile.rows))
        original(kernel, programs, tile, *arguments, **constants)

    original = attention._run
    monkeypatch.setattr(attention, "_run", run)
    sweep = swept.TABLES[title]
    with use_backend("triton"):
        work = sweep.make_work(4, cases[0], torch.float32, CPU)
        seen.clear()
        with (
            swept.in_table(ATTENTION_ONE_PASS, "interpreter", SMALL_ONE_PASS),
            swept.in_table(sweep.table, "interpreter", tile),
        ):
            work(0)
    kernel = {"FORWARD": "forward", "QUERY": "query", "KEY": "key", "ONE_PASS": "one_pass"}[title[10:]]
    assert (f"{kernel}_kernel", tile.rows) in seen
    assert ("one_pass" in str(seen)) == (kernel == "one_pass")


def test_tables_come_by_what_a_step_gains_and_first_at_the_small_models_width() -> None:
    jobs = tile_sweep._jobs((768, 1600, 1024), torch.bfloat16)
    titles = [title for title, *_ in jobs]
    assert titles[: len(swept.TABLES)] == list(swept.TABLES)
    assert [block for title, block, _ in jobs if title == "ATTENTION_FORWARD"] == [64, 128]
    assert [cases for title, _, cases in jobs if title == "MLP_UP"] == [[768, 1024], [1600]]
    assert [cases for title, _, cases in jobs if title == "LAYER_NORM_FORWARD"] == [[768], [1024], [1600]]
    titles = [title for title, *_ in tile_sweep._jobs((768,), torch.float32)]
    assert titles == ["CROSS_ENTROPY", "LAYER_NORM_FORWARD", "LAYER_NORM_BACKWARD"]


@pytest.mark.parametrize(
    ("title", "other", "rows", "left"),
    [
        ("ATTENTION_KEY", ATTENTION_QUERY, 128, {64}),
        ("ATTENTION_KEY", ATTENTION_QUERY, 32, set()),
        ("ATTENTION_QUERY", ATTENTION_KEY, 64, {64, 128}),
        ("ATTENTION_QUERY", ATTENTION_KEY, 128, {128}),
    ],
)
def test_the_pass_over_keys_never_reads_more_queries_than_the_one_before_it_writes(
    title: str, other: dict[str, Any], rows: int, left: set[int]
) -> None:
    with swept.in_table(other, "sm_90", Tile(ANY, 64, rows, 8, 2, 0, "")):
        assert {tile.rows for tile in swept.TABLES[title].candidates(64, "sm_90")} == left
    assert list(swept.TABLES[title].candidates(64, "sm_80")) == []


def test_attention_by_pointer_takes_the_rows_for_that_and_puts_the_tables_back() -> None:
    before = dict(DESCRIPTORS), dict(ATTENTION_KEY), dict(ATTENTION_ONE_PASS)
    with swept.by_pointer("sm_90", 64):
        assert "sm_90" not in DESCRIPTORS
        row = attention_tile(ATTENTION_KEY, "sm_90 by pointer", 64)
        assert attention_tile(ATTENTION_KEY, "sm_90", 64)[1:] == row[1:]
        assert attention_tile(ATTENTION_ONE_PASS, "sm_90", 64).rows == 0
    assert before == (DESCRIPTORS, ATTENTION_KEY, ATTENTION_ONE_PASS)


@pytest.mark.parametrize("title", ["MLP_UP", "MLP_DOWN_GRADIENT"])
def test_the_feed_forward_tables_choose_between_both_forms(title: str) -> None:
    candidates = swept.TABLES[title].candidates
    assert [tile.rows > 0 for tile in candidates(1024, "sm_90")] == [True, True, False]
    assert list(candidates(1024, "sm_80")) == [LIBRARY]


@INTERPRETED
def test_a_wrong_tile_is_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tile_sweep, "parity", lambda *_: Parity(0.2, 0.1))
    sweep = swept.TABLES["LAYER_NORM_BACKWARD"]._replace(candidates=lambda *_: SMALL[:1])
    with use_backend("triton"):
        results = list(tile_sweep._sweep(sweep, 8, [5], torch.float32, CPU, 4, 1, float("inf")))
    assert len(results) == 1
    assert "is WRONG" in capsys.readouterr().out


@INTERPRETED
@pytest.mark.usefixtures("small_examples")
def test_both_directions_of_attention_are_timed_by_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    described: list[bool] = []

    def sources(*tensors_and_rows: Any) -> list[Any]:
        found = original(*tensors_and_rows)
        described.append(not isinstance(found[0], torch.Tensor))
        return found

    original = attention._sources
    monkeypatch.setattr(attention, "_sources", sources)
    monkeypatch.setitem(DESCRIPTORS, "interpreter", "interpreter")
    monkeypatch.setattr(tile_sweep, "HEADS_OF_64", [swept.Heads(16, 0.0)])
    with use_backend("triton"):
        lines = list(tile_sweep._by_pointer(CPU, torch.float32, 4, 1))
    assert [line.split(" by pointer: ")[0] for line in lines] == ["forward, 16,", "backward, 16,"]
    assert described[:6] == [True, False] * 3, "forward: warmed up twice, timed once, in turns"
    assert DESCRIPTORS["interpreter"] == "interpreter"


def test_a_table_takes_half_of_the_time_that_is_left_and_its_winner_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, given = [100.0], []

    def sweep(sweep: Any, block: int, cases: Any, *options: Any) -> list[Any]:
        given.append(options[-1] - now[0])
        now[0] += 10.0
        present = sweep.present(sweep.table, "sm_90", cases[0])
        faster = present._replace(warps=16)
        results = [(present, 1.0), (faster, 0.5)] if sweep.table is ATTENTION_KEY and block == 64 else []
        return [tile_sweep.Result(tile, ratio, dict.fromkeys(cases, ratio)) for tile, ratio in results]

    monkeypatch.setattr(tile_sweep, "_sweep", sweep)
    monkeypatch.setattr(tile_sweep, "_by_pointer", lambda *_: ["as fast"])
    monkeypatch.setattr(tile_sweep, "require_gpu", lambda: CPU)
    monkeypatch.setattr(tile_sweep, "hardware", lambda _: Hardware("sm_90", 132))
    monkeypatch.setattr(tile_sweep.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    lines = tile_sweep.run_tiles((768,), seconds=160.0)
    assert given[:3] == [80.0, 75.0, 70.0]
    title, row, *rest = lines
    assert title == "ATTENTION_KEY, sm_90:"
    assert row.startswith('    Tile(64, 128, 64, 16, 3, 0, "measured on H200, 2')
    assert rest == ["DESCRIPTORS, sm_90:", "    # as fast"]
    assert "64: 0.5000 ms  64 dropout 0.1: 0.5000 ms" in capsys.readouterr().out
    assert "by pointer" not in str(tile_sweep.run_tiles((768,), seconds=0.0)), "no time"


def test_without_time_or_candidates_nothing_is_made() -> None:
    sweep = swept.TABLES["MLP_UP"]._replace(make_work=None)
    arguments = (1024, [1024], torch.bfloat16, CPU, 4, 1)
    assert list(tile_sweep._sweep(sweep, *arguments, 0.0)) == []
    sweep = sweep._replace(candidates=lambda *_: [sweep.present(sweep.table, "interpreter", 1024)])
    assert list(tile_sweep._sweep(sweep, *arguments, float("inf"))) == []
