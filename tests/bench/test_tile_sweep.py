"""The sweep tries tiles that can be, puts the table back, throws out wrong results, and prints rows that can be pasted."""

import contextlib

import pytest
import torch

from fusedgpt.bench import tile_sweep
from fusedgpt.kernels import _triton, use_backend
from fusedgpt.kernels.tiles import ANY, LAYER_NORM_FORWARD, LIBRARY, MatmulTile, Tile, select

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(not _triton.INTERPRETED, reason="this process compiles its kernels")


@pytest.mark.parametrize("block", [64, 256, 1024, 2048, 8192, 16384])
def test_candidates(block: int) -> None:
    tiles = list(tile_sweep.candidates(block))
    assert len(tiles) == len(set(tiles)) > 5
    for tile in tiles:
        assert 8 <= tile.rows * tile.block / (32 * tile.warps) <= 32
        assert tile.programs * tile.warps <= 64
        assert (tile.block < block) == (block > tile_sweep.WHOLE) == (tile.programs == 0)


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
    ],
)
def test_a_printed_row_is_the_tile(tile: Tile | MatmulTile) -> None:
    text = tile_sweep._row(tile, tile.origin).removeprefix(f"{type(tile).__name__}(").removesuffix("),")
    *numbers, origin = text.replace("ANY", str(ANY)).split(", ")
    assert (*map(int, numbers), origin.strip('"')) == tile


# three rows are no power of two
SMALL = (Tile(8, 8, 2, 1, 1, 1, ""), Tile(8, 8, 3, 1, 1, 1, ""))
SMALL_MATMULS = (MatmulTile(8, 16, 32, 16, 1, 1, 2, 1, ""), MatmulTile(8, 3, 32, 16, 1, 1, 2, 1, ""))


@INTERPRETED
@pytest.mark.parametrize("title", tile_sweep.TABLES)
def test_a_sweep_in_the_interpreter(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, failing = SMALL_MATMULS if title.startswith("MLP") else SMALL
    monkeypatch.setattr(tile_sweep, "UNEVEN_ROWS", 5)
    sweep = tile_sweep.TABLES[title]._replace(candidates=lambda *_: (right, failing))
    present = sweep.present(sweep.table, "interpreter", 4)
    with use_backend("triton"):
        results = list(tile_sweep._sweep(sweep, 8, [4, 8], torch.float32, CPU, 4, 2, float("inf")))
    assert [result.tile[:-1] for result in results] == [present[:-1], right[:-1]]
    assert results[0].ratio == 1.0
    assert results[1].milliseconds.keys() == {4, 8}


@pytest.mark.parametrize("title", ["MLP_UP", "MLP_DOWN_GRADIENT"])
def test_the_feed_forward_tables_choose_between_both_forms(title: str) -> None:
    candidates = tile_sweep.TABLES[title].candidates
    assert [tile.rows > 0 for tile in candidates(1024, "sm_90")] == [True, True, False]
    assert list(candidates(1024, "sm_80")) == [LIBRARY]


@INTERPRETED
def test_a_wrong_tile_is_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tile_sweep, "parity", lambda *_: (0.2, 0.1))
    sweep = tile_sweep.TABLES["LAYER_NORM_BACKWARD"]._replace(candidates=lambda *_: SMALL[:1])
    with use_backend("triton"):
        results = list(tile_sweep._sweep(sweep, 8, [5], torch.float32, CPU, 4, 2, float("inf")))
    assert len(results) == 1
    assert "is WRONG" in capsys.readouterr().out
