"""`bench data`: its texts, its rows, and what becomes of them in docs/benchmarks.md."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fusedgpt.bench import data, readme
from fusedgpt.bench.__main__ import main
from fusedgpt.data.tokenizers import GPT2Tokenizer


def test_languages_have_many_different_words_and_are_always_the_same() -> None:
    texts = list(data.languages(500_000))
    assert texts == list(data.languages(500_000))
    assert 500_000 <= sum(len(text.encode()) for text in texts) < 503_000
    words = Counter(word for text in texts for word in text.rstrip(".\n").split(" "))
    assert 0.3 * words.total() < len(words) < 0.7 * words.total()
    assert len({ord(text[0]) >> 8 for text in texts}) == 12, (
        "two scripts share a block of 256, and two another"
    )


def test_both_sides_and_their_record(
    tmp_path: Path,
    gpt2_tokenizer_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_tokenizer_cache))
    file = tmp_path / "data.json"
    assert main(["data", "tales:20", "--vocab-sizes", "300", "--rounds", "1", "--out", str(file)]) == 0
    record = json.loads(file.read_text())
    trained, theirs, encoded, tiktokens = record["rows"]
    assert [row["name"] for row in record["rows"]] == ["train bpe"] * 2 + ["encode gpt2"] * 2
    assert [row["side"].split()[0] for row in record["rows"]] == [
        "fusedgpt",
        "tokenizers",
        "fusedgpt",
        "tiktoken",
    ]
    assert trained["case"] == theirs["case"] == f"{encoded['case']}, 300 tokens"
    assert trained["ratio"] == encoded["ratio"] == 1
    assert theirs["ratio"] == pytest.approx(theirs["seconds"] / trained["seconds"])
    assert f"{tiktokens['seconds']:.3f}" in capsys.readouterr().out

    newest = readme.newest_results([file])
    assert newest.keys() == {"data"}
    assert readme.short_block(newest) == ""
    full = readme.full_block(newest, tmp_path)
    assert f"| train bpe: {trained['case']} | {trained['seconds']:.2f} s | {theirs['side']} |" in full
    assert full.count("\n| encode gpt2") == 1


def test_hugging_face_learns_as_many_merges() -> None:
    pytest.importorskip("tokenizers")
    texts = data.documents("tales:50")
    assert data.train_theirs(texts, 400).get_vocab_size() + 1 == 400


def test_other_ids_are_not_timed_and_a_missing_vocabulary_is_said(
    gpt2_tokenizer_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_tokenizer_cache))
    with monkeypatch.context() as patch:
        patch.setattr(GPT2Tokenizer, "encode_ordinary", lambda self, text: [0])
        (row,) = data.measure(["tales:2"], [], 1)
    assert (row.name, row.seconds, row.ratio) == ("encode gpt2", None, None)
    assert "other ids" in row.note

    def missing(name: str) -> None:
        raise FileNotFoundError("no vocabulary")

    monkeypatch.setattr(data, "make_tokenizer", missing)
    (row,) = data.measure(["tales:2"], [], 1)
    assert "no vocabulary" in row.note
    assert list(data.markdown([vars(row)]))[2:] == []


@pytest.mark.parametrize("source", ["languages", "languages:0", "languages:x", "taless"])
def test_an_unknown_text_ends_with_2(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", source]) == 2
    assert source in capsys.readouterr().err
