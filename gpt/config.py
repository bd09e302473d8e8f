"""The configuration of a run: the model's shape, the training settings, named presets, and their validation.

The names are GPT-2's; `ALIASES` lists the names that other GPT implementations use for the same settings, and they
are accepted wherever a name is: in a dictionary, a TOML file or a flag.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..data.untrusted import printable

ALIASES: dict[str, tuple[str, ...]] = {
    "n_embd": ("emb_dim", "d_model", "hidden_size"),
    "n_head": ("n_heads", "num_heads", "num_attention_heads"),
    "n_layer": ("n_layers", "num_layers", "num_hidden_layers"),
    "context_length": ("context_len", "block_size", "n_positions", "n_ctx", "max_position_embeddings"),
    "tie_weights": ("tie_word_embeddings", "weight_tying"),
    "gelu": ("activation_function",),
    "embd_dropout": ("embd_pdrop",),
    "attn_dropout": ("attn_pdrop",),
    "resid_dropout": ("resid_pdrop",),
    "steps": ("max_iters", "max_steps", "num_iterations"),
    "lr": ("learning_rate",),
    "micro_batch": ("micro_batch_size",),
    "grad_clip": ("max_grad_norm",),
}
# What transformers calls the values of a setting.
VALUE_ALIASES: dict[str, dict[str, Any]] = {
    "gelu": {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
}
DROPOUTS = ("embd_dropout", "attn_dropout", "resid_dropout")
DROPOUT_ALIASES = ("drop_rate", "dropout")  # one rate for all three
# The largest whole numbers: far above any GPT (GPT-3 has 96 layers, a width of 12,288 and 1,600 sequences a step), and small enough
# that what is checked before the memory is known, such as the divisors of a width, takes no time.
LARGEST = {
    "vocab_size": 65_536,  # token shards store ids in 16 bits
    "bpe_vocab_size": 65_536,
    "context_length": 1 << 20,
    "n_layer": 1024,
    "n_head": 1024,
    "n_embd": 65_536,
    "batch_size": 1 << 20,
    "eval_windows": 1 << 20,
    "sample_tokens": 1 << 20,
    "seed": 2**63 - 1,  # what torch takes
}
MAX_STRING = 4096  # characters; a config.toml that holds them must be read back
LARGEST_COUNT = 10**9  # of every other whole number: steps of 1 ms each would take 12 days


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT. The defaults are GPT-2's smallest model, as released (Radford et al., 2019)."""

    vocab_size: int = 50257
    """Vocabulary size; `gpt train` takes the tokenizer's."""
    context_length: int = 1024
    """Maximum sequence length in tokens."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    embd_dropout: float = 0.0
    """Dropout after the embeddings."""
    attn_dropout: float = 0.0
    """Dropout of the attention weights."""
    resid_dropout: float = 0.0
    """Dropout of the sub-layers' outputs, before they are added to the residual stream."""
    bias: bool = True
    """Biases in LayerNorms, projections and the feed-forward."""
    qkv_bias: bool = True
    """Biases of queries, keys and values (never without `bias`)."""
    tie_weights: bool = True
    """Share one matrix between the token embedding and the head."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm before each sub-layer (GPT-2) or after each addition (GPT-1)."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """The feed-forward's GELU: its tanh approximation (GPT-2) or exact (nanoGPT, BERT)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            _require_whole(self, name, 1)
        for name in DROPOUTS:
            _require(0.0 <= _number(self, name) < 1.0, self, name, "a probability from 0 to below 1")
        if self.n_embd % self.n_head:
            fitting = [heads for heads in range(1, self.n_embd + 1) if self.n_embd % heads == 0]
            nearest = min(fitting, key=lambda heads: abs(heads - self.n_head))
            raise SettingError(
                "n_head",
                f"n_head = {self.n_head} does not divide n_embd = {self.n_embd}; the nearest that does is {nearest}",
            )
        _require(self.norm in ("pre", "post"), self, "norm", "'pre' or 'post'")
        _require(self.gelu in ("tanh", "exact"), self, "gelu", "'tanh' or 'exact'")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary padded to a multiple of 128, for which matmuls are fastest."""
        return -(-self.vocab_size // 128) * 128

    @property
    def parameters(self) -> int:
        """Parameters in memory: with all biases, and with the padding of the vocabulary."""
        c = self.n_embd
        blocks = self.n_layer * (12 * c**2 + 13 * c)
        return (
            blocks
            + 2 * c
            + (self.padded_vocab_size * (1 if self.tie_weights else 2) + self.context_length) * c
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """A configuration from a dictionary with these names or those of other implementations (`ALIASES`).

        Raises:
            ValueError: an unknown key (the nearest known one is named) or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        return cls(**canonical(values, known))


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, and on what data."""

    data: str = "tales"
    """A .txt, .jsonl or .parquet file, a folder of them, a folder of token shards, or one of the names tales,
    the-verdict, tinyshakespeare, fineweb10B."""
    tokenizer: str = "bpe"
    """gpt2, bpe (byte-level, trained on the data), word, char, or the path of a saved tokenizer."""
    bpe_vocab_size: int = 4096
    """Vocabulary size of a bpe tokenizer trained on the data."""
    val_fraction: float = 0.1
    """Fraction of the data, at its end, held out for validation."""

    align_documents: bool = False
    """Start training windows at the beginning of a document where documents are shorter than the context."""

    steps: int = 1000
    """Optimizer steps."""
    epochs: float = 0.0
    """Passes over the data; replaces `steps` if above 0."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    micro_batch: int | Literal["auto"] = 0
    """Sequences per forward pass; must divide batch_size, and gradients accumulate. 0: the whole batch; auto: as
    many as fit on the GPU."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices with adamw for everything else."""
    lr: float = 6e-4
    """Peak learning rate of adamw."""
    muon_lr: float = 0.02
    """Peak learning rate of muon."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of its peak."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """The learning rate after warm-up; wsd: constant, then linear over the last cooldown_fraction."""
    cooldown_fraction: float = 0.2
    """Fraction of all steps over which wsd decays."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; biases and LayerNorms have none."""
    beta1: float = 0.9
    """Adam's decay rate of the mean of gradients."""
    beta2: float = 0.95
    """Adam's decay rate of the mean of squared gradients."""
    grad_clip: float = 1.0
    """Maximum global norm of the gradients; 0: no clipping."""
    label_smoothing: float = 0.0
    """Fraction of each training target spread evenly over the vocabulary; evaluation has none."""
    z_loss: float = 0.0
    """Coefficient of the squared log-sum-exp of the logits in the training loss (PaLM: 1e-4); evaluation has none."""

    device: str = "auto"
    """auto (a GPU if one works), cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations; weights and optimizer state stay float32. auto: bfloat16 on a GPU that supports it
    (else float16), float32 on a CPU."""
    float32_residual: bool = False
    """Keep the residual stream in float32 with lower-precision activations."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of the operators."""
    compile: Literal["off", "auto", "on"] = "off"
    """Run forward and backward through torch.compile. auto: on a CPU, in runs long enough to earn the compilation back."""
    cuda_graph: Literal["auto", "off"] = "auto"
    """auto: a GPU replays each step as CUDA graphs; off: each kernel is launched separately, with the same losses."""
    verify: Literal["off", "auto", "strict"] = "auto"
    """Compare the kernels and the first captured step with plain PyTorch before training. auto: what is wrong is replaced
    for this run; strict: it ends the run."""
    seed: int = 0
    """Seed of initial weights, batches, dropout and samples."""

    log_interval: int = 10
    """Steps between lines of the log."""
    eval_interval: int = 100
    """Steps between evaluations on the validation part."""
    eval_windows: int = 128
    """Validation windows of context_length tokens per evaluation, the same each time."""
    sample_interval: int = 0
    """Steps between samples of text; 0: at every evaluation."""
    sample_tokens: int = 100
    """Tokens per sample of text."""
    prompt: str = ""
    """The beginning of each sample; empty: the start of a document."""
    save_interval: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep; that with the best validation loss is kept beside them."""
    keep_every: int = 0
    """Keep also the checkpoints of every so many-th step; 0: none."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in host memory."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Where a record or checkpoint cannot be written: stop: end the run, after an attempt to save it; continue: leave that one
    out."""
    max_skipped: int = 50
    """Steps skipped in a row, because their losses or gradients were not finite, that end the run."""
    min_accepted: float = 0.0
    """Tales only: fail if the grammar accepts a smaller fraction of the tales that the trained model writes. A preset's
    value applies only to runs of at least that preset's steps."""
    tensorboard: bool = False
    """Also log to TensorBoard, into the run's folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""
    profile: bool = False
    """Trace a few steps into trace.json.gz in the run's folder, for ui.perfetto.dev, and print the time of each operator."""

    def __post_init__(self) -> None:
        whole = {"steps": 1, "batch_size": 1, "log_interval": 1, "eval_interval": 1, "eval_windows": 1}
        whole |= {"save_interval": 1, "keep_checkpoints": 1, "bpe_vocab_size": 257}
        whole |= {
            "max_skipped": 1,
            "keep_every": 0,
            "warmup_steps": 0,
            "sample_interval": 0,
            "sample_tokens": 0,
            "seed": 0,
        }
        for name, low in whole.items():
            _require_whole(self, name, low)
        for name in ("lr", "muon_lr", "weight_decay", "grad_clip", "z_loss", "epochs"):
            _require(0.0 <= _number(self, name) < float("inf"), self, name, "a number from 0 up")
        _require(self.epochs <= LARGEST_COUNT, self, "epochs", f"a number from 0 to {LARGEST_COUNT}")
        for name in ("min_lr_ratio", "cooldown_fraction", "label_smoothing", "min_accepted"):
            _require(0.0 <= _number(self, name) <= 1.0, self, name, "a number from 0 to 1")
        for name in ("beta1", "beta2", "val_fraction"):
            _require(0.0 <= _number(self, name) < 1.0, self, name, "a number from 0 to below 1")
        for name in ("data", "tokenizer", "prompt", "device"):
            value = getattr(self, name)
            short = isinstance(value, str) and len(value) <= MAX_STRING
            _require(short, self, name, f"a string of at most {MAX_STRING} characters")
        if self.micro_batch != "auto":
            allowed = _is_int(self.micro_batch) and self.micro_batch >= 0
            _require(allowed, self, "micro_batch", "a whole number from 0 up, or 'auto'")
        if isinstance(self.micro_batch, int) and self.micro_batch and self.batch_size % self.micro_batch:
            raise SettingError(
                "micro_batch",
                f"micro_batch = {self.micro_batch} does not divide batch_size = {self.batch_size}",
            )

    @property
    def sequences(self) -> int:
        """Sequences per forward pass.

        Raises:
            ValueError: micro_batch is still "auto".
        """
        if isinstance(self.micro_batch, str):
            raise ValueError(
                "micro_batch = 'auto' is for a device to settle: gpt.train.memory.largest_micro_batch"
            )
        return self.micro_batch or self.batch_size

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // self.sequences


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run."""

    model: ModelConfig
    train: TrainConfig

    def flat(self) -> dict[str, Any]:
        return asdict(self.model) | asdict(self.train)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The configuration with these values and defaults for the rest; the keys are canonical names."""
        own = {field.name for field in fields(ModelConfig)}
        return cls(
            ModelConfig(**{key: value for key, value in values.items() if key in own}),
            TrainConfig(**{key: value for key, value in values.items() if key not in own}),
        )


KEYS = tuple(field.name for config in (ModelConfig, TrainConfig) for field in fields(config))

# Training settings of the four GPT-2 sizes: GPT-3's table 2.1 for the learning rates, llm.c's run for the rest.
_PRETRAIN = {
    "data": "fineweb10B",
    "tokenizer": "gpt2",
    "steps": 19073,
    "batch_size": 512,
    "warmup_steps": 700,
    "min_lr_ratio": 0.0,
    "eval_interval": 250,
    "save_interval": 1000,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tales": {
        "data": "tales",
        "tokenizer": "bpe",
        "bpe_vocab_size": 1024,
        "align_documents": True,
        "context_length": 160,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "optimizer": "muon",
        "steps": 1600,
        "batch_size": 16,
        "lr": 1e-2,
        "muon_lr": 0.02,
        "min_lr_ratio": 0.02,
        "warmup_steps": 50,
        "schedule": "wsd",
        "cooldown_fraction": 0.6,
        "weight_decay": 0.0,
        "eval_interval": 200,
        "sample_tokens": 160,
        "min_accepted": 0.3,
    },
    "small": {
        "tokenizer": "bpe",
        "bpe_vocab_size": 4096,
        "context_length": 256,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 192,
        "optimizer": "muon",
        "lr": 2e-3,
        "warmup_steps": 50,
        "batch_size": 8,
        "resid_dropout": 0.1,
        "embd_dropout": 0.1,
    },
    "verdict": {
        "data": "the-verdict",
        "tokenizer": "gpt2",
        "context_length": 256,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 192,
        "embd_dropout": 0.1,
        "attn_dropout": 0.1,
        "resid_dropout": 0.1,
        "qkv_bias": False,
        "tie_weights": False,
        "epochs": 10.0,
        "batch_size": 2,
        "optimizer": "muon",
        "lr": 6e-3,
        "muon_lr": 0.03,
        "schedule": "constant",
        "warmup_steps": 10,
        "log_interval": 5,
        "eval_interval": 5,
    },
    "shakespeare-char": {
        "data": "tinyshakespeare",
        "tokenizer": "char",
        "context_length": 64,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "bias": False,
        "gelu": "exact",
        "steps": 2000,
        "batch_size": 12,
        "lr": 1e-3,
        "beta2": 0.99,
        "eval_interval": 250,
        "eval_windows": 240,
    },
    "shakespeare-char-gpu": {
        "data": "tinyshakespeare",
        "tokenizer": "char",
        "context_length": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "bias": False,
        "gelu": "exact",
        "embd_dropout": 0.2,
        "attn_dropout": 0.2,
        "resid_dropout": 0.2,
        "steps": 5000,
        "batch_size": 64,
        "lr": 1e-3,
        "beta2": 0.99,
        "eval_interval": 250,
        "eval_windows": 400,
    },
    "gpt2": _PRETRAIN | {"lr": 6e-4, "micro_batch": 64},
    "gpt2-medium": _PRETRAIN | {"n_layer": 24, "n_head": 16, "n_embd": 1024, "lr": 3e-4, "micro_batch": 32},
    "gpt2-large": _PRETRAIN | {"n_layer": 36, "n_head": 20, "n_embd": 1280, "lr": 2.5e-4, "micro_batch": 16},
    "gpt2-xl": _PRETRAIN
    | {
        "n_layer": 48,
        "n_head": 25,
        "n_embd": 1600,
        "lr": 2e-4,
        "micro_batch": 16,
        "activation_checkpointing": True,
    },
}


def preset(name: str) -> RunConfig:
    """The preset's configuration.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    if name not in PRESETS:
        there = f"; there are {', '.join(PRESETS)}"
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS) or there}")
    return RunConfig.from_flat(PRESETS[name])


def full_length(config: TrainConfig) -> int:
    """The steps from which `min_accepted` applies: those of the preset with this value, 0 for a user's own value."""
    return next((p["steps"] for p in PRESETS.values() if p.get("min_accepted") == config.min_accepted), 0)


def canonical(values: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Translate aliases to this project's names.

    Raises:
        ValueError: a key that is neither a known name nor an alias of one, or two names for one thing.
    """
    known = set(known)
    names = {alias: name for name, aliases in ALIASES.items() if name in known for alias in aliases}
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key in DROPOUT_ALIASES and known.issuperset(DROPOUTS):
            targets: tuple[str, ...] = DROPOUTS
        elif key in names or key in known:
            targets = (names.get(key, key),)
        else:
            options = {**dict.fromkeys(known), **dict.fromkeys(names), **dict.fromkeys(DROPOUT_ALIASES)}
            raise ValueError(f"unknown key {shown(key)}{nearest(key, options)}")
        for target in targets:
            value = VALUE_ALIASES.get(target, {}).get(value, value) if isinstance(value, str) else value
            if target in result and result[target] != value:
                raise ValueError(
                    f"{key!r} sets {target} to {shown(value)}, but it is already {shown(result[target])}"
                )
            result[target] = value
    return result


def nearest(name: str, options: Iterable[str]) -> str:
    """`; did you mean ...?` with the nearest option and the setting it is an alias of; empty if none is near."""
    matches = difflib.get_close_matches(name, list(options), n=1)
    if not matches:
        return ""
    meaning = next((key for key, aliases in ALIASES.items() if matches[0] in aliases), None)
    return f"; did you mean {matches[0]!r}" + (f" ({meaning})" if meaning else "") + "?"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(config: object, name: str) -> float:
    """The setting's value; no number where it has another type."""
    value = getattr(config, name)
    return value if isinstance(value, float) or _is_int(value) else math.nan


def _require_whole(config: object, name: str, low: int) -> None:
    value, high = getattr(config, name), LARGEST.get(name, LARGEST_COUNT)
    _require(_is_int(value) and low <= value <= high, config, name, f"a whole number from {low} to {high}")


def _require(condition: bool, config: object, name: str, takes: str) -> None:
    if not condition:
        raise SettingError(name, f"{name} = {shown(getattr(config, name))} is not allowed; it takes {takes}")


class SettingError(ValueError):
    """The setting `name` cannot have its value."""

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(message)


def shown(value: object) -> str:
    """A value of a setting in a message."""
    try:
        return printable(repr(value), 50)
    except ValueError:  # Python converts no whole number of more than 4,300 digits
        return "a whole number of more than 4,300 digits"
