"""Import and export of weights and tokenizers in transformers' GPT-2 format.

The format is a folder with config.json, model.safetensors (or several files with an index) and a tokenizer. Its
Conv1D layers store their weights as (in, out), ours are (out, in); everything else has the same names and shapes, with
or without the prefix `transformer.`. No file is unpickled.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.tokenizers import END_OF_TEXT, BPETokenizer, GPT2Tokenizer, Tokenizer, load_tokenizer
from .config import DROPOUTS, VALUE_ALIASES, ModelConfig
from .model import GPT

PREFIX = "transformer."
OWN_TOKENIZER = "fusedgpt-tokenizer.json"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, stored in old files
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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(folder / OWN_TOKENIZER)
    if isinstance(tokenizer, BPETokenizer) and (converted := _tokenizer_json(tokenizer)):
        _write_json(folder / "tokenizer.json", converted)
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        _write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context_length}
            | special,
        )
    sizes = (config.vocab_size, config.context_length, config.n_embd, config.n_layer, config.n_head)
    rates = (config.embd_dropout, config.attn_dropout, config.resid_dropout)
    _write_json(
        folder / "config.json",
        FIXED
        | {"architectures": ["GPT2LMHeadModel"], "activation_function": GELU[config.gelu]}
        | dict(zip(SIZES, sizes, strict=True))
        | dict(zip(RATES, rates, strict=True))
        | dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text),
    )


def import_model(folder: str | Path) -> GPT:
    """The model of a transformers GPT-2 folder, in float32 and evaluation mode. It has all biases and a tied head.

    Raises:
        FileNotFoundError: there is no such folder, no config.json, or no safetensors file in it.
        ValueError: a file is damaged, or the model is no GPT-2 or one of a kind that this program does not compute.
    """
    folder = Path(folder)
    config = _read_config(folder)
    with torch.device("meta"):  # no time spent on initial weights
        model = GPT(config)
    state = _read_state(folder)
    own = {}
    for name, shape in _shapes(config).items():
        if name not in state:
            raise ValueError(f"{folder}: the weights lack {name}, which config.json asks for")
        tensor = state.pop(name)
        tensor = tensor.T if name.endswith(CONV1D) and tensor.dim() == 2 else tensor
        if tensor.shape != shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)} where config.json makes it {shape}"
            )
        own[name] = tensor.to(torch.float32).contiguous()
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), own["wte.weight"]):
        raise ValueError(
            f"{folder}: the head differs from the embedding; this program reads tied models only"
        )
    if state:
        raise ValueError(f"{folder}: the weights have {min(state)}, which no GPT-2 language model has")
    padding = own["wte.weight"].new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    own["wte.weight"] = torch.cat([own["wte.weight"], padding])
    model.load_state_dict(own, assign=True)
    return model.eval()


def import_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a transformers GPT-2 folder: the one that `export_model` wrote, else GPT-2's own.

    Raises:
        FileNotFoundError: the folder has none, and GPT-2's vocabulary cannot be found elsewhere.
        ValueError: its tokenizer is of another kind, damaged, or does not fit the model.
    """
    folder = Path(folder)
    tokenizer = _read_tokenizer(folder)
    if tokenizer.vocab_size != (size := _read_config(folder).vocab_size):
        raise ValueError(
            f"{folder}: the model has {size} tokens but the tokenizer {tokenizer.vocab_size}; "
            "import a model together with the tokenizer that it was trained with"
        )
    return tokenizer


def _read_tokenizer(folder: Path) -> Tokenizer:
    if (folder / OWN_TOKENIZER).is_file():
        return load_tokenizer(folder / OWN_TOKENIZER)
    if (file := folder / "merges.txt").is_file():
        merges = file.read_text(encoding="utf-8", errors="replace")
    elif (file := folder / "tokenizer.json").is_file():
        pairs = _read_json(file).get("model", {}).get("merges", [])
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        merges = "\n".join(["#version: 0.2", *lines, ""])
    else:
        return GPT2Tokenizer.find()
    try:
        return GPT2Tokenizer(merges)
    except ValueError:
        raise ValueError(
            f"{file} is not GPT-2's own tokenizer; this program reads that one and those it exported itself"
        ) from None


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a GPT-2 with all its biases, as our modules have them."""
    with torch.device("meta"):
        full = GPT(
            ModelConfig(
                config.vocab_size, config.context_length, config.n_layer, config.n_head, config.n_embd
            )
        )
    shapes = {name: tuple(p.shape) for name, p in full.named_parameters()}
    return shapes | {"wte.weight": (config.vocab_size, config.n_embd)}


def _read_config(folder: Path) -> ModelConfig:
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(f"{folder} {what}; it takes what transformers' save_pretrained writes")
    found = _read_json(folder / "config.json")
    for name, value in FIXED.items():
        if found.get(name, value) != value:
            raise ValueError(
                f"{folder}/config.json has {name} = {json.dumps(found[name])}; this program computes GPT-2 as "
                f"released, with {json.dumps(value)}"
            )
    sizes = [found.get(name, default) for name, default in SIZES.items()]
    rates = [found.get(name, default) for name, default in RATES.items()]
    vocab_size, context_length, n_embd, n_layer, n_head = sizes
    if found.get("n_inner") not in (None, 4 * n_embd):
        raise ValueError(
            f"{folder}/config.json has n_inner = {found['n_inner']}; this program computes GPT-2 as released, "
            f"with a feed-forward of 4 * n_embd = {4 * n_embd}"
        )
    activation = found.get("activation_function", "gelu_new")
    if activation not in (known := VALUE_ALIASES["gelu"]):
        raise ValueError(
            f"{folder}/config.json has activation_function = {json.dumps(activation)}; this program computes {', '.join(known)}"
        )
    dropouts = dict(zip(DROPOUTS, rates, strict=True))
    return ModelConfig(
        vocab_size, context_length, n_layer, n_head, n_embd, gelu=known[activation], **dropouts
    )


def _read_state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder by its name without `transformer.`, the buffers left out."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        has = f"only {pickled[0]}, and unpickling a file can run any program" if pickled else "no weights"
        raise FileNotFoundError(
            f"{folder} has {has}; this program reads model.safetensors, which transformers' save_pretrained writes"
        )
    state: dict[str, Tensor] = {}
    for name in files:
        try:
            state |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read ({error}); fetch or export it again") from None
    named = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith(BUFFERS)}


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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__} where an object belongs")
    return value


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
