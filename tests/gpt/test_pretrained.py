"""The library's face: `from fusedgpt import GPT`, a model from disk, and text from it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

import fusedgpt
from fusedgpt import GPT, ModelConfig
from fusedgpt.data.tokenizers import BPETokenizer
from fusedgpt.gpt.config import RunConfig, TrainConfig
from fusedgpt.gpt.huggingface import export_model
from fusedgpt.gpt.run import create_run

TEXT = "The quick brown fox jumps over the lazy dog. It was a café 😉 once upon a time, they say. "


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model as a run and as transformers' folder; its weights are large, so that its text changes from token to token."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = BPETokenizer.train([TEXT], 290)
    shape = ModelConfig(tokenizer.vocab_size, context_length=32, n_layer=2, n_head=2, n_embd=24)
    torch.manual_seed(0)
    model = GPT(shape).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
        model.wte.weight[shape.vocab_size :] = 0.0
    create_run(folder / "run", RunConfig(shape, TrainConfig(tokenizer="bpe")), tokenizer, {}, model)
    export_model(model, tokenizer, folder / "hf")
    return folder / "run", folder / "hf"


def test_the_import_is_light_and_the_names_are_listed() -> None:
    code = """
import sys, fusedgpt
assert {"GPT", "ModelConfig", "__version__"} <= set(dir(fusedgpt))
assert not {"torch", "numpy", "triton"} & sys.modules.keys()
from fusedgpt import ModelConfig
assert "torch" not in sys.modules
from fusedgpt import GPT
assert GPT.__module__ == "fusedgpt.gpt.model"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="module 'fusedgpt' has no attribute 'GTP'"):
        _ = fusedgpt.GTP


def test_a_run_and_its_export_write_what_transformers_writes(folders: tuple[Path, Path]) -> None:
    theirs, tokenizer = (kind.from_pretrained(folders[1]) for kind in (GPT2LMHeadModel, AutoTokenizer))
    ids = tokenizer("It was", return_tensors="pt").input_ids
    whole = theirs.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    for folder in folders:
        model = GPT.from_pretrained(folder)
        assert model.generate("It was", max_new_tokens=12, temperature=0) == tokenizer.decode(whole[0])
        assert torch.equal(model.generate(ids, max_new_tokens=12, temperature=0), whole)
        assert not model.training
        assert model.tokenizer is not None
        assert model.tokenizer.encode("It was") == ids[0].tolist()


def test_every_prompt_gives_as_many_samples_as_asked_for(folders: tuple[Path, Path]) -> None:
    model = GPT.from_pretrained(str(folders[0]))
    first, second = model.generate("It", 8, num_return_sequences=2, seed=1)
    assert first.startswith("It")
    assert first != second
    assert model.generate("It", 8, seed=1) == first
    assert model.generate(["It", "It"], 8, seed=1) == [first, second]
    assert len(model.generate(max_new_tokens=8, seed=1)) > 0, "the start of a document"
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    rows = model.generate(ids, 40, num_return_sequences=2, seed=1)
    assert rows.shape == (4, 43)
    assert torch.equal(rows[:, :3], ids[[0, 0, 1, 1]])


def test_settings_reach_the_sampler(folders: tuple[Path, Path]) -> None:
    model = GPT.from_pretrained(folders[0])
    greedy = model.generate("It was", 12, temperature=0)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert model.generate("It was", 12, seed=3, **settings) == greedy
    assert model.generate("It was", 12, temperature=0, repetition_penalty=100.0) != greedy


def test_mistakes_say_what_it_takes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"gpt2 is not a folder; .* folder of a run .*save_pretrained"
    ):
        GPT.from_pretrained("gpt2")
    with pytest.raises(FileNotFoundError, match=r"has neither config\.toml nor config\.json"):
        GPT.from_pretrained(tmp_path)
    model = GPT(ModelConfig(50, context_length=8, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ValueError, match=r"no tokenizer; set model\.tokenizer"):
        model.generate("text")
    with pytest.raises(ValueError, match=r"prompt has shape \(3,\)"):
        model.generate(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="num_return_sequences = 0"):
        GPT.from_pretrained(folders[0]).generate("It", num_return_sequences=0)


def test_a_model_beyond_the_memory_is_refused(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedgpt.gpt.device.total_memory", lambda _: 50_000)
    for folder in folders:
        with pytest.raises(ValueError, match=rf"{folder}: a model of .* needs .* GiB of memory"):
            GPT.from_pretrained(folder)
