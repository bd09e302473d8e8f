"""The commands of `gpt`: dataclasses whose fields are the flags and whose `__call__` calls what does the work.

tyro makes flags and help from types and docstrings (`cli.py`). Nothing heavy (torch, numpy, matplotlib) is imported
before a command runs: commands import what they call.
"""

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from tyro.conf import Fixed, OmitArgPrefixes, Positional, Suppress, UseAppendAction, arg

from ..data.untrusted import TEXT, printable
from .config import ALIASES, PRESETS, ModelConfig, RunConfig, TrainConfig
from .settings import DEFAULT_PRESET, below_flags, in_use, merge, require_unused, resolve

# ---- gpt train: its flags are the fields of ModelConfig and TrainConfig


def _flags(config: type, **more: tuple[Any, Any]) -> Any:
    """A subclass of `config` for tyro: with the aliases of its flags, and validated only once all sources are merged.

    Args:
        config: a dataclass; its fields' docstrings are the help.
        more: fields to add or to replace, as (type, default).
    """
    kinds = get_type_hints(config)
    for name, others in ALIASES.items():
        if name in kinds:
            named = arg(aliases=[f"--{other.replace('_', '-')}" for other in others])
            more[name] = (Annotated[kinds[name], named], getattr(config, name))
    own = [(name, kind, field(default=default)) for name, (kind, default) in more.items()]
    return make_dataclass(
        config.__name__, own, bases=(config,), frozen=True, namespace={"__post_init__": lambda _: None}
    )


ONE_RATE = arg(aliases=["--drop-rate"], help="All three dropout rates at once.", help_behavior_hint="")
# the vocabulary's size is the tokenizer's
ModelFlags = _flags(
    ModelConfig, vocab_size=(Suppress[Fixed[int]], 1), dropout=(Annotated[float, ONE_RATE], 0.0)
)
TrainFlags = _flags(TrainConfig)


@dataclass
class Sources:
    """The sources of a run's settings that flags override."""

    preset: Annotated[
        str | None,
        arg(
            metavar="NAME",
            help=f"Where to start from: {', '.join(PRESETS)}.",
            help_behavior_hint=f"(default: {DEFAULT_PRESET})",
        ),
    ] = None
    config: Annotated[Path | None, arg(metavar="FILE.toml", help_behavior_hint="")] = None
    """Settings in TOML, in sections [model] and [train] or without sections."""
    resume: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")] = None
    """Continue this run in its folder, with its settings."""

    def train(self) -> "Train":
        """The command with the settings of these sources: the defaults of the flags, which `--help` shows."""
        values, _ = merge(*below_flags(self.preset, self.config, self.resume))
        shape = {one.name: values.pop(one.name) for one in fields(ModelConfig)}
        return Train(
            self.preset, self.config, self.resume, model=ModelFlags(**shape), training=TrainFlags(**values)
        )


@dataclass
class Train(Sources):
    """Train a model from text to a run folder.

        gpt train --preset tales
        gpt train --preset gpt2 --data novel.txt --out runs/novel --batch-size 64
        gpt train --config runs/novel/config.toml --lr 1e-3 --out runs/novel-2
        gpt train --resume runs/novel --steps 4000

    Defaults < preset < resumed run < TOML file < flags. With --preset, --config or --resume, --help shows their values.
    """

    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/PRESET, numbered)")] = (
        None
    )
    """The run folder to create."""
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)  # type: ignore[valid-type]
    """The shape of the model."""
    training: OmitArgPrefixes[TrainFlags] = field(default_factory=TrainFlags)  # type: ignore[valid-type]
    """How it is trained, and on what."""

    def __call__(self, given: set[str]) -> None:
        """Train. `given` are the fields whose flags were written, whatever their values."""
        values = vars(self.model) | vars(self.training)
        flags = {name: value for name, value in values.items() if name in given}
        settings = resolve(flags, self.preset, self.config, self.resume, self.out)
        usual = Path("runs", self.preset or DEFAULT_PRESET)
        if not self.resume and not self.out and settings.out != usual:
            print(printable(f"{usual} is in use: this run goes to {settings.out}"))
        from .train.loop import train

        train(settings.config, settings.out, settings.resume, settings.origins)


# ---- the other commands


@dataclass
class Generate:
    """Write text with a trained model.

        gpt generate runs/tales
        gpt generate runs/novel --prompt "It was" --prompt "She said" --max-tokens 100
        gpt generate runs/novel --prompt "It was" --num-samples 5 --temperature 0.7 --top-k 50 --seed 1

    A single sample is printed as it is generated.
    """

    run: Positional[Path]
    """The folder of a run, or that of one of its checkpoints."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; repeat for several. By default the model begins a document."""
    max_tokens: Annotated[int, arg(aliases=["--max-new-tokens"])] = 200
    """Maximum number of new tokens."""
    temperature: float = 0.8
    """Above 1: more varied text, below 1: more likely text; 0: always the most likely token (greedy)."""
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that have already occurred become less likely."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(aliases=["--stop-strings"])] = ()
    """Stop before this string; repeat for several."""
    seed: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: another text each time)")
    ] = None
    """The same seed gives the same text."""
    num_samples: Annotated[int, arg(aliases=["--num-return-sequences"])] = 1
    """Samples per prompt."""
    device: str = "auto"
    """auto (a GPU if one works), cpu, cuda, cuda:1, ..."""

    def __call__(self) -> None:
        from .device import pick_device, pick_dtype
        from .generate import MAX_SAMPLES, generate_text
        from .run import load_run

        if not 1 <= self.num_samples <= MAX_SAMPLES:
            takes = f"a whole number from 1 to {MAX_SAMPLES}"
            raise ValueError(f"num_samples = {self.num_samples} is not allowed; it takes {takes}")
        device = pick_device(self.device)
        run = load_run(self.run, device)
        prompts = [prompt for prompt in self.prompt or ("",) for _ in range(self.num_samples)]
        opening = iter(prompts)

        def show(row: int, piece: str) -> None:
            text = next(opening, "") + piece  # the prompt comes first, once
            print(printable(text, keep=TEXT), end="", flush=True)

        texts = generate_text(
            run.model,
            run.tokenizer,
            prompts,
            self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            seed=self.seed,
            on_text=show if len(prompts) == 1 else None,
            dtype=pick_dtype("auto", device),
        )
        if len(prompts) == 1:
            print(printable(next(opening, ""), keep=TEXT))
            return
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            print(f"--- {number}\n{printable(prompt + text, keep=TEXT)}\n")


@dataclass
class Evaluate:
    """Measure a trained model: loss, perplexity and bits per byte; on tales also the best possible loss.

        gpt evaluate runs/tales
        gpt evaluate runs/novel --data another.txt

    Bits per byte compare models with different tokenizers; perplexity does not.
    """

    run: Positional[Path]
    """The folder of a run, or that of one of its checkpoints."""
    data: Annotated[
        str | None, arg(metavar="SOURCE", help_behavior_hint="(default: the run's validation part)")
    ] = None
    """Data to score, all of it: anything that `gpt train --data` takes."""
    device: str = "auto"
    """auto (a GPU if one works), cpu, cuda, cuda:1, ..."""

    def __call__(self) -> None:
        from .evaluate import evaluate_run

        evaluate_run(self.run, self.data, self.device)


@dataclass
class Tokenize:
    """Turn text into token shards, which `gpt train --data` reads without tokenising again.

        gpt tokenize texts/ --tokenizer gpt2 --out shards/
        gpt tokenize novel.txt --tokenizer bpe --vocab-size 2048 --out shards/

    The folder keeps the tokenizer too: `gpt train --data shards/` needs nothing else.
    """

    source: Positional[str]
    """A .txt, .jsonl or .parquet file, a folder of them, or one of the names that `gpt train --data` takes."""
    out: Path
    """The folder to create."""
    tokenizer: str = "gpt2"
    """gpt2, bpe, word, char (the last three are made from the text), or the path of a saved tokenizer."""
    val_fraction: float = 0.1
    """Share of the text that is held out for validation."""
    vocab_size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 4096 for bpe)")] = None
    """Size of a bpe vocabulary, the most words of a word vocabulary."""

    def __call__(self) -> None:
        require_unused(self.out)
        from ..data.corpus import open_corpus
        from ..data.shards import open_shards, tokenize
        from ..data.tokenizers import make_tokenizer

        corpus = open_corpus(self.source, self.val_fraction)
        # otherwise characters that occur only in the held-out part could not be encoded
        held_out = corpus.val_texts() if self.tokenizer == "char" else ()
        tokenizer = make_tokenizer(self.tokenizer, chain(corpus.train_texts(), held_out), self.vocab_size)
        tokenize(corpus, tokenizer, self.out, progress=True)
        shards = open_shards(self.out, tokenizer)
        out = printable(self.out)
        print(
            f"{out}: {shards.train_tokens:,} training and {shards.val_tokens:,} validation tokens, "
            f"vocabulary {tokenizer.vocab_size:,}\ntrain on them with: gpt train --data {out}"
        )


@dataclass
class Tokenizer:
    """Train a tokenizer on a text.

        gpt tokenizer train novel.txt --vocab-size 4096 --out tok.json
        gpt train --data novel.txt --tokenizer tok.json --out runs/novel

    A text with fewer merges to learn gives a smaller vocabulary.
    """

    action: Annotated[Positional[Literal["train"]], arg(metavar="train", help_behavior_hint="")]
    """The action; train is the only one."""
    file: Positional[str]
    """A .txt, .jsonl or .parquet file, a folder of them, or a named text; all of it is used."""
    out: Path
    """The file to write."""
    vocab_size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 4096 for bpe)")] = None
    """Size of a bpe vocabulary, the most words of a word vocabulary."""
    kind: Literal["bpe", "word", "char"] = "bpe"
    """Byte-level BPE, words and punctuation, or characters."""

    def __call__(self) -> None:
        if in_use(self.out) or self.out.exists():
            raise FileExistsError(f"{self.out} exists already and is left alone; choose another --out")
        from ..data.corpus import open_corpus
        from ..data.tokenizers import make_tokenizer

        corpus = open_corpus(self.file)
        texts = chain(corpus.train_texts(), corpus.val_texts())
        tokenizer = make_tokenizer(self.kind, texts, self.vocab_size)
        tokenizer.save(self.out)
        print(f"{printable(self.out)}: {self.kind} tokenizer with {tokenizer.vocab_size:,} tokens")


@dataclass
class Plot:
    """Draw the loss curves of runs, training and validation.

        gpt plot runs/tales
        gpt plot runs/novel runs/novel-2 --out both.png

    Several runs are drawn into one picture.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Folders of runs."""
    out: Annotated[Path | None, arg(metavar="PNG", help_behavior_hint="(default: RUN/loss_curve.png)")] = None
    """The picture to write, a PNG."""

    def __call__(self) -> None:
        if not self.runs:
            raise ValueError("gpt plot takes the folder of a run, or several")
        from .pictures import plot_runs

        print(printable(plot_runs(list(self.runs), self.out)))


@dataclass
class Inspect:
    """Show what a run or a checkpoint holds, and verify every file of it.

        gpt inspect runs/novel
        gpt inspect runs/novel/checkpoints/step-000500

    The exit code is 1 if a part is damaged.
    """

    path: Positional[Path]
    """The folder of a run, or that of one of its checkpoints."""

    def __call__(self) -> int:
        from .inspect import inspect

        return 0 if inspect(self.path) else 1


@dataclass
class Import:
    """Import a GPT-2 in the format of Hugging Face's transformers as a run.

        gpt import gpt2-folder/ runs/gpt2
        gpt generate runs/gpt2 --prompt "It was"
        gpt train --resume runs/gpt2 --data novel.txt --lr 5e-5 --steps 200

    Weights are read from safetensors only; no file is unpickled.
    """

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """A folder with config.json, model.safetensors and a tokenizer."""
    run: Positional[Path]
    """The run folder to create."""

    def __call__(self) -> None:
        require_unused(self.run)
        from .huggingface import import_model, import_tokenizer
        from .run import create_run

        model, tokenizer = import_model(self.folder), import_tokenizer(self.folder)
        config = RunConfig(model.config, TrainConfig(tokenizer=tokenizer.kind))
        imported = dict.fromkeys((*asdict(model.config), "tokenizer"), f"import {self.folder}")
        create_run(self.run, config, tokenizer, imported, model)
        print(f"{printable(self.run)}: {model.num_params():,} parameters")


@dataclass
class Export:
    """Write a trained model as a folder that Hugging Face's transformers loads.

        gpt export runs/novel novel-hf/ --format hf

    A model with an untied head or post-norm has no GPT-2 form and is refused.
    """

    run: Positional[Path]
    """The folder of a run, or that of one of its checkpoints."""
    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """The folder to create."""
    format: Literal["hf"] = "hf"
    """hf: config.json, model.safetensors and the tokenizer, for `from_pretrained`."""

    def __call__(self) -> None:
        require_unused(self.folder)
        from .huggingface import export_model
        from .run import load_run

        run = load_run(self.run)
        export_model(run.model, run.tokenizer, self.folder)
        print(printable(f"{self.folder}: step {run.step:,} of {self.run}"))


@dataclass
class Doctor:
    """Show which implementation runs on this machine, and check every operator against float64.

        gpt doctor

    The exit code is 1 if an operator is wrong.
    """

    device: str = "auto"
    """auto (a GPU if one works), cpu, cuda, cuda:1, ..."""

    def __call__(self) -> int:
        from .doctor import examine

        return 0 if examine(self.device) else 1


COMMANDS: dict[str, type] = {
    "train": Train,
    "generate": Generate,
    "evaluate": Evaluate,
    "tokenize": Tokenize,
    "tokenizer": Tokenizer,
    "plot": Plot,
    "inspect": Inspect,
    "import": Import,
    "export": Export,
    "doctor": Doctor,
}
