"""Scores against independent arithmetic, and the report on tales against the grammar itself."""

import math
import re
from itertools import islice

import pytest
import torch

from fusedgpt.data import tales
from fusedgpt.data.corpus import open_corpus
from fusedgpt.data.documents import encode_document
from fusedgpt.data.tokenizers import make_tokenizer
from fusedgpt.gpt import evaluate
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.evaluate import best_possible, evaluate_corpus, evaluate_run, mean_loss
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.run import create_run

CORPUS = open_corpus("tales")


def validation_tales(count):
    return list(islice(CORPUS.val_texts(), count))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bpe", validation_tales(200), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return GPT(ModelConfig(tokenizer.vocab_size, context_length=400, n_layer=1, n_head=2, n_embd=16))


def bits_per_byte(model, tokenizer, texts):
    """One text at a time, without padding."""
    bits = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(encode_document(tokenizer, text))
            logits = model(ids[None, :-1])[0]
            bits += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item() / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


def test_tales_are_scored_whole_and_beside_their_own_probability(model, tokenizer):
    report = evaluate_corpus(model, tokenizer, CORPUS, written=4)
    texts = validation_tales(500)
    assert report.bits_per_byte == pytest.approx(bits_per_byte(model, tokenizer, texts), rel=1e-4)
    best = -sum(tales.log_prob(text) for text in texts) / math.log(2) / sum(len(text) for text in texts)
    assert report.best_possible == pytest.approx(best)
    assert report.accepted == 0.0, "an untrained model writes no tale"
    nats, bits, _ = report.lines()
    assert re.match(
        f"loss: ([\\d.]+) nats a token, best possible {best_possible(CORPUS, tokenizer, 500):.4f} ", nats
    )
    assert f"{report.bits_per_byte:.4f} bits a byte, best possible {report.best_possible:.4f} " in bits


def test_the_share_accepted_is_the_grammars_verdict(model, tokenizer, monkeypatch):
    written = [tales.sample(1), "Once upon a time.", tales.sample(2), tales.sample(3)]
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: [tokenizer.encode(text) for text in written])
    report = evaluate_corpus(model, tokenizer, CORPUS, written=4)
    assert report.accepted == 0.75
    assert report.sample == tales.sample(1)


def test_the_floor_in_nats_a_token_is_the_same_bound_in_other_units(tokenizer):
    texts = validation_tales(50)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert best_possible(CORPUS, tokenizer, 50) * tokens == pytest.approx(-sum(map(tales.log_prob, texts)))


def test_training_mode_is_put_back_and_dropout_stays_out(tokenizer):
    torch.manual_seed(0)
    model = GPT(ModelConfig(30, context_length=8, n_layer=1, n_head=1, n_embd=8, resid_dropout=0.5)).train()
    ids = torch.randint(30, (2, 8))
    assert mean_loss(model, [(ids, ids)]) == mean_loss(model, [(ids, ids)])
    assert model.training


def test_a_run_is_evaluated_on_a_file_in_bits_per_byte(model, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    text = " ".join(validation_tales(4))  # longer than the context
    (tmp_path / "text.txt").write_text(text)
    create_run(tmp_path / "run", RunConfig(model.config, TrainConfig(dtype="float32")), tokenizer, {}, model)
    evaluate_run(tmp_path / "run", str(tmp_path / "text.txt"), "cpu")
    printed = capsys.readouterr().out
    ids = torch.tensor(tokenizer.encode(text))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 400):
            row = ids[start : start + 401]
            nats += torch.nn.functional.cross_entropy(
                model(row[None, :-1])[0], row[1:], reduction="sum"
            ).item()
    bits = float(re.search(r"([\d.]+) bits a byte", printed).group(1))
    assert bits == pytest.approx(nats / math.log(2) / len(text), abs=1e-3)
    assert f"{len(ids) - 1:,} tokens" in printed
