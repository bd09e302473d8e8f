"""GPT-2's tokenizer: published ids, tiktoken's own for any text, and every way to its vocabulary file."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.data.tokenizers import gpt2, load_tokenizer, make_tokenizer
from fusedgpt.data.tokenizers.gpt2 import GPT2Tokenizer

PUBLISHED = {
    "\t": [197],
    "\n\n\n": [628, 198],
    "   a": [220, 220, 257],
    "a\r\nb": [64, 201, 198, 65],
    "café": [66, 1878, 2634],
    "e\u0301": [68, 136, 223],
    "😉": [47249, 231],
    "\u200b": [9525],
    "\u00a0x": [1849, 87],
    "I'll don't WE'LL": [40, 1183, 836, 470, 12887, 6, 3069],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    "": [],
}


@pytest.fixture(scope="module")
def tokenizer(gpt2_tokenizer_cache: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.find(gpt2_tokenizer_cache)


@pytest.fixture(scope="module")
def theirs(gpt2_tokenizer_cache: Path) -> tiktoken.Encoding:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_tokenizer_cache))
        return tiktoken.get_encoding("gpt2")


@pytest.fixture
def vocab_bpe(gpt2_tokenizer_cache: Path) -> bytes:
    return (gpt2_tokenizer_cache / gpt2.NAMES[1]).read_bytes()


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a proxy that refuses."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of its first use
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("FUSEDGPT_CACHE", str(cache))
    return cache


@pytest.mark.parametrize(("text", "ids"), PUBLISHED.items())
def test_published_ids(tokenizer: GPT2Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode_ordinary(text) == tokenizer.encode_plain(text) == ids
    assert tokenizer.decode(ids) == text


def test_the_special_token(tokenizer: GPT2Tokenizer) -> None:
    assert tokenizer.encode("<|endoftext|>", allowed_special="all") == [50256] == [tokenizer.end_of_text]
    assert tokenizer.vocab_size == 50257


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("ab'sl1 \t\n\r\u00a0é\u0301😉日-<|>")))
def test_ids_equal_tiktokens_for_any_text(
    tokenizer: GPT2Tokenizer, theirs: tiktoken.Encoding, text: str
) -> None:
    ids = theirs.encode_ordinary(text)
    assert tokenizer.encode_ordinary(text) == ids
    assert tokenizer.decode(ids) == text


def test_the_verdict(tokenizer: GPT2Tokenizer, theirs: tiktoken.Encoding, shared_data: Path) -> None:
    text = (shared_data / "the-verdict.txt").read_text("utf-8")
    assert len(tokenizer.encode(text)) == 5145
    assert tokenizer.encode(text) == tokenizer.encode_plain(text) == theirs.encode(text)


def test_the_vocabulary_is_found_in_a_folder_and_in_tiktokens_cache(
    gpt2_tokenizer_cache: Path,
    vocab_bpe: bytes,
    no_network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "vocab.bpe").write_bytes(vocab_bpe)
    assert make_tokenizer(f"gpt2:{tmp_path}").encode("café") == [66, 1878, 2634]
    assert make_tokenizer(f"gpt2:{gpt2_tokenizer_cache}").encode("café") == [66, 1878, 2634]
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        for folder in (gpt2_tokenizer_cache, tmp_path):
            monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
            monkeypatch.setenv(variable, str(folder))
            assert make_tokenizer("gpt2").encode("café") == [66, 1878, 2634]


def test_a_run_needs_neither_cache_nor_network(
    tokenizer: GPT2Tokenizer, no_network: Path, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("I'll don't") == [40, 1183, 836, 470]
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_the_vocabulary_comes_through_the_network_into_the_users_cache(
    vocab_bpe: bytes, no_network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "published.bpe").write_bytes(vocab_bpe)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("fusedgpt.data.download._require_https", lambda url: None)
    monkeypatch.setattr(gpt2, "URL", f"http://127.0.0.1:{server.server_port}/published.bpe")
    try:
        assert make_tokenizer("gpt2").encode("café") == [66, 1878, 2634]
        assert [file.read_bytes() for file in no_network.iterdir()] == [vocab_bpe]
        (tmp_path / "published.bpe").unlink()
        assert make_tokenizer("gpt2").encode("café") == [66, 1878, 2634]
        (tmp_path / "published.bpe").write_bytes(b"something else")
        next(no_network.iterdir()).unlink()
        with pytest.raises(FileNotFoundError, match="cannot be fetched"):
            make_tokenizer("gpt2")
    finally:
        server.shutdown()
        server.server_close()


def test_without_cache_and_network_it_says_what_to_do(
    no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in (str(no_network), ""):
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
        with pytest.raises(FileNotFoundError) as caught:
            make_tokenizer("gpt2")
        for hint in (
            gpt2.URL,
            "vocab.bpe",
            "TIKTOKEN_CACHE_DIR",
            "gpt2:FOLDER",
            "--tokenizer bpe",
        ):
            assert hint in str(caught.value)


def test_a_folder_without_the_vocabulary_or_with_another_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no vocab\.bpe"):
        make_tokenizer(f"gpt2:{tmp_path}")
    for other in (b"#version: 0.2\nh e\n", b"\xff\x00"):
        (tmp_path / "vocab.bpe").write_bytes(other)
        with pytest.raises(ValueError, match=r"vocab\.bpe: it is not GPT-2's"):
            make_tokenizer(f"gpt2:{tmp_path}")
