"""Properties of what reads files and settings: any bytes give a value or one InputError, and what was written is read back."""

import json
import math
import string
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedgpt.bench.soak.mutate import FORMATS, mutate, mutate_words
from fusedgpt.data.shards import open_shard, write_shards
from fusedgpt.data.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from fusedgpt.data.untrusted import InputError, inside, parse_json, printable, read_toml
from fusedgpt.gpt.config import KEYS, ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.settings import TYPES, read_config, write_config
from fusedgpt.gpt.tensors import describe_tensors, read_tensors, write_tensors

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(quick, max_examples=40)
letters = st.text(st.characters(codec="utf-8"))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | letters,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(letters, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
# bytes of no kind, and those of a document that somebody has edited
near_json = st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()).flatmap(
    lambda data: st.integers(0, len(data)).map(lambda cut: data[:cut] + b"\xff" + data[cut + 1 :])
)


def one_line(error: InputError, name: str = "") -> None:
    message = str(error)
    assert message.isprintable()
    assert len(message) <= 400
    assert name in message


# ---- data/untrusted.py


@quick
@given(st.text(), st.text(), st.text())
def test_an_error_is_one_printable_line(path, what, remedy):
    one_line(InputError(path, what, remedy))


@quick
@given(st.text(), st.integers(1, 20) | st.none())
def test_printable_text_is_printable_bounded_and_stays(text, limit):
    shown = printable(text, limit)
    assert shown.isprintable()
    assert limit is None or len(shown) <= limit
    assert printable(shown) == shown
    assert not text.isprintable() or limit is not None or shown == text


@quick
@given(values)
def test_json_is_read_back(value):
    assert parse_json(json.dumps(value), Any, "x.json", "") == value


@quick
@given(near_json, st.sampled_from([dict[str, int], list[tuple[int, int]], dict[str, Any], str, ModelConfig]))
def test_any_bytes_are_json_of_the_kind_or_an_error(data, kind):
    try:
        parse_json(data, kind, "folder/x.json", "make it again")
    except InputError as error:
        one_line(error, "folder/x.json")


@quick
@given(st.binary(max_size=60) | st.text('[]{}"=.,#\n\\a1 -eT:', max_size=60).map(str.encode))
def test_any_bytes_are_toml_or_an_error(tmp_path, data):
    file = tmp_path / "x.toml"
    file.write_bytes(data)
    try:
        assert isinstance(read_toml(file, "make it again"), dict)
    except InputError as error:
        one_line(error, "x.toml")


@quick
@given(
    st.lists(st.sampled_from(["..", ".", "a", "/", "link", "x" * 300, "\0", "\x1b", "é"]), max_size=5).map(
        "/".join
    )
)
def test_a_name_stays_in_its_folder_or_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    if not (folder / "link").exists():
        (folder / "link").symlink_to(tmp_path)
    try:
        assert inside(folder, name, Path("index.json")).resolve().is_relative_to(folder.resolve())
    except InputError as error:
        one_line(error, "index.json")


# ---- tokenizers


@quick
@given(near_json, st.sampled_from(["bpe", "word", "char", "gpt2", "x", None]), values)
def test_any_bytes_are_a_tokenizer_or_an_error(tmp_path, data, kind, value):
    file = tmp_path / "tokenizer.json"
    fields = {
        "kind": kind,
        "merges": value,
        "special_tokens": value,
        "words": value,
        "characters": value,
        "vocab_bpe": value,
    }
    for content in (data, json.dumps(fields).encode()):
        file.write_bytes(content)
        try:
            tokenizer = load_tokenizer(file)
        except InputError as error:
            one_line(error, "tokenizer.json")
        else:
            tokenizer.decode(range(tokenizer.vocab_size))


def trained(kind: type[BPETokenizer | WordTokenizer | CharTokenizer], text: str) -> Tokenizer:
    return kind.train([text], 260) if kind is BPETokenizer else kind.train([text])  # type: ignore[call-arg]


@few
@given(st.sampled_from([BPETokenizer, WordTokenizer, CharTokenizer]), letters.map(lambda text: f"a{text}"))
def test_a_tokenizer_is_read_back(tmp_path, kind, text):
    tokenizer = trained(kind, text)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    if kind is not WordTokenizer:  # which keeps no white space
        assert again.decode(again.encode_ordinary(text)) == text


# ---- settings


settings_values = (
    values | st.integers(-5, 50) | st.sampled_from(["pre", "adamw", "auto", "x\n", 1e300, math.inf])
)


@quick
@given(
    st.dictionaries(
        st.sampled_from([*KEYS, "n_heads", "drop_rate", "no_such"]) | letters, settings_values, max_size=4
    )
)
def test_any_settings_are_a_configuration_or_an_error_in_one_line(found):
    flat = {key: value for key, value in found.items() if key in KEYS and TYPES[key] is type(value)}
    for make in (lambda: ModelConfig.from_dict(found), lambda: RunConfig.from_flat(flat)):
        try:
            make()
        except ValueError as error:
            message = str(error)
        else:
            continue
        assert len(message) <= 400
        assert message.isprintable()


@few
@given(
    letters,
    letters,
    st.integers(1, 10**6),
    st.floats(0, 1e300),
    st.dictionaries(st.sampled_from(KEYS), st.text()),
)
def test_settings_are_read_back(tmp_path, data, prompt, steps, lr, origins):
    config = RunConfig(ModelConfig(), TrainConfig(data=data, prompt=prompt, steps=steps, lr=lr))
    write_config(tmp_path / "config.toml", config, origins)
    assert RunConfig.from_flat(read_config(tmp_path / "config.toml")) == config


# ---- shards and tensors


@quick
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3),
    st.binary(max_size=40),
    st.integers(0, 1030),
)
def test_any_bytes_are_a_shard_or_an_error(tmp_path, fields, rest, length):
    file = tmp_path / "x_train_000000.bin"
    head = b"".join(field.to_bytes(4, "little", signed=True) for field in fields)
    real = (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + head[8:]
    for start in (head, real):
        file.write_bytes(start.ljust(1024, b"\0")[:length] + rest)
        with pytest.raises(InputError) as caught:
            open_shard(file)
        one_line(caught.value, "x_train_000000.bin")


@few
@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=50), st.integers(1, 20))
def test_shards_are_read_back(tokens, size):
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        files = write_shards([np.array(tokens)], folder, "train", size)
        assert [int(token) for file in files for token in open_shard(file)[:]] == tokens


HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


@quick
@given(
    st.integers(0, 2**64 - 1) | st.integers(0, 90),
    near_json | st.just(json.dumps(HEADER).encode()),
    st.binary(max_size=20),
)
def test_any_bytes_are_tensors_or_an_error(tmp_path, length, header, rest):
    file = tmp_path / "x.safetensors"
    for claimed in (length, len(header)):
        file.write_bytes(claimed.to_bytes(8, "little") + header + rest)
        for read in (
            lambda: describe_tensors(file, "make it again"),
            lambda: read_tensors(file, {}, "make it again"),
        ):
            try:
                read()
            except InputError as error:
                one_line(error, "x.safetensors")


@few
@given(
    st.dictionaries(
        st.text(string.ascii_letters + ".|", min_size=1), st.lists(st.integers(0, 3), max_size=3), max_size=4
    )
)
def test_tensors_are_read_back_and_only_those_expected(tmp_path, shapes):
    tensors = {name: torch.rand(shape) for name, shape in shapes.items()}
    write_tensors(tensors, tmp_path / "x.safetensors")
    expected = {name: (tuple(shape), torch.float32) for name, shape in shapes.items()}
    found = read_tensors(tmp_path / "x.safetensors", expected, "make it again")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(InputError, match="extra is missing"):
        read_tensors(tmp_path / "x.safetensors", {**expected, "extra": ((), torch.float32)}, "make it again")


# ---- the mutator itself


@quick
@given(st.sampled_from(["bytes", *FORMATS]), st.binary(max_size=60), st.integers())
def test_anything_can_be_mutated_and_a_seed_repeats_it(form, data, seed):
    once = mutate(data, form, Random(seed), [b"other", b""])
    assert once == mutate(data, form, Random(seed), [b"other", b""])


@quick
@given(st.integers())
def test_mutated_words_could_be_arguments_of_a_process_and_lead_to_no_absolute_path(seed):
    words = mutate_words(["generate", "run", "--seed", "1"], Random(seed))
    assert not any("\0" in word or word.startswith("/") or "=/" in word for word in words)
