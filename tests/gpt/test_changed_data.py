"""Data that change under a run, or between two halves of it: named with file and position, and no step is lost."""

import os
import re
import shutil
from pathlib import Path

import pytest

from fusedgpt.data.corpus import open_corpus
from fusedgpt.data.loader import TokenLoader
from fusedgpt.data.shards import tokenize
from fusedgpt.data.tokenizers import CharTokenizer
from fusedgpt.gpt.cli import main

TRAIN = (
    "train --device cpu --data shards --out run --context-length 16 --n-layer 1 --n-head 2 --n-embd 16 "
    "--batch-size 4 --steps 8 --warmup-steps 1 --eval-interval 8 --save-interval 100 --log-interval 4 --sample-tokens 4"
)
SHARD = Path("shards/train_000000.bin")


@pytest.fixture(autouse=True)
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    text = "the quick brown fox jumps over the lazy dog. " * 100
    Path("text.txt").write_text(text)
    tokenize(open_corpus("text.txt"), CharTokenizer.train([text]), "shards")


def change_one_token() -> None:
    data = bytearray(SHARD.read_bytes())
    data[-1000] = 2 if data[-1000] == 1 else 1  # behind the first 1,024 tokens
    SHARD.write_bytes(data)


CHANGES = {
    "truncated": (lambda: os.truncate(SHARD, 2000), "truncated|went from .* bytes"),
    "removed": (SHARD.unlink, "removed or replaced"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_under_a_run_is_named_and_the_run_goes_on_with_it_back(
    change, monkeypatch, capfd
):
    shutil.copy(SHARD, "copy.bin")
    do, message = CHANGES[change]
    following = TokenLoader.__next__

    def changed(loader):
        if loader.position == 12:  # three steps of four windows
            do()
        return following(loader)

    with monkeypatch.context() as patch:
        patch.setattr(TokenLoader, "__next__", changed)
        assert main(TRAIN.split()) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.match(
        rf"error: shards/train_000000\.bin, token [\d,]+: it (was )?({message}).* while it was in use; ",
        error,
    )
    assert [folder.name for folder in Path("run/checkpoints").iterdir()] == ["step-000003"]
    shutil.copy("copy.bin", SHARD)
    assert main(["train", "--resume", "run", "--device", "cpu"]) == 0


def test_a_run_is_not_resumed_on_data_that_changed_anywhere(capfd):
    assert main(TRAIN.replace("--steps 8", "--steps 2").split()) == 0
    change_one_token()
    Path("shards/meta.json").unlink()  # or it would tell
    before = Path("run/config.toml").read_bytes()
    assert main(["train", "--resume", "run", "--steps", "4", "--device", "cpu"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "cannot continue in these data: training tokens" in error
    assert "validation" not in error
    assert Path("run/config.toml").read_bytes() == before
