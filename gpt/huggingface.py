"""Import and export of weights and tokenizers in transformers' GPT-2 format.

The format is a folder with config.json, model.safetensors (or several files with an index) and a tokenizer. Its
Conv1D layers store their weights as (in, out), ours are (out, in); everything else has the same names and shapes, with
or without the prefix `transformer.`. No file is unpickled, and none is read through a link that leaves the folder.
"""

import json
import math
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..data.files import new_folder, write_file
from ..data.tokenizers import END_OF_TEXT, BPETokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer
from ..data.untrusted import InputError, MissingFile, inside, read_bytes, read_json
from .config import DROPOUTS, VALUE_ALIASES, ModelConfig, SettingError
from .device import require_memory
from .model import GPT
from .snapshot import not_finite
from .tensors import Spec, describe_tensors, read_tensors, write_tensors

PREFIX = "transformer."
OWN_TOKENIZER = "fusedgpt-tokenizer.json"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, stored in old files
READ = (torch.float32, torch.bfloat16, torch.float16)  # each value of these is one of float32
AGAIN = "fetch or export it again"
SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
RATES = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
GELU = {"tanh": "gelu_new", "exact": "gelu"}  # what activation_function is written as
# What our GPT computes. A key that config.json leaves out has this value too; so it is with SIZES and RATES.
FIXED: dict[str, Any] = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


class _Config(TypedDict, total=False):
    """What config.json may say of the computation."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None
    embd_pdrop: float
    attn_pdrop: float
    resid_pdrop: float
    activation_function: str
    model_type: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    add_cross_attention: bool
    tie_word_embeddings: bool


class _Index(TypedDict):
    weight_map: dict[str, str]


class _Merges(TypedDict):
    merges: list[str | tuple[str, str]]


class _TokenizerJson(TypedDict):
    model: _Merges


def to_transformers(model: GPT) -> dict[str, Tensor]:
    """The state of a transformers `GPT2LMHeadModel` that computes what this model computes; the tensors are copies.

    A bias that the model does not have is zero. The vocabulary has its true size; the head is the embedding and is
    not written twice.

    Raises:
        ValueError: the model is untied or post-norm.
    """
    config = model.config
    if not config.tie_weights:
        raise ValueError(
            "a model with an untied head has no transformers form: a GPT-2's head is its embedding"
        )
    if config.norm != "pre":
        raise ValueError(
            "a post-norm model has no transformers form: a GPT-2 normalises before each sub-layer"
        )
    own = {name: p.detach() for name, p in model.named_parameters()}
    own["wte.weight"] = own["wte.weight"][: config.vocab_size]
    state = {}
    for name, shape in _shapes(config).items():
        tensor = own.get(name, torch.zeros((), dtype=own["wte.weight"].dtype))
        tensor = tensor.T if name.endswith(CONV1D) else tensor.expand(shape)
        state[PREFIX + name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return state


def export_model(model: GPT, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a model with its tokenizer as a folder that transformers' `from_pretrained` reads.

    gpt2 and bpe tokenizers become a tokenizer.json of transformers; all kinds are also written in our own form, as
    fusedgpt-tokenizer.json, from which `import_tokenizer` takes them back.

    Raises:
        ValueError: the model is untied or post-norm, or the tokenizer is another model's.
        FileExistsError: the folder has something in it.
    """
    folder, config = Path(folder), model.config
    state = to_transformers(model)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {config.vocab_size}; "
            "export the model with the tokenizer that it was trained with"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; choose another")
    sizes = (config.vocab_size, config.context_length, config.n_embd, config.n_layer, config.n_head)
    rates = (config.embd_dropout, config.attn_dropout, config.resid_dropout)
    written = FIXED | {"architectures": ["GPT2LMHeadModel"], "activation_function": GELU[config.gelu]}
    written |= dict(zip(SIZES, sizes, strict=True)) | dict(zip(RATES, rates, strict=True))
    written |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text)
    with new_folder(folder) as unfinished:
        write_tensors(state, unfinished / "model.safetensors")
        tokenizer.save(unfinished / OWN_TOKENIZER)
        if isinstance(tokenizer, BPETokenizer) and (converted := _tokenizer_json(tokenizer)):
            _write_json(unfinished / "tokenizer.json", converted)
            described = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": config.context_length,
            }
            described |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
            _write_json(unfinished / "tokenizer_config.json", described)
        _write_json(unfinished / "config.json", written)


def import_model(folder: str | Path) -> GPT:
    """The model of a transformers GPT-2 folder, in float32 and evaluation mode. It has all biases and a tied head.

    Raises:
        MissingFile: there is no such folder, no config.json, or no safetensors file in it.
        InputError: a file is damaged, leads out of the folder, or the model is no GPT-2 or one of a kind that this program
            does not compute.
        ValueError: it does not fit the memory.
    """
    folder = Path(folder)
    config = _read_config(folder)
    shapes = _shapes(config)
    state = _read_state(folder, shapes)
    with torch.device("meta"):  # no time spent on initial weights
        model = GPT(config)
    own = {}
    for name in shapes:
        tensor = state.pop(name)
        own[name] = (tensor.T if name.endswith(CONV1D) else tensor).to(torch.float32).contiguous()
    if wrong := not_finite(own):
        raise InputError(folder, f"{wrong} has values that are no finite numbers", AGAIN)
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), own["wte.weight"]):
        raise InputError(folder, "the head differs from the embedding", "this program reads tied models only")
    padding = own["wte.weight"].new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    own["wte.weight"] = torch.cat([own["wte.weight"], padding])
    model.load_state_dict(own, assign=True)
    return model.eval()


def import_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a transformers GPT-2 folder: the one that `export_model` wrote, else GPT-2's own.

    Raises:
        MissingFile: the folder has none, and GPT-2's vocabulary cannot be found elsewhere.
        InputError: its tokenizer is of another kind, damaged, or does not fit the model.
    """
    folder = Path(folder)
    tokenizer = _read_tokenizer(folder)
    if tokenizer.vocab_size != (size := _read_config(folder).vocab_size):
        what = f"the model has {size} tokens but the tokenizer {tokenizer.vocab_size}"
        raise InputError(folder, what, "import a model with the tokenizer that it was trained with")
    return tokenizer


def _read_tokenizer(folder: Path) -> Tokenizer:
    other = "this program reads GPT-2's own tokenizer and those it exported itself"
    if (file := _file(folder, OWN_TOKENIZER)).is_file():
        return load_tokenizer(file)
    if (file := _file(folder, "merges.txt")).is_file():
        merges = read_bytes(file, 1 << 20, other).decode(errors="replace")
    elif (file := _file(folder, "tokenizer.json")).is_file():
        pairs = read_json(file, _TokenizerJson, other)["model"]["merges"]
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        merges = "\n".join(["#version: 0.2", *lines, ""])
    else:
        try:
            return GPT2Tokenizer.find()
        except FileNotFoundError:
            what, put = (
                "it has no tokenizer, and GPT-2's own is not on this machine",
                "put its merges.txt there",
            )
            raise MissingFile(folder, what, put) from None
    try:
        return GPT2Tokenizer(merges)
    except ValueError:
        raise InputError(file, "it is not GPT-2's own tokenizer", other) from None


def _file(folder: Path, name: str, origin: Path | None = None) -> Path:
    """The file `name` of the folder, as `inside` allows it. In the cache of the Hugging Face hub the files of a snapshot,
    models--NAME/snapshots/REVISION, are links into the blobs of the same model."""
    path, real = folder / name, folder.resolve()
    if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
        blobs = real.parents[1] / "blobs"
        if path.parent == folder and path.is_symlink() and path.resolve().parent == blobs:
            return path
    return inside(folder, name, origin or path)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a GPT-2 with all its biases, as our modules have them."""
    with torch.device("meta"):  # one layer: a thousand take a second
        one = GPT(ModelConfig(config.vocab_size, config.context_length, 1, config.n_head, config.n_embd))
    shapes = {}
    for name, p in one.named_parameters():
        for layer in range(config.n_layer if name.startswith("h.0.") else 1):
            shapes[name.replace("h.0.", f"h.{layer}.", 1)] = tuple(p.shape)
    return shapes | {"wte.weight": (config.vocab_size, config.n_embd)}


def _read_config(folder: Path) -> ModelConfig:
    takes = "it takes what transformers' save_pretrained writes"
    if not (file := _file(folder, "config.json")).is_file():
        what = "it has no config.json" if folder.is_dir() else "it is not a folder"
        raise MissingFile(folder, what, takes)
    found: dict[str, Any] = dict(read_json(file, _Config, takes))
    for name, value in FIXED.items():
        if found.get(name, value) != value:
            raise InputError(file, f"it has {name} = {json.dumps(found[name])}", _only(json.dumps(value)))
    sizes = [found.get(name, default) for name, default in SIZES.items()]
    rates = [found.get(name, default) for name, default in RATES.items()]
    vocab_size, context_length, n_embd, n_layer, n_head = sizes
    if found.get("n_inner") not in (None, 4 * n_embd):
        what = f"it has n_inner = {found['n_inner']}"
        raise InputError(file, what, _only(f"a feed-forward of 4 * n_embd = {4 * n_embd}"))
    activation = found.get("activation_function", "gelu_new")
    if activation not in (known := VALUE_ALIASES["gelu"]):
        what = f"it has activation_function = {json.dumps(activation)}"
        raise InputError(file, what, _only(", ".join(known)))
    dropouts = dict(zip(DROPOUTS, rates, strict=True))
    try:
        return ModelConfig(
            vocab_size, context_length, n_layer, n_head, n_embd, gelu=known[activation], **dropouts
        )
    except SettingError as error:
        raise InputError(file, str(error), takes) from None


def _only(what: str) -> str:
    return f"this program computes GPT-2 as released, with {what}"


def _read_state(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The folder's tensors of these names, and its head if it has one, without `transformer.`; in the files' layout.

    All headers are compared with the shapes before any tensor is read.
    """
    found: dict[str, tuple[Path, str, Spec]] = {}
    contents = {file: describe_tensors(file, AGAIN) for file in _weight_files(folder)}
    for file, content in contents.items():
        for written, spec in content.items():
            name = written.removeprefix(PREFIX)
            if name in found:
                raise InputError(file, f"{name} is in it and once more in {found[name][0].name}", AGAIN)
            if not name.endswith(BUFFERS):
                found[name] = file, written, spec
    head = {"lm_head.weight": shapes["wte.weight"]}
    for name, shape in (shapes | {name: head[name] for name in head if name in found}).items():
        if name not in found:
            raise InputError(folder, f"the weights lack {name}, which config.json asks for", AGAIN)
        file, _, (other, dtype) = found[name]
        stored = shape[::-1] if name.endswith(CONV1D) else shape
        if other != stored:
            raise InputError(file, f"{name} has shape {other} where config.json makes it {stored}", AGAIN)
        if dtype not in READ:
            what = (
                f"{name} is {str(dtype).removeprefix('torch.')}, and read are float32, bfloat16 and float16"
            )
            raise InputError(file, what, "save the model in one of these")
    if more := found.keys() - shapes.keys() - head.keys():
        raise InputError(folder, f"the weights have {min(more)}, which no GPT-2 language model has", AGAIN)

    values = sum(math.prod(shape) for _, _, (shape, _) in found.values())
    require_memory(
        torch.device("cpu"), 2 * 4 * values, f"{folder}: a model of {values:,} values", "take a smaller one"
    )
    state: dict[str, Tensor] = {}
    for file, content in contents.items():
        read = read_tensors(file, content, AGAIN)
        state |= {name: read[written] for name, (place, written, _) in found.items() if place == file}
    return state


def _weight_files(folder: Path) -> list[Path]:
    index = _file(folder, "model.safetensors.index.json")
    if (file := _file(folder, "model.safetensors")).is_file():
        return [file]
    if index.is_file():
        names = read_json(index, _Index, AGAIN)["weight_map"].values()
        return [_file(folder, name, index) for name in sorted(set(names))]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    what = f"only {pickled[0]}, and unpickling a file can run any program" if pickled else "no weights"
    convert = "load it where you trust it: save_pretrained of transformers writes model.safetensors"
    raise MissingFile(
        folder, f"it has {what}", convert if pickled else "this program reads model.safetensors"
    )


def _tokenizer_json(tokenizer: BPETokenizer) -> dict[str, Any] | None:
    """A byte-level BPE as the tokenizers library stores it; None if a special token is spelled like another token.

    There a byte is written as a printable character: itself, or U+0100 and what follows for the 68 others (Radford et
    al., 2019, released code).
    """
    letters = {b: chr(b if i < 188 else 256 + i - 188) for i, b in enumerate(GPT2Tokenizer.byte_order)}
    learnt = len(tokenizer.token_bytes) - len(tokenizer.special_tokens)
    tokens = ["".join(letters[b] for b in token) for token in tokenizer.token_bytes[:learnt]]
    if not tokenizer.special_tokens.keys().isdisjoint(tokens):
        return None
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = {token: i for i, token in enumerate(tokens)} | tokenizer.special_tokens
    return {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": s} | flags for s, id in tokenizer.special_tokens.items()],
        "pre_tokenizer": pieces,
        "decoder": pieces,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [[tokens[a], tokens[b]] for a, b in tokenizer.merges],
        },
    }


def _write_json(file: Path, value: dict[str, Any]) -> None:
    write_file(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
