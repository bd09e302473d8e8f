"""Mistakes a user can make: each ends in one short line that names the thing and the remedy, exit code 2, no traceback,
and every file is as it was before."""

import shutil
from pathlib import Path

import pytest
import torch

from fusedgpt.data.corpus import open_corpus
from fusedgpt.data.shards import tokenize
from fusedgpt.data.tokenizers import CharTokenizer
from fusedgpt.gpt.cli import main
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.huggingface import export_model
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.run import create_run

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file, run and shard folder, and everything that can be wrong with them."""
    here = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        Path("text.txt").write_text(TEXT)
        Path("short.txt").write_text("ab " * 5)
        Path("empty.txt").write_text("")
        Path("blank.txt").write_text(" \n\n")
        Path("binary.txt").write_bytes(b"GIF89a\x01\x00\x80\xff")
        Path("latin1.txt").write_bytes(b"un caf\xe9 noir")
        Path("table.csv").write_text("a,b\n")
        Path("broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
        Path("no_text").mkdir()
        Path("key.toml").write_text("[model]\nn_layr = 3\n")
        Path("type.toml").write_text("steps = true\n")
        Path("micro.toml").write_text("micro_batch = 'many'\n")
        Path("layers.toml").write_text("n_layer = 10_000_000\n")
        Path("digits.toml").write_text(f"steps = 0x{'f' * 20_000}\n")
        Path("float.toml").write_text(f"lr = 1{'0' * 400}\n")
        Path("syntax.toml").write_text("steps = 3\nlr 0.5\n")

        torch.manual_seed(0)
        tokenizer = CharTokenizer.train([TEXT])
        shape = ModelConfig(tokenizer.vocab_size, context_length=16, n_layer=1, n_head=2, n_embd=16)
        config = RunConfig(shape, TrainConfig(data="text.txt", tokenizer="char"))
        create_run(Path("runs/tiny"), config, tokenizer, {}, GPT(shape))
        other = CharTokenizer.train(["quite another alphabet: 0123456789"])
        for name in ("tokenizer", "weights", "config", "unsaved"):
            shutil.copytree("runs/tiny", f"runs/bad-{name}")
        other.save("runs/bad-tokenizer/tokenizer.json")
        weights = Path("runs/bad-weights/checkpoints/step-000000/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-50])
        file = Path("runs/bad-config/config.toml")
        file.write_text(file.read_text().replace("n_embd = 16", "n_embd = 32"))
        shutil.rmtree("runs/bad-unsaved/checkpoints")

        tokenize(open_corpus("text.txt"), tokenizer, "shards")
        for name in ("truncated", "foreign", "range"):
            shutil.copytree("shards", f"shards-{name}")
        shard = Path("shards-truncated/train_000000.bin")
        shard.write_bytes(shard.read_bytes()[:-10])
        Path("shards-foreign/train_000000.bin").write_bytes(b"\x7fELF" + bytes(2000))
        small = CharTokenizer.train(["abc"])
        small.save("shards-range/tokenizer.json")
        export_model(GPT(shape), tokenizer, "hf")
        shutil.copytree("hf", "hf-layers")
        file = Path("hf-layers/config.json")
        file.write_text(file.read_text().replace('"n_layer": 1', '"n_layer": 10000000'))
    return here


@pytest.fixture(autouse=True)
def world(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder, with a cache elsewhere."""
    here = tmp_path / "world"
    shutil.copytree(original, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return here


TRAIN = "train --device cpu --out runs/new"
SMALL = "--data text.txt --tokenizer char --context-length 16 --n-layer 1 --n-head 2 --n-embd 16 --steps 1"
CASES = {
    # data
    "empty file": (f"{TRAIN} --data empty.txt", ["empty.txt", "empty"]),
    "blank file": (f"{TRAIN} --data blank.txt", ["blank.txt", "empty"]),
    "binary file": (f"{TRAIN} --data binary.txt", ["binary.txt", "binary", "position 7"]),
    "invalid UTF-8": (f"{TRAIN} --data latin1.txt", ["latin1.txt", "UTF-8", "byte 6", "iconv"]),
    "missing file": (f"{TRAIN} --data txt.txt", ["txt.txt", "no such file", "text.txt"]),
    "missing folder": (f"{TRAIN} --data texts/novel", ["texts/novel", "no such file or folder"]),
    "unknown source": (f"{TRAIN} --data tinyshakespear", ["tinyshakespear", "did you mean tinyshakespeare?"]),
    "unknown ending": (f"{TRAIN} --data table.csv", ["table.csv", ".csv", ".txt, .jsonl, .parquet"]),
    "folder without texts": (f"{TRAIN} --data no_text", ["no_text", "no texts", ".txt"]),
    "broken jsonl": (f"{TRAIN} --data broken.jsonl", ["broken.jsonl, line 2"]),
    "text too short for a window": (
        f"{TRAIN} --data text.txt --tokenizer char --context-length 1024",
        ["validation", "1024", "context"],
    ),
    "text too short for anything": (f"{TRAIN} --data short.txt --tokenizer char", ["context"]),
    "tokenize an empty file": ("tokenize empty.txt --tokenizer char --out new", ["empty.txt", "empty"]),
    "tokenizer of a binary file": ("tokenizer train binary.txt --out t.json", ["binary.txt", "binary"]),
    "tokenizer too small": ("tokenizer train text.txt --vocab-size 9 --out t.json", ["vocab", "257"]),
    "size for a char tokenizer": (
        "tokenizer train text.txt --kind char --vocab-size 99 --out t.json",
        ["vocab_size", "char"],
    ),
    "share that is none": ("tokenize text.txt --val-fraction 1.5 --out new", ["val_fraction", "1.5"]),
    "evaluate on a missing file": ("evaluate runs/tiny --data nil.txt --device cpu", ["nil.txt", "no such"]),
    # shards
    "truncated shard": (
        f"{TRAIN} --data shards-truncated",
        ["shards-truncated/train_000000.bin", "truncated"],
    ),
    "foreign shard": (
        f"{TRAIN} --data shards-foreign",
        ["shards-foreign/train_000000.bin", "not a token shard"],
    ),
    "tokens out of range": (f"{TRAIN} --data shards-range", ["shards-range", "vocabulary has"]),
    # settings
    "unknown preset": (f"{TRAIN} --preset smal", ["unknown preset 'smal'", "did you mean 'small'"]),
    "unknown key": (f"{TRAIN} --config key.toml", ["key.toml", "'n_layr'", "did you mean 'n_layer'"]),
    "unknown flag": (f"{TRAIN} --n-layr 3", ["--n-layr", "did you mean --n-layer?"]),
    "unknown command": ("trian", ["'trian'", "did you mean 'train'"]),
    "unknown tokenizer": (f"{TRAIN} --data text.txt --tokenizer chars", ["'chars'", "'char'"]),
    "unknown device": (f"{TRAIN} --data text.txt --device gpu", ["'gpu'", "cuda"]),
    "wrong type": (f"{TRAIN} --config type.toml", ["type.toml", "steps = True", "a whole number"]),
    "wrong syntax": (f"{TRAIN} --config syntax.toml", ["syntax.toml", "line 2"]),
    "missing TOML file": (f"{TRAIN} --config nil.toml", ["nil.toml"]),
    "heads that do not divide": (f"{TRAIN} --n-head 5 --n-embd 64", ["n_head = 5", "n_embd = 64", "is 4"]),
    "context 0": (f"{TRAIN} --context-length 0", ["context_length = 0", "from 1 to 1048576"]),
    "negative learning rate": (f"{TRAIN} --lr -0.1", ["lr = -0.1", "from 0 up"]),
    "negative dropout": (f"{TRAIN} --attn-dropout -0.1", ["attn_dropout = -0.1", "from 0 to below 1"]),
    "negative weight decay": (f"{TRAIN} --weight-decay -1", ["weight_decay = -1.0", "from 0 up"]),
    "learning rate that is no number": (f"{TRAIN} --lr nan", ["lr = nan", "from 0 up"]),
    "steps 0": (f"{TRAIN} --steps 0", ["steps = 0", "from 1 to"]),
    "micro-batch that does not divide": (f"{TRAIN} --batch-size 8 --micro-batch 3", ["micro_batch = 3", "8"]),
    "micro-batch that is no number": (f"{TRAIN} --config micro.toml", ["micro_batch = 'many'", "or 'auto'"]),
    # sizes that no memory holds
    "a width that is too large": (
        f"{TRAIN} {SMALL} --n-embd 1000000000",
        ["n_embd = 1000000000", "to 65536"],
    ),
    "too many layers": (f"{TRAIN} --config layers.toml", ["layers.toml", "n_layer = 10000000", "to 1024"]),
    "a context that is too long": (
        f"{TRAIN} {SMALL} --context-length 9223372036854775807",
        ["context_length = 9223372036854775807", "to 1048576"],
    ),
    "a batch that is too large": (f"{TRAIN} {SMALL} --batch-size 1048577", ["batch_size = 1048577"]),
    "too many steps": (f"{TRAIN} {SMALL} --steps 1000000001", ["steps = 1000000001"]),
    "too many epochs": (f"{TRAIN} {SMALL} --epochs 1e300", ["epochs = 1e+300"]),
    "too many steps in epochs": (f"{TRAIN} {SMALL} --epochs 1e9", ["steps = "]),
    "too many windows": (f"{TRAIN} {SMALL} --eval-windows 1048577", ["eval_windows = 1048577"]),
    "a sample that is too long": (f"{TRAIN} {SMALL} --sample-tokens 1048577", ["sample_tokens = 1048577"]),
    "a vocabulary that is too large": (f"{TRAIN} --bpe-vocab-size 65537", ["bpe_vocab_size = 65537"]),
    "a number of many digits": (f"{TRAIN} --config digits.toml", ["digits.toml", "steps = ", "4,300 digits"]),
    "a float of many digits": (f"{TRAIN} --config float.toml", ["float.toml", "lr = ", "too large"]),
    "a model that needs a thousand machines": (
        f"{TRAIN} {SMALL} --n-layer 1024 --n-embd 16384",
        ["this machine has", "GiB", "weights", "optimizer", "What helps"],
    ),
    "too many new tokens": ("generate runs/tiny --max-tokens 1048577", ["max_tokens = 1048577"]),
    "too many samples": ("generate runs/tiny --num-samples 1000000000", ["num_samples = 1000000000"]),
    "import of too many layers": ("import hf-layers runs/new", ["hf-layers/config.json", "n_layer", "1024"]),
    # names
    "a name with escape sequences": ("evaluate runs/\x1b[31mred", ["runs/\\x1b[31mred", "there are runs/"]),
    "a name of many characters": (f"export runs/tiny {'x' * 3000}", ["xxx", "cannot be used", "too long"]),
    "a name of two lines": (f"{TRAIN} --data a\nb", ["a\\nb"]),
    # runs
    "missing run": ("generate runs/tin", ["runs/tin", "did you mean 'runs/tiny'"]),
    "folder that is no run": ("evaluate no_text", ["no_text", "config.toml"]),
    "run without a checkpoint": ("generate runs/bad-unsaved", ["runs/bad-unsaved", "checkpoint", "--resume"]),
    "missing run to resume": ("train --resume runs/tin", ["runs/tin", "did you mean 'runs/tiny'"]),
    "plot of no run": ("plot no_text", ["no_text"]),
    "tokenizer of another model": (
        "generate runs/bad-tokenizer",
        ["runs/bad-tokenizer", "tokenizer", "put back"],
    ),
    "tokenizer of another model, evaluated": (
        "evaluate runs/bad-tokenizer",
        ["runs/bad-tokenizer", "tokenizer"],
    ),
    "tokenizer of another model, resumed": (
        "train --resume runs/bad-tokenizer --device cpu",
        ["runs/bad-tokenizer", "tokenizer"],
    ),
    "shards of another tokenizer": (
        "train --resume runs/tiny --data shards-range --device cpu",
        ["shards-range", "tokenizer"],
    ),
    "truncated checkpoint": (
        "generate runs/bad-weights",
        ["model.safetensors", "its only checkpoint is damaged", "copy"],
    ),
    "checkpoint of another model": (
        "generate runs/bad-config",
        ["step-000000", "n_embd = 32 instead of 16", "put back"],
    ),
    "another model when resuming": (
        "train --resume runs/tiny --n-embd 32",
        ["n_embd = 32", "runs/tiny", "16"],
    ),
    "another folder when resuming": (
        "train --resume runs/tiny --out new",
        ["--out new", "--resume runs/tiny"],
    ),
    # generation
    "prompt longer than the context": (
        f"generate runs/tiny --device cpu --prompt {'thelazydog' * 3}",
        ["prompt", "16"],
    ),
    "character that is not in the vocabulary": ("generate runs/tiny --prompt é", ["'é'", "position 0"]),
    "half a surrogate pair": ("generate runs/tiny --prompt \udcff", ["surrogate"]),
    "negative temperature": ("generate runs/tiny --temperature -1", ["temperature", "-1"]),
    "top-p 0": ("generate runs/tiny --top-p 0", ["top_p", "0"]),
    "no samples": ("generate runs/tiny --num-samples 0", ["num_samples = 0"]),
    "empty stop string": ("generate runs/tiny --stop=", ["stop"]),
    "sample prompt longer than the context": (
        f"{TRAIN} {SMALL} --prompt {'thelazydog' * 3}",
        ["prompt", "16"],
    ),
    "sample prompt with another alphabet": (
        f"{TRAIN} {SMALL} --prompt é",
        ["'é'"],
    ),
    # output
    "run folder in use": ("train --out runs/tiny", ["runs/tiny: output folder in use", "--resume runs/tiny"]),
    "folder of others in use": ("train --out shards", ["shards: output folder in use", "another folder"]),
    "file as a folder": ("train --out text.txt", ["text.txt: output folder in use"]),
    "shard folder in use": ("tokenize text.txt --out shards", ["shards: output folder in use"]),
    "tokenizer file in use": ("tokenizer train text.txt --out text.txt", ["text.txt exists", "--out"]),
    "export folder in use": ("export runs/tiny shards", ["shards: output folder in use"]),
    "import folder in use": ("import hf runs/tiny", ["runs/tiny: output folder in use"]),
    "import of nothing": ("import nil runs/new", ["nil"]),
    "import of a run": ("import runs/tiny runs/new", ["runs/tiny", "config.json"]),
    "export to a format of others": (
        "export runs/bad-config out",
        ["step-000000", "n_embd = 32 instead of 16", "put back"],
    ),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder but the locks of runs, which stay behind."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.name != ".lock"
    }


@pytest.mark.parametrize(("line", "named"), CASES.values(), ids=CASES)
def test_a_mistake_is_named_and_nothing_is_written(
    line: str, named: list[str], world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = contents(world)
    assert main(line.split(" ")) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ")
    assert all(word in err for word in named), err
    assert err.count("\n") == 1
    assert len(err) < 400
    assert "Traceback" not in out + err
    assert contents(world) == before


def test_the_good_run_is_good(capfd: pytest.CaptureFixture[str]) -> None:
    """What the cases spoil works while it is whole, so each of them fails for its own reason."""
    assert main(["generate", "runs/tiny", "--prompt", "the", "--max-tokens", "3", "--device", "cpu"]) == 0
    assert main(["evaluate", "runs/tiny", "--data", "shards", "--device", "cpu"]) == 0
    assert "loss" in capfd.readouterr().out
