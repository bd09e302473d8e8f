"""What the fuzzer feeds: the files that the program reads, made by itself with a tiny model, and who reads each.

`make_world` writes them; every call runs with that folder as the working folder.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...data import cache
from ...data.corpus import open_corpus
from ...data.loader import TokenLoader
from ...data.shards import stored_tokenizer, token_shards
from ...data.tokenizers import END_OF_TEXT, load_tokenizer, make_tokenizer
from ...data.windows import EvalWindows
from ...gpt import huggingface, settings, verdicts
from ...gpt.cli import main
from ...gpt.doctor import facts
from ...gpt.metrics import overfitting, read_metrics
from ...gpt.run import load_run
from ...gpt.train.interruption import Signals
from ...gpt.train.preparation import prepare

TEXT = (
    "the cat sat on the mat, and the dog lay by the door. it rained until noon! then the sun came out.\n" * 12
)
RUN, HF, SHARDED, SHARDS = "tiny-run", "tiny-hf", "tiny-sharded", "tiny-shards"
SHAPE = "--n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --batch-size 2 --warmup-steps 1 --eval-windows 2 --sample-tokens 4"
TRAIN = f"train --preset small --device cpu --data tiny.txt --tokenizer tiny-bpe.json {SHAPE}"
TRAIN += " --steps 4 --save-interval 2 --eval-interval 2 --log-interval 1"


@dataclass(frozen=True)
class Target:
    """A file that the program reads, or a command line.

    Args:
        name: of the target.
        weight: how often it is drawn beside the others.
        file: the mutated file, a pattern in the world; "": `words` are mutated instead.
        form: the format of the file, see `mutate.py`.
        call: reads it; returns the name of the checkpoint that it used, if any, or the command line's exit code.
        words: the command line to mutate.
        writes: beginnings of the names of what a call that succeeds may create or change; "": what was not there.
    """

    name: str
    weight: int
    file: str
    form: str
    call: Callable[[], Any]
    words: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def gpt(line: str) -> Callable[[], int]:
    """A call of the command line."""
    return lambda: main(line.split())


def make_world(folder: Path) -> None:
    """Write the files; the working folder is `folder` then."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    Path("../outside").mkdir()
    Path("tiny.txt").write_text(TEXT)
    lines = TEXT.splitlines()
    Path("tiny.jsonl").write_text(
        "".join(json.dumps({"text": line, "id": i}) + "\n" for i, line in enumerate(lines))
    )
    for kind in ("bpe", "word", "char"):
        size = "" if kind == "char" else " --vocab-size 290"
        _run(f"tokenizer train tiny.txt --kind {kind} --out tiny-{kind}.json{size}")
    _run(f"{TRAIN} --out {RUN}")
    _run(f"export {RUN} {HF}")
    _run(f"tokenize tiny.txt --tokenizer word --out {SHARDS}")
    shutil.copytree(HF, SHARDED)
    tensors = load_file(f"{HF}/model.safetensors")
    Path(SHARDED, "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-{i}.safetensors": names[i::2] for i in (0, 1)}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, Path(SHARDED, file))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, held in parts.items() for name in held},
    }
    Path(SHARDED, "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for foreign in ("tiny-merges", "tiny-foreign"):
        shutil.copytree(HF, foreign)
        Path(foreign, "fusedgpt-tokenizer.json").unlink()
    Path("tiny-foreign/tokenizer_config.json").unlink()
    Path("tiny-merges/merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    Path("settings.toml").write_text(Path(RUN, "config.toml").read_text())
    Path("tiny-vocabulary").mkdir()
    Path("tiny-vocabulary/vocab.bpe").write_text("#version: 0.2\nt h\nth e\n")
    Path("tiny-gpt2.json").write_text(json.dumps({"kind": "gpt2", "vocab_bpe": "#version: 0.2\nt h\n"}))
    save_file(tensors, "../outside/other.safetensors")
    verdicts.write_verdicts(
        torch.device("cpu"), {"attention gpt2 float32": "", "layer_norm": "its error is 3.1"}
    )
    Path("cached").mkdir()
    shutil.copy("tiny.txt", "cached/text.txt")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return
    pq.write_table(pa.table({"text": lines, "id": list(range(len(lines)))}), "tiny.parquet")


def warm() -> None:
    """Fill the cache with notes about files, which hold for these very files and no copies of them."""
    cache.SETTLED = 0  # the files are new, and would get none
    _cached()
    token_shards("tiny.txt", load_tokenizer(RUN))


def _run(line: str) -> None:
    if code := main(line.split()):
        raise RuntimeError(f"gpt {line} ended with exit code {code}")


# ---- readers of the library


def _tokenizer(name: str) -> Callable[[], Any]:
    def call() -> None:
        tokenizer = load_tokenizer(name)
        try:
            ids = tokenizer.encode_ordinary("the cat")
        except ValueError:  # a char tokenizer may lack a character
            ids = []
        tokenizer.decode([*ids, 0, tokenizer.end_of_text])
        tokenizer.encode(END_OF_TEXT, allowed_special="all")

    return call


def _texts(name: str) -> Callable[[], Any]:
    def call() -> None:
        corpus = open_corpus(name)
        for text in chain(corpus.train_texts(), corpus.val_texts()):
            text.encode()

    return call


def _read_data(source: str, tokenizer: str | None = None) -> None:
    shards = token_shards(source, make_tokenizer(tokenizer) if tokenizer else stored_tokenizer(source))
    for _ in islice(TokenLoader(shards.train, 4, 2), 3):
        pass
    for _ in EvalWindows(shards.val, 4, 2, 3):
        pass


def _cached() -> None:
    _read_data("cached/text.txt", "tiny-word.json")


def _import(folder: str) -> Callable[[], Any]:
    return lambda: (huggingface.import_model(folder), huggingface.import_tokenizer(folder))


def _load() -> str:
    return f"step-{load_run(Path(RUN)).step:06d}"


def _resume() -> str:
    chosen = settings.resolve({"steps": 6}, resume=Path(RUN))
    with Signals() as signals, ExitStack() as held:
        session = prepare(chosen.config, chosen.out, True, chosen.origins, signals, held)
        held.callback(session.writer.close)
        name = f"step-{session.step.step:06d}"
        session.step()  # with the state that was loaded
    return name


def _metrics() -> None:
    overfitting(read_metrics(Path(RUN, "metrics.jsonl")))


def _settings() -> None:
    settings.resolve({}, file=Path("settings.toml"), out=Path("new"))


# ---- the table

STEP = f"{RUN}/checkpoints/step-*"
ANY = f"{RUN}/**/*[a-z]"
TARGETS = [
    *(Target(f"tokenizer-{kind}", 8, f"tiny-{kind}.json", "json", _tokenizer(f"tiny-{kind}.json")) for kind in ("bpe", "word", "char", "gpt2")),
    Target("vocabulary", 4, "tiny-vocabulary/vocab.bpe", "text", lambda: make_tokenizer("gpt2:tiny-vocabulary")),
    Target("hf-config", 8, f"{HF}/config.json", "json", _import(HF)),
    Target("hf-weights", 5, f"{HF}/model.safetensors", "safetensors", _import(HF)),
    Target("hf-own-tokenizer", 3, f"{HF}/fusedgpt-tokenizer.json", "json", _import(HF)),
    Target("hf-index", 8, f"{SHARDED}/model.safetensors.index.json", "json", _import(SHARDED)),
    Target("hf-part", 4, f"{SHARDED}/model-1.safetensors", "safetensors", _import(SHARDED)),
    Target("hf-tokenizer", 4, "tiny-foreign/tokenizer.json", "json", _import("tiny-foreign")),
    Target("hf-merges", 2, "tiny-merges/merges.txt", "text", _import("tiny-merges")),
    Target("run-config", 8, f"{RUN}/config.toml", "toml", _load),
    Target("run-tokenizer", 5, f"{RUN}/tokenizer.json", "json", _load),
    Target("run-state", 7, f"{STEP}/state.json", "json", _load),
    Target("run-weights", 7, f"{STEP}/model.safetensors", "safetensors", _load),
    Target("run-manifest", 7, f"{STEP}/manifest.json", "json", _load),
    Target("resume-state", 4, f"{STEP}/state.json", "json", _resume, writes=(RUN,)),
    Target("resume-weights", 3, f"{STEP}/model.safetensors", "safetensors", _resume, writes=(RUN,)),
    Target("resume-optimizer", 6, f"{STEP}/optimizer.safetensors", "safetensors", _resume, writes=(RUN,)),
    Target("resume-manifest", 3, f"{STEP}/manifest.json", "json", _resume, writes=(RUN,)),
    Target("resume-metrics", 6, f"{RUN}/metrics.jsonl", "jsonl", _resume, writes=(RUN,)),
    Target("resume-config", 4, f"{RUN}/config.toml", "toml", _resume, writes=(RUN,)),
    Target("metrics", 10, f"{RUN}/metrics.jsonl", "jsonl", _metrics),
    Target("settings", 10, "settings.toml", "toml", _settings),
    Target("txt", 6, "tiny.txt", "text", _texts("tiny.txt")),
    Target("jsonl", 8, "tiny.jsonl", "jsonl", _texts("tiny.jsonl")),
    Target("parquet", 6, "tiny.parquet", "parquet", _texts("tiny.parquet")),
    Target("shard", 8, f"{SHARDS}/*.bin", "shard", lambda: _read_data(SHARDS)),
    Target("shards-meta", 5, f"{SHARDS}/meta.json", "json", lambda: _read_data(SHARDS)),
    Target("shards-tokenizer", 4, f"{SHARDS}/tokenizer.json", "json", lambda: _read_data(SHARDS)),
    Target("cached-shard", 2, "cache/tokens/text-*/*.bin", "shard", _cached),
    Target("cached-meta", 2, "cache/tokens/text-*/meta.json", "json", _cached),
    Target("cached-tokenizer", 2, "cache/tokens/text-*/tokenizer.json", "json", _cached),
    Target("cached-note", 2, "cache/known/*", "json", _cached),
    Target("verdicts", 4, "cache/verified/*", "json", lambda: list(facts(torch.device("cpu")))),
    # the same through the command line
    Target("gpt-generate", 4, ANY, "any", gpt(f"generate {RUN} --max-tokens 5 --seed 1")),
    Target("gpt-generate-checkpoint", 2, ANY, "any", gpt(f"generate {RUN}/checkpoints/step-000004 --max-tokens 5 --seed 1")),
    Target("gpt-evaluate", 3, ANY, "any", gpt(f"evaluate {RUN}")),
    Target("gpt-evaluate-shards", 3, f"{SHARDS}/*", "any", gpt(f"evaluate {RUN} --data {SHARDS}")),
    Target("gpt-resume", 1, ANY, "any", gpt(f"train --resume {RUN} --steps 4 --epochs 0 --sample-tokens 4 --eval-windows 2"), writes=(RUN,)),
    Target("gpt-export", 3, ANY, "any", gpt(f"export {RUN} new"), writes=("new",)),
    Target("gpt-import", 3, f"{HF}/*", "any", gpt(f"import {HF} new"), writes=("new",)),
    Target("gpt-import-parts", 3, f"{SHARDED}/*", "any", gpt(f"import {SHARDED} new"), writes=("new",)),
    Target("gpt-tokenize", 3, "tiny.*", "any", gpt("tokenize tiny.txt --tokenizer tiny-bpe.json --out new"), writes=("new",)),
    Target("gpt-tokenize-parquet", 3, "tiny.parquet", "parquet", gpt("tokenize tiny.parquet --tokenizer char --out new"), writes=("new",)),
    Target("gpt-tokenize-jsonl", 3, "tiny.jsonl", "jsonl", gpt("tokenize tiny.jsonl --tokenizer char --out new"), writes=("new",)),
    Target("gpt-tokenizer", 3, "tiny.jsonl", "jsonl", gpt("tokenizer train tiny.jsonl --kind bpe --vocab-size 270 --out new"), writes=("new",)),
    Target("gpt-train", 2, "settings.toml", "toml", gpt("train --config settings.toml --help")),
    # command lines
    *(
        Target(f"words-{line.split()[0]}", 3, "", "", gpt(""), tuple(line.split()), writes)
        for line, writes in (
            (f"generate {RUN} --max-tokens=3 --top-k 5 --top-p 0.5 --temperature 0.8 --stop x --seed 1 --prompt the", ()),
            (f"evaluate {RUN} --data tiny.txt --device cpu", ()),
            ("tokenize tiny.txt --tokenizer bpe --vocab-size 270 --val-fraction 0.2 --out new", ("",)),
            ("tokenizer train tiny.txt --vocab-size 270 --kind bpe --out new", ("",)),
            (f"plot {RUN} --out new", ("", f"{RUN}/loss_curve.png")),
            (f"import {HF} new", ("",)),
            (f"export {RUN} new --format hf", ("",)),
        )
    ),
]  # fmt: skip
