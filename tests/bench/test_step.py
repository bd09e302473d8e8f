"""The step benchmark compares like with like and says so when it does not. Times are looked at by people, not by tests."""

import json

import pytest
import torch

from fusedgpt.bench import step
from fusedgpt.bench.peers import Peer, build_model, fusedgpt, nanogpt, transformers_gpt2
from fusedgpt.gpt.config import ModelConfig

SHAPE = ModelConfig(65, context_length=16, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.setitem(step.SIZES, "tiny", (2, SHAPE))


def test_a_table_of_ours_and_transformers_from_the_same_weights(sizes, tmp_path, capsys):
    ours, theirs = step.run_step("tiny", rounds=4, out=tmp_path / "step.json")
    assert ours.ratio == 1.0
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-5)
    assert "transformers" in capsys.readouterr().out
    record = json.loads((tmp_path / "step.json").read_text())
    assert [row["name"] for row in record["rows"]] == [ours.name, theirs.name]


def test_a_side_that_computes_something_else_is_not_timed():
    ours = build_model(SHAPE)
    wrong = Peer("wrong", build_model(SHAPE, seed=1), lambda inputs, targets: 1.1 * ours(inputs, targets))
    with pytest.raises(RuntimeError, match=r"wrong computes a loss of .* not comparable"):
        step._compare([fusedgpt(ours), wrong], 2, SHAPE, 2)


def test_transformers_trains_with_our_weights():
    ours = build_model(SHAPE)
    theirs = transformers_gpt2(ours)
    ids = torch.randint(65, (2, 17))
    assert theirs.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(
        ours(ids[:, :-1], ids[:, 1:]).item(), rel=1e-5
    )


def test_a_folder_that_is_no_nanogpt_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="clone of nanoGPT"):
        nanogpt(build_model(SHAPE), tmp_path)


def test_an_unknown_size_names_those_that_exist():
    with pytest.raises(ValueError, match="tiny, small"):
        step.run_step("huge")
