"""Folders of transformers' GPT-2, written by one side and read by the other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from fusedgpt.data.tokenizers import BPETokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer
from fusedgpt.data.untrusted import InputError
from fusedgpt.gpt.config import ModelConfig
from fusedgpt.gpt.generate import generate
from fusedgpt.gpt.huggingface import export_model, import_model, import_tokenizer, to_transformers
from fusedgpt.gpt.model import GPT

SHAPE = {"vocab_size": 300, "context_length": 20, "n_layer": 2, "n_head": 2, "n_embd": 24}
TEXT = "It had always seemed to me -- though a good fellow enough -- that he'd  see 1234 café 😉\n\n\tat last"


def random_model(**options: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**(SHAPE | options))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
        model.wte.weight[model.config.vocab_size :] = 0.0
    return model


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 300, ["<|a b|>", "<|a|>", "x<|a|>"])


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[GPT2LMHeadModel, Path]:
    """A random model of transformers and the folder it was saved in."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=20, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.data.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_transformers_reads_what_we_write(tmp_path: Path, bpe: BPETokenizer) -> None:
    model = random_model(resid_dropout=0.25)
    export_model(model, bpe, tmp_path / "out")
    other, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(other, GPT2LMHeadModel)
    assert (other.config.resid_pdrop, other.config.attn_pdrop) == (0.25, 0.0)
    assert other.config.eos_token_id == bpe.end_of_text
    prompt = torch.tensor([[5, 6, 7]])
    assert relative(model(prompt), other.eval()(prompt).logits) < 1e-5
    whole = other.generate(prompt, do_sample=False, max_new_tokens=17, eos_token_id=None, pad_token_id=0)
    assert [[5, 6, 7, *new] for new in generate(model, [[5, 6, 7]], 17, temperature=0)] == whole.tolist()


def test_our_round_trip_is_exact(tmp_path: Path, bpe: BPETokenizer) -> None:
    model = random_model(embd_dropout=0.1, attn_dropout=0.2)
    export_model(model, bpe, tmp_path / "out")
    again = import_model(tmp_path / "out")
    assert again.config == model.config
    assert equal(dict(again.named_parameters()), dict(model.named_parameters()))
    assert all(p.requires_grad and p.is_contiguous() for p in again.parameters())
    assert not again.training
    assert import_tokenizer(tmp_path / "out").fingerprint() == bpe.fingerprint()


def test_their_round_trip_is_exact(
    theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path, bpe: BPETokenizer
) -> None:
    other, folder = theirs
    model = import_model(folder)
    ids = torch.arange(40).view(2, 20)
    assert relative(model(ids), other(ids).logits) < 1e-5
    export_model(model, bpe, tmp_path / "out")
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("activation", "written", "other"),
    [
        ("gelu", "gelu", "gelu_new"),
        ("gelu_new", "gelu_new", "gelu"),
        ("gelu_pytorch_tanh", "gelu_new", "gelu"),
    ],
)
def test_the_kind_of_gelu_is_read_and_written(
    theirs: tuple[GPT2LMHeadModel, Path],
    tmp_path: Path,
    bpe: BPETokenizer,
    activation: str,
    written: str,
    other: str,
) -> None:
    _, folder = theirs
    ids = torch.arange(40).view(2, 20)
    edit(folder / "config.json", activation_function=activation)
    logits = GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits
    model = import_model(folder)
    assert relative(model(ids), logits) < 1e-5
    export_model(model, bpe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["activation_function"] == written
    assert relative(GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()(ids).logits, logits) < 1e-5
    edit(folder / "config.json", activation_function=other)
    assert relative(import_model(folder)(ids), logits) > 1e-4


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"bias": False}])
def test_absent_biases_are_written_as_zeros(tmp_path: Path, bpe: BPETokenizer, options: dict) -> None:
    model = random_model(**options)
    export_model(model, bpe, tmp_path / "out")
    other = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    again = import_model(tmp_path / "out")
    ids = torch.arange(20).view(1, 20)
    assert not again.h[1].attn.c_attn.bias.any()
    assert relative(model(ids), other(ids).logits) < 1e-5
    assert torch.equal(model(ids), again(ids))
    model.wte.weight.data += 1  # what was taken is a copy
    assert not torch.equal(model(ids), again(ids))


def test_names_without_prefix_mask_buffers_and_a_written_head_are_read(
    theirs: tuple[GPT2LMHeadModel, Path],
) -> None:
    other, folder = theirs
    expected = dict(import_model(folder).named_parameters())
    tensors = {
        name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()
    }
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 20, 20).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert equal(dict(import_model(folder).named_parameters()), expected)

    tensors["lm_head.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="head differs"):
        import_model(folder)

    bare = GPT2Model(other.config)
    bare.load_state_dict(other.transformer.state_dict())
    shutil.rmtree(folder)
    bare.save_pretrained(folder)
    assert equal(dict(import_model(folder).named_parameters()), expected)


def test_shards_are_read(theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path) -> None:
    other, folder = theirs
    other.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    again = import_model(tmp_path / "shards")
    assert equal(dict(again.named_parameters()), dict(import_model(folder).named_parameters()))
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of"):
        import_model(tmp_path / "shards")


def test_half_precision_becomes_float32(theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path) -> None:
    other, _ = theirs
    other.bfloat16().save_pretrained(tmp_path / "half")
    model = import_model(tmp_path / "half")
    assert torch.equal(model.wte.weight[:300], other.transformer.wte.weight.float())
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gptj"},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"n_inner": 50},
    ],
)
def test_another_architecture_is_refused_by_name(theirs: tuple[GPT2LMHeadModel, Path], change: dict) -> None:
    edit(theirs[1] / "config.json", **change)
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"config.json: it has {name} = {json.dumps(value)}"):
        import_model(theirs[1])


def test_weights_that_do_not_fit_are_named(theirs: tuple[GPT2LMHeadModel, Path]) -> None:
    _, folder = theirs
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    edit(folder / "config.json", n_embd=32)
    with pytest.raises(ValueError, match=r"has shape \(300, 24\) where config.json makes it \(300, 32\)"):
        import_model(folder)
    edit(folder / "config.json", n_embd=24, n_layer=3)
    with pytest.raises(ValueError, match=r"lack h\.2\."):
        import_model(folder)
    edit(folder / "config.json", n_layer=1)
    with pytest.raises(ValueError, match=r"have h\.1\."):
        import_model(folder)
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"model\.safetensors: it is damaged"):
        import_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: it is damaged"):
        import_model(folder)


def test_missing_files_are_named_and_nothing_is_unpickled(theirs: tuple[GPT2LMHeadModel, Path]) -> None:
    other, folder = theirs
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        import_model(folder)
    torch.save(other.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"only pytorch_model\.bin.*save_pretrained.*model\.safetensors"
    ):
        import_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        import_model(folder)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        import_model(folder / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"), [({"tie_weights": False}, "untied"), ({"norm": "post"}, "post-norm")]
)
def test_a_model_that_is_no_gpt2_is_not_written(
    tmp_path: Path, bpe: BPETokenizer, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(random_model(**options), bpe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path: Path, bpe: BPETokenizer) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_model(random_model(), bpe, tmp_path)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_model(random_model(), bpe, tmp_path / "mine.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="300 tokens but the model 299"):
        export_model(random_model(vocab_size=299), bpe, tmp_path / "out")


def test_the_state_has_the_true_vocabulary_and_is_a_copy() -> None:
    model = random_model()
    state = to_transformers(model)
    assert state["transformer.wte.weight"].shape == (300, 24)
    assert sum(t.numel() for t in state.values()) == model.num_params()
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not owned & {t.untyped_storage().data_ptr() for t in state.values()}


def same_ids(folder: Path, tokenizer: BPETokenizer) -> None:
    """transformers' tokenizer of that folder gives our ids, and our text back."""
    other = AutoTokenizer.from_pretrained(folder)
    specials = [text for token in tokenizer.special_tokens for text in (token, f" {token}", f"a{token}b")]
    texts = [
        TEXT,
        TEXT.upper() + " " * 30,
        "".join(specials),
        "naïve\r\n\u00a0x\u200b e\u0301 日本語 I'll WE'LL",
        "",
    ]
    for text in texts:
        ids = tokenizer.encode(text, allowed_special="all")
        assert other(text)["input_ids"] == ids
        assert other.decode(ids) == text
    specials = "".join(tokenizer.special_tokens)
    assert other.decode(other(f"a{specials}b")["input_ids"], skip_special_tokens=True) == "ab"
    assert len(other) == tokenizer.vocab_size
    assert other.eos_token_id == tokenizer.end_of_text


def test_a_trained_tokenizer_gives_the_same_ids_in_transformers(tmp_path: Path, bpe: BPETokenizer) -> None:
    export_model(random_model(), bpe, tmp_path / "out")
    same_ids(tmp_path / "out", bpe)


def test_gpt2s_tokenizer_goes_out_and_comes_back(tmp_path: Path, gpt2_tokenizer_cache: Path) -> None:
    gpt2, out = GPT2Tokenizer.find(), tmp_path / "out"
    export_model(random_model(vocab_size=50257, n_embd=2), gpt2, out)
    same_ids(out, gpt2)
    assert import_tokenizer(out).fingerprint() == gpt2.fingerprint()
    (out / "fusedgpt-tokenizer.json").unlink()  # as in a folder that transformers wrote
    assert import_tokenizer(out).fingerprint() == gpt2.fingerprint()
    merges = json.loads((out / "tokenizer.json").read_text())["model"]["merges"]
    (out / "tokenizer.json").unlink()
    assert (
        import_tokenizer(out).fingerprint() == gpt2.fingerprint()
    )  # none there: GPT-2's own, from the cache
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (out / "merges.txt").write_text("\n".join(lines), encoding="utf-8")  # as in a folder of the first years
    assert import_tokenizer(out).fingerprint() == gpt2.fingerprint()
    (out / "merges.txt").write_text("\n".join(lines[:-9]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt: it is not GPT-2's own"):
        import_tokenizer(out)
    edit(out / "config.json", vocab_size=50304)
    (out / "merges.txt").unlink()
    with pytest.raises(ValueError, match="the model has 50304 tokens but the tokenizer 50257"):
        import_tokenizer(out)


@pytest.mark.parametrize(
    "tokenizer",
    [
        WordTokenizer(["I", "had"]),
        CharTokenizer("abc"),
        BPETokenizer([(97, 98)], ["ab"]),  # transformers cannot tell this special token from the merge
    ],
)
def test_other_tokenizers_travel_in_our_own_form(tmp_path: Path, tokenizer: Any) -> None:
    export_model(random_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "out")
    assert import_tokenizer(tmp_path / "out").fingerprint() == tokenizer.fingerprint()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


# ---- folders of strangers


def indexed(folder: Path, name: str) -> None:
    """Replace the weights by an index that names one file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "link.safetensors", "a\0b"]
)
def test_an_index_cannot_lead_out_of_the_folder(
    theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path, name: str
) -> None:
    _, folder = theirs
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    (folder / "link.safetensors").symlink_to(outside)
    indexed(folder, str(outside) if name.startswith("/") else name)
    with pytest.raises(InputError, match=r"index\.json: it names .*which is not in its folder"):
        import_model(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "merges.txt", "fusedgpt-tokenizer.json"]
)
def test_no_file_is_read_through_a_link_out_of_the_folder(
    theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path, name: str
) -> None:
    _, folder = theirs
    CharTokenizer("".join(map(chr, range(100, 399)))).save(folder / "fusedgpt-tokenizer.json")
    if (folder / name).exists():
        shutil.move(folder / name, tmp_path / "outside")
    else:
        (tmp_path / "outside").write_text("#version: 0.2\n")
        (folder / "fusedgpt-tokenizer.json").unlink()
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match=f"{name}: it names '{name}', which is not in its folder"):
        (import_tokenizer if name.endswith(("txt", "tokenizer.json")) else import_model)(folder)


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(
    theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path
) -> None:
    _, folder = theirs
    expected = dict(import_model(folder).named_parameters())
    snapshot = tmp_path / "hub" / "models--some--gpt2" / "snapshots" / "0123abcd"
    blobs = snapshot.parents[1] / "blobs"
    for path in (snapshot, blobs, tmp_path / "hub" / "models--other" / "blobs"):
        path.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert equal(dict(import_model(snapshot).named_parameters()), expected)

    link = snapshot / "model.safetensors"
    blob = link.resolve()
    for place in (tmp_path / "hub" / "models--other" / "blobs" / "0", snapshot.parents[1] / "0"):
        shutil.copy(blob, place)
        link.unlink()
        link.symlink_to(place)
        with pytest.raises(InputError, match="not in its folder"):
            import_model(snapshot)


def test_a_tensor_in_two_files_is_refused(theirs: tuple[GPT2LMHeadModel, Path]) -> None:
    _, folder = theirs
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "one.safetensors")
    save_file({"wte.weight": tensors["transformer.wte.weight"]}, folder / "two.safetensors")
    indexed(folder, "one.safetensors")
    edit(
        folder / "model.safetensors.index.json",
        weight_map={"transformer.wte.weight": "one.safetensors", "wte.weight": "two.safetensors"},
    )
    with pytest.raises(InputError, match=r"two\.safetensors: wte\.weight .* once more in one\.safetensors"):
        import_model(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_other_dtypes_are_refused(theirs: tuple[GPT2LMHeadModel, Path], dtype: torch.dtype) -> None:
    _, folder = theirs
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: (transformer\.)?wpe\.weight"):
        import_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_weights_that_are_no_numbers_are_refused(theirs: tuple[GPT2LMHeadModel, Path], value: float) -> None:
    _, folder = theirs
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.ln_1.bias"][3:5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"h\.1\.ln_1\.bias has values that are no finite numbers"):
        import_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": "24"}, r"Expected `int`, got `str` - at `\$\.n_embd`"),
        ({"n_layer": 1 << 40}, "n_layer = 1099511627776"),
        ({"n_positions": 2**63 - 1}, "context_length = 9223372036854775807"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"resid_pdrop": 1.5}, "resid_dropout = 1.5"),
        ({"attn_pdrop": "x"}, r"\$\.attn_pdrop"),
        ({"n_head": 0}, "n_head = 0"),
    ],
)
def test_a_configuration_of_a_stranger_is_checked(
    theirs: tuple[GPT2LMHeadModel, Path], changes: dict[str, Any], message: str
) -> None:
    edit(theirs[1] / "config.json", **changes)
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        import_model(theirs[1])


def test_a_model_beyond_the_memory_is_refused_with_the_numbers(
    theirs: tuple[GPT2LMHeadModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedgpt.gpt.device.total_memory", lambda _: 100_000)
    with pytest.raises(
        ValueError, match=r"a model of [\d,]+ values needs .* GiB of memory, and this machine has"
    ):
        import_model(theirs[1])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, bpe: BPETokenizer, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("fusedgpt.gpt.huggingface._write_json", fail)
    with pytest.raises(type(error)):
        export_model(random_model(), bpe, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())
