"""SECURITY.md states the limits that the sources have."""

import re
from pathlib import Path

from fusedgpt.data import corpus, download, untrusted
from fusedgpt.data.tokenizers import base
from fusedgpt.gpt import config, generate, metrics, tensors

PAGE = (Path(__file__).resolve().parents[1] / "SECURITY.md").read_text("utf-8")
LIMITS = {
    "tokens in a vocabulary": base.MAX_VOCAB_SIZE,
    "special tokens of a tokenizer": base.MAX_SPECIAL_TOKENS,
    "bytes in a token": base.MAX_TOKEN,
    "bytes in all tokens of a BPE": base.MAX_TOKENS,
    **{
        f"`{name}`": config.LARGEST[name]
        for name in ("context_length", "n_layer", "n_head", "n_embd", "batch_size", "eval_windows")
    },
    "`sample_tokens`": config.LARGEST["sample_tokens"],
    "`steps`, and every other whole number of a setting but `seed`": config.LARGEST_COUNT,
    "characters in `data`, `tokenizer`, `prompt` and `device`": config.MAX_STRING,
    "new tokens of `gpt generate`": generate.MAX_TOKENS,
    "samples per prompt of `gpt generate`": generate.MAX_SAMPLES,
    "bytes in a JSON file": untrusted.MAX_JSON,
    "bytes in a TOML file": untrusted.MAX_TOML,
    "bytes in the header of a safetensors file": tensors.MAX_HEADER,
    "tokens in a shard": 2**31 - 1,  # an int32 in its header
    "bytes in a `.txt` file": corpus.MAX_TEXT,
    "bytes in a line of a `.jsonl` file": corpus.MAX_LINE,
    "bytes of text in a row group of a `.parquet` file, or 50 times the file's size": corpus.MAX_GROUP,
    "bytes in a run's `metrics.jsonl`": metrics.MAX_LOG,
    "tales of `tales:N`": corpus.MAX_TALES,
    "seconds without a byte of a download": int(download.STALL),
}


def test_the_limits_are_those_of_the_sources() -> None:
    table = dict(re.findall(r"^\| (.+?) \| ([\d,]+) \|$", PAGE, re.MULTILINE))
    assert {what: int(number.replace(",", "")) for what, number in table.items()} == LIMITS
    assert f"{download.SPARE:.0f} s and 1 s for each {download.SLOWEST:,} bytes" in PAGE


def test_every_size_of_a_setting_has_a_limit_on_the_page() -> None:
    named = {name for row in LIMITS for name in re.findall(r"`(\w+)`", row)}
    assert config.LARGEST.keys() - named == {"vocab_size", "bpe_vocab_size"}
    assert config.LARGEST["vocab_size"] == config.LARGEST["bpe_vocab_size"] == base.MAX_VOCAB_SIZE
