"""The command line: what it parses, what it calls, what its help says, and how it ends."""

import os
import re
import resource
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fusedgpt import __version__
from fusedgpt.data.shards import open_shards
from fusedgpt.data.token_file import open_shard
from fusedgpt.data.tokenizers import CharTokenizer, load_tokenizer
from fusedgpt.gpt.cli import COMMANDS, SPINS, main, parse
from fusedgpt.gpt.config import ALIASES, DROPOUT_ALIASES, KEYS, ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.run import create_run
from fusedgpt.gpt.settings import read_config, write_config

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
FLAGS = {
    "train": {"preset", "config", "resume", "out", "dropout", *KEYS} - {"vocab_size"},
    "generate": {
        "prompt",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "stop",
        "seed",
    }
    | {"num_samples", "device"},
    "evaluate": {"data", "device"},
    "tokenize": {"tokenizer", "out", "val_fraction", "vocab_size"},
    "tokenizer": {"vocab_size", "out", "kind"},
    "plot": {"out"},
    "inspect": set(),
    "import": set(),
    "export": {"format"},
    "doctor": {"device"},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    Path("text.txt").write_text(TEXT)


@pytest.fixture
def run() -> str:
    """A run with an untrained model of the characters of TEXT."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train([TEXT])
    shape = ModelConfig(tokenizer.vocab_size, context_length=16, n_layer=1, n_head=2, n_embd=16)
    config = RunConfig(shape, TrainConfig(data="text.txt", tokenizer="char"))
    create_run(Path("runs/tiny"), config, tokenizer, {}, GPT(shape))
    return "runs/tiny"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `gpt train` calls, with training itself out of the way."""
    calls: list[tuple[Any, ...]] = []
    stand_in = SimpleNamespace(train=lambda *arguments: calls.append(arguments))
    monkeypatch.setitem(sys.modules, "fusedgpt.gpt.train.loop", stand_in)
    return calls


def ended(argv: list[str]) -> int | str | None:
    """The exit code of `gpt argv...`, run in this process."""
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in which `gpt` is this checkout's."""
    gpt = f"{shlex.quote(sys.executable)} -m fusedgpt.gpt"
    line = command.replace("gpt ", f"{gpt} ", 1)
    dropped = (
        "PYTHONUNBUFFERED",
        "GOMP_SPINCOUNT",
        "OMP_WAIT_POLICY",
    )  # main sets the second in this process, too
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, env=environment)


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([command, "--help"]) == 0
    shown = set(re.findall(r"--([a-z0-9-]+)", capsys.readouterr().out))
    assert {name.replace("_", "-") for name in FLAGS[command]} <= shown


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_are_commands_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended([command, "--help"]) == 0
    examples = re.findall(r"^    gpt (.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert examples, "one line each"
    for run in ("novel", "gpt2"):
        Path("runs", run).mkdir(parents=True)
        write_config(Path("runs", run, "config.toml"), RunConfig(ModelConfig(), TrainConfig()), {})
    for example in examples:
        parse(shlex.split(example))


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"{name} +{re.escape((command.__doc__ or '').splitlines()[0])}", listed)
    assert ended([]) == 0
    assert capsys.readouterr().out == listed


def test_the_help_shows_docstrings_and_the_default_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    ended(["train", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--n-embd INT Width of the residual stream. (default: 192)" in text
    assert "--bias, --no-bias Biases in LayerNorms" in text
    assert "folder of token shards, or one of the names" in text, "a docstring of two lines"


def test_the_help_starts_from_preset_run_and_file(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(
        "hidden_size = 60\nn_head = 5\n"
    )  # 4 layers of the preset, whatever fits together later
    for sources, shown in {
        "--preset gpt2": (
            "--n-embd INT Width of the residual stream. (default: 768)",
            "(default: fineweb10B)",
        ),
        "--preset=gpt2-xl": ("(default: 1600)", "(default: 48)"),
        "--config run.toml": ("(default: 60)", "must divide n_embd. (default: 5)", "(default: 256)"),
        f"--resume {run}": ("(default: 16)", "(default: text.txt)"),
        f"--preset gpt2 --config run.toml --resume {run}": ("(default: 60)", "(default: text.txt)"),
    }.items():
        for argv in (f"train {sources} --help", f"train --help {sources}"):
            assert ended(argv.split()) == 0
            text = " ".join(capsys.readouterr().out.replace("│", " ").split())
            assert all(words in text for words in shown), sources


def test_help_names_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    ended(["train", "--help"])
    train = capsys.readouterr().out
    for name in (*DROPOUT_ALIASES, *chain(*ALIASES.values())):
        assert f"--{name.replace('_', '-')} " in train.replace(",", " "), name
    assert "--given" not in train
    ended(["generate", "--help"])
    generate = capsys.readouterr().out
    assert all(f"--{name}" in generate for name in ("max-new-tokens", "num-return-sequences", "stop-strings"))


def test_help_is_fast_and_light() -> None:
    """CPU time, which other work on the machine does not change: 0.5 s is promised, some 0.15 s are needed."""
    for command in ("--help", "train --help", "--version"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = shell(f"gpt {command}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    listed = shell("PYTHONPROFILEIMPORTTIME=1 gpt train --help")
    imported = {line.rpartition("|")[2].strip() for line in listed.stderr.splitlines()}
    assert "tyro" in imported
    assert not {"torch", "triton", "numpy", "matplotlib", "tiktoken"} & imported


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["--version"]) == 0
    assert capsys.readouterr().out == f"fusedgpt {__version__}\n"


# ---- parsing


def test_train_passes_on_what_was_resolved(trained: list[tuple[Any, ...]]) -> None:
    argv = "train --preset tales --n-layer 3 --emb-dim=96 --no-bias --learning_rate 0.5 --data text.txt --out mine"
    assert ended(argv.split()) == 0
    ((config, out, resume, origins),) = trained
    assert (config.model.n_layer, config.model.n_embd, config.model.bias) == (3, 96, False)
    assert (config.train.lr, config.train.data, config.train.optimizer) == (0.5, "text.txt", "muon")
    assert (out, resume) == (Path("mine"), False)
    flags = {key for key, origin in origins.items() if origin == "flag"}
    assert flags == {"n_layer", "n_embd", "bias", "lr", "data"}
    assert origins["optimizer"] == "preset tales"


def test_train_reads_a_file_and_a_run(trained: list[tuple[Any, ...]], run: str) -> None:
    Path("more.toml").write_text("steps = 70\nlr = 0.25\n")
    assert ended(["train", "--resume", run, "--config", "more.toml", "--lr", "0.125"]) == 0
    ((config, out, resume, origins),) = trained
    assert (config.model.n_embd, config.train.steps, config.train.lr) == (16, 70, 0.125)
    assert (out, resume) == (Path(run), True)
    assert (origins["n_embd"], origins["steps"], origins["lr"]) == (f"run {run}", "file more.toml", "flag")


def test_a_flag_that_repeats_the_preset_is_still_a_flag(trained: list[tuple[Any, ...]]) -> None:
    """--steps 1000 is the default, and yet it takes the place of the preset's epochs."""
    assert (
        ended(["train", "--preset", "verdict", "--steps", "1000", "--learning-rate", "6e-3", "--no-qkv-bias"])
        == 0
    )
    ((config, _, _, origins),) = trained
    assert (config.train.steps, config.train.epochs) == (1000, 0.0)
    assert {key for key, origin in origins.items() if origin == "flag"} == {
        "steps",
        "epochs",
        "lr",
        "qkv_bias",
    }


def test_what_only_fits_together_is_judged_together(trained: list[tuple[Any, ...]]) -> None:
    Path("five.toml").write_text("n_head = 5\n")  # of 192
    assert ended(["train", "--config", "five.toml", "--n-embd", "160"]) == 0
    assert trained[0][0].model.head_dim == 32
    assert ended(["train", "--config", "five.toml"]) == 2


def test_the_default_folder_is_numbered(
    trained: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("", "-2", "-3"):
        assert ended(["train", "--preset", "tales"]) == 0
        folder = trained[-1][1]
        assert folder == Path(f"runs/tales{number}")
        told = f"runs/tales is in use: this run goes to {folder}\n" if number else ""
        assert capsys.readouterr().out == told
        folder.mkdir(parents=True)
        (folder / "config.toml").touch()


def test_generate_takes_the_names_of_transformers(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"generate {run} --prompt the --max_new_tokens=5 --num-return-sequences 2 --top_k 3 --top-p 0.9 --seed 1"
    assert ended(argv.split()) == 0
    first = capsys.readouterr().out
    assert first.count("---") == 2
    assert (
        ended(
            f"generate {run} --prompt the --max-tokens 5 --num-samples 2 --top-k 3 --top-p .9 --seed 1".split()
        )
        == 0
    )
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("flag", ["--dropout", "--drop-rate", "--drop_rate"])
def test_one_flag_sets_all_dropout_rates(flag: str, trained: list[tuple[Any, ...]]) -> None:
    assert ended(["train", flag, "0.3"]) == 0
    shape = trained[0][0].model
    assert (shape.embd_dropout, shape.attn_dropout, shape.resid_dropout) == (0.3, 0.3, 0.3)


def test_a_flag_given_twice_means_the_last(trained: list[tuple[Any, ...]]) -> None:
    assert ended(["train", "--n-embd", "64", "--emb-dim", "128"]) == 0
    assert trained[0][0].model.n_embd == 128


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("help", "unknown command 'help'; there are train, generate,"),
        ("train --n-haed 3", "unknown flag --n-haed; did you mean --n-head?"),
        ("train --n_haed=3", "unknown flag --n_haed; did you mean --n-head?"),
        ("train --lerning-rate 3", "unknown flag --lerning-rate; did you mean --learning-rate?"),
        ("train --gradients", "unknown flag --gradients; see gpt train --help"),
        ("train --vocab-size 300", "unknown flag --vocab-size; did you mean --bpe-vocab-size?"),
        ("generate --promt x runs/tiny", "unknown flag --promt; did you mean --prompt?"),
        ("generate --temprature", "unknown flag --temprature; did you mean --temperature?"),
        ("plot --xyzzy", "unknown flag --xyzzy; see gpt plot --help"),
        ("plot --runs runs/tiny", "unknown flag --runs; see gpt plot --help"),
        ("plot", "gpt plot takes the folder of a run"),
        ("train --bias=False", "--bias takes no value: write --bias or --no-bias"),
        ("train --no-bias=1", "--no-bias takes no value: write --bias or --no-bias"),
        ("generate runs/tiny --num-samples 0", "num_samples = 0 is not allowed"),
        (
            "generate runs/tinny",
            "runs/tinny is not a run: there is no such folder; did you mean 'runs/tiny'?",
        ),
        ("generate tiny", "tiny is not a run: there is no such folder; did you mean 'runs/tiny'?"),
        ("generate elsewhere", "elsewhere is not a run: there is no such folder; there are runs/tiny"),
        (
            "train --resume runs/tiny --n-layer 2",
            "runs/tiny was begun with 1 other settings: n_layer = 2 (flag) instead of 1",
        ),
        (
            "train --label-smoothing 1.5",
            "label_smoothing = 1.5 is not allowed; it takes a number from 0 to 1",
        ),
        ("train --z-loss -1", "z_loss = -1.0 is not allowed; it takes a number from 0 up"),
        ("train --config none.toml", "none.toml: there is no such file"),
    ],
)
def test_a_mistake_ends_in_one_line(
    argv: str, message: str, run: str, capsys: pytest.CaptureFixture[str], trained: list[tuple[Any, ...]]
) -> None:
    assert ended(argv.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}")
    assert (out, err.count("\n")) == ("", 1)
    assert not trained


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("train --lr x", ["--lr", "'x'"]),
        ("train --steps 1e3", ["--steps", "'1e3'"]),
        ("train --norm mid", ["--norm", "'mid'", "pre", "post"]),
        ("train --steps", ["--steps"]),
        ("train runs/tiny", ["runs/tiny"]),
        ("train --bias False", ["False"]),
        ("generate", ["RUN"]),
        ("tokenize text.txt", ["--out"]),
        ("tokenizer trian text.txt --out t.json", ["trian", "train"]),
    ],
)
def test_what_tyro_refuses_is_named(
    argv: str, words: list[str], capsys: pytest.CaptureFixture[str], trained: list[tuple[Any, ...]]
) -> None:
    assert ended(argv.split()) == 2
    out, err = capsys.readouterr()
    assert all(word in err for word in [*words, f"gpt {argv.split()[0]} --help"]), err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) <= 400
    assert not trained


# ---- commands, run for real


def test_generate_writes_the_prompt_and_what_follows(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", run, "--prompt", "the quick", "--max-tokens", "30", "--seed", "1"]
    assert ended(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("the quick")
    assert first.endswith("\n")
    assert ended(argv) == 0
    assert capsys.readouterr().out == first
    assert ended([*argv[:-1], "2"]) == 0
    assert capsys.readouterr().out != first


@pytest.mark.parametrize(
    ("given", "spins"), [("", SPINS), ("GOMP_SPINCOUNT=77", "77"), ("OMP_WAIT_POLICY=passive", "0")]
)
def test_the_spin_count_reaches_libgomp_unless_the_user_sets_one(run: str, given: str, spins: str) -> None:
    shown = shell(f"OMP_DISPLAY_ENV=VERBOSE {given} gpt generate {run} --max-tokens 1 --device cpu").stderr
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", shown)
    if found is None:
        pytest.skip("torch's OpenMP is not libgomp here")
    assert found[1] == spins


def test_generate_shows_every_sample_of_every_prompt(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", run, "--prompt", "the", "--prompt", "fox", "--num-samples", "2", "--max-tokens", "5"]
    assert ended(argv) == 0
    heads = re.findall(r"^--- (\d)\n(the|fox)", capsys.readouterr().out, flags=re.MULTILINE)
    assert heads == [("1", "the"), ("2", "the"), ("3", "fox"), ("4", "fox")]


def test_generate_passes_its_settings_on(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def stand_in(
        model: GPT, tokenizer: Any, prompts: list[str], max_tokens: int, **settings: Any
    ) -> list[str]:
        given.update(settings, prompts=prompts, max_tokens=max_tokens)
        return [""] * len(prompts)

    monkeypatch.setattr("fusedgpt.gpt.generate.generate_text", stand_in)
    argv = "--max-tokens 7 --temperature 0.5 --top-k 3 --top-p 0.9 --repetition-penalty 1.5 --stop a --stop b"
    assert (
        ended(["generate", run, *argv.split(), "--seed", "4", "--num-samples", "2", "--device", "cpu"]) == 0
    )
    assert given == {
        "prompts": ["", ""],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "repetition_penalty": 1.5,
        "stop": ("a", "b"),
        "seed": 4,
        "on_text": None,
        "dtype": torch.float32,
    }


@pytest.mark.parametrize("more", [[], ["--num-samples", "2"]])
def test_what_a_model_writes_cannot_steer_the_terminal(
    more: list[str], run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = ["\x1b", "[2J\x9b", "\u202e\r\x07\u2028", "\n\té🙂\u3000"]

    def stand_in(*arguments: Any, on_text: Any, **settings: Any) -> list[str]:
        for piece in pieces if on_text else ():
            on_text(0, piece)
        return ["".join(pieces)] * len(arguments[2])

    monkeypatch.setattr("fusedgpt.gpt.generate.generate_text", stand_in)
    assert ended(["generate", run, "--prompt", "[\x1b[31m", *more]) == 0
    shown = "[\\x1b[31m\\x1b[2J\\x9b\\u202e\\r\\x07\\u2028\n\té🙂\u3000\n"
    assert capsys.readouterr().out == (f"--- 1\n{shown}\n--- 2\n{shown}\n" if more else shown)


def test_generate_ends_before_a_stop_string(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", run, "--prompt", "the", "--temperature", "0", "--max-tokens", "40"]
    assert ended(argv) == 0
    greedy = capsys.readouterr().out
    stop = greedy[10]
    assert ended([*argv, "--stop", stop]) == 0
    assert capsys.readouterr().out == greedy[: greedy.index(stop, 3)] + "\n"


def test_tokenize_makes_shards_that_decode_to_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT + "fé!"  # two characters that only the held-out part has
    Path("text.txt").write_text(text)
    assert (
        ended(["tokenize", "text.txt", "--tokenizer", "char", "--out", "shards", "--val-fraction", "0.2"])
        == 0
    )
    shards = open_shards("shards")
    parts = [np.concatenate([open_shard(path)[:] for path in part]) for part in (shards.train, shards.val)]
    assert "".join(shards.tokenizer.decode(part.tolist()) for part in parts) == text
    assert len(parts[1]) == pytest.approx(0.2 * len(text), abs=1)
    assert f"{len(parts[0]):,} training and {len(parts[1]):,} validation" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bpe", "word", "char"])
def test_tokenizer_train_writes_a_tokenizer(kind: str) -> None:
    size = [] if kind == "char" else ["--vocab-size", "270"]
    assert ended(["tokenizer", "train", "text.txt", "--kind", kind, *size, "--out", "made/tok.json"]) == 0
    tokenizer = load_tokenizer("made/tok.json")
    assert tokenizer.kind == kind
    assert tokenizer.decode(tokenizer.encode("the lazy dog.")) == "the lazy dog."


def test_a_run_can_be_trained_evaluated_and_plotted(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "train --data text.txt --tokenizer char --context-length 16 --n-layer 1 --n-embd 16 --n-head 2"
    argv += " --steps 4 --eval-interval 2 --save-interval 2 --log-interval 1 --device cpu --out runs/new"
    assert ended([*argv.split(), "--sample-tokens", "4"]) == 0
    assert "n_layer = 1" in Path("runs/new/config.toml").read_text()
    assert ended(["train", "--resume", "runs/new", "--steps", "6"]) == 0
    assert Path("runs/new/checkpoints/step-000006").is_dir()
    capsys.readouterr()
    assert ended(["evaluate", "runs/new", "--device", "cpu"]) == 0
    assert "loss" in capsys.readouterr().out
    assert ended(["plot", "runs/new", "--out", "curve.png"]) == 0
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_goes_out_to_transformers_format_and_comes_back(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(["export", run, "hf"]) == 0
    assert ended(["import", "hf", "runs/back"]) == 0
    assert read_config(Path("runs/back/config.toml"))["tokenizer"] == "char"
    assert "n_embd = 16" in Path("runs/back/config.toml").read_text()
    capsys.readouterr()
    written = []
    for folder in (run, "runs/back"):
        assert ended(["generate", folder, "--prompt", "the", "--temperature", "0", "--max-tokens", "20"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]
    assert ended(["import", "hf", run]) == 2
    assert "output folder in use" in capsys.readouterr().err
    assert ended(["export", run, "hf"]) == 2
    assert "output folder in use" in capsys.readouterr().err


def test_an_imported_model_needs_its_own_tokenizer(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(["export", run, "hf"]) == 0
    CharTokenizer.train(["another alphabet"]).save("hf/fusedgpt-tokenizer.json")
    capsys.readouterr()
    assert ended(["import", "hf", "runs/back"]) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not Path("runs/back").exists()
