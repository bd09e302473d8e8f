"""`gpt inspect`: it shows what is there, notices every damage, and ends with exit code 1 for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusedgpt.data.tokenizers import CharTokenizer
from fusedgpt.gpt.checkpoint import CheckpointWriter, State, checkpoints, versions
from fusedgpt.gpt.cli import main
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.run import create_run

TEXT = "the quick brown fox jumps over the lazy dog. " * 3
SHAPE = ModelConfig(29, context_length=16, n_layer=1, n_head=2, n_embd=16)
LOG = [
    {"step": 10, "loss": 3.5, "lr": 0.1},
    {"step": 10, "val_loss": 3.25},
    {"step": 20, "loss": 3.0, "lr": 0.1},
    {"step": 20, "val_loss": 3.75},
    {"step": 30, "loss": 2.5, "lr": 0.1},
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with checkpoints of steps 10, 20 and 30, in the working folder."""
    monkeypatch.chdir(tmp_path)
    run, config = Path("run"), RunConfig(SHAPE, TrainConfig(steps=30, tokenizer="char"))
    tokenizer = CharTokenizer.train([TEXT])
    create_run(run, config, tokenizer, {})
    log = (run / "metrics.jsonl").open("wb")
    model = GPT(SHAPE)
    optimizers, writer = build_optimizers(model, config.train), CheckpointWriter(run, 3, 0, False)
    for step in (10, 20, 30):
        log.writelines(json.dumps(line).encode() + b"\n" for line in LOG if line["step"] == step)
        log.flush()
        loader, files = {"position": 4 * step, "data": "ab12"}, {"metrics.jsonl": log.tell()}
        print_of = tokenizer.fingerprint()
        writer.save(
            model,
            optimizers,
            State(step, loader, None, [], 0, 0, files, config.flat(), versions(), print_of),
            LOG,
        )
    writer.close()
    log.close()
    return run


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = main(["inspect", *words])
    return code, capsys.readouterr().out.splitlines()


def test_a_whole_run_is_a_table_with_the_losses_and_the_best(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = shown(capsys, "run")
    assert code == 0
    assert lines[1].split(maxsplit=1) == ["model", "1 layers of width 16, 2 heads, context 16, vocabulary 29"]
    assert lines[4].split(maxsplit=1) == ["log", "5 records, the last of step 30"]
    rows = [line.split() for line in lines[-3:]]
    sizes = [f"{sum(file.stat().st_size for file in path.iterdir()):,}" for path in checkpoints(run)]
    assert rows == [
        ["step-000010", sizes[0], "3.5000", "3.2500", "best,", "ok"],
        ["step-000020", sizes[1], "3.0000", "3.7500", "ok"],
        ["step-000030", sizes[2], "2.5000", "ok"],
    ]


def test_a_checkpoint_shows_its_files_and_its_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = shown(capsys, str(checkpoints(run)[1]))
    assert code == 0
    found = dict(line.split(maxsplit=1) for line in lines)
    count = GPT(SHAPE).num_params()
    assert f"16 tensors of {count:,} parameters" in found["model.safetensors"]
    assert f"48 tensors of {2 * (count + 99 * 16) + 16:,} numbers" in found["optimizer.safetensors"], (
        "and padding"
    )
    assert "position in the data  80 windows" in lines
    assert any(line.startswith("written by") and "fusedgpt" in line and "torch" in line for line in lines)


def change(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (lambda run: flip(run / "checkpoints/step-000020/model.safetensors"), "model.safetensors: its content"),
    "no optimizer": (lambda run: (run / "checkpoints/step-000020/optimizer.safetensors").unlink(), "there is no such file"),
    "no manifest": (lambda run: (run / "checkpoints/step-000020/manifest.json").unlink(), "manifest.json: there is no"),
    "an empty state": (lambda run: (run / "checkpoints/step-000020/state.json").write_bytes(b""), "state.json: it has 0"),
    "a lost log": (lambda run: (run / "metrics.jsonl").write_bytes(b""), "metrics.jsonl: it has 0 bytes of the"),
    "other heads": (lambda run: change(run / "config.toml", b"n_head = 2", b"n_head = 4"), "n_head = 4 instead of 2"),
    "another tokenizer": (lambda run: CharTokenizer.train(["0" + TEXT[1:]]).save(run / "tokenizer.json"), "tokenizer"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer"),
    "no TOML": (lambda run: (run / "config.toml").write_bytes(b"\x1b[2J"), "config.toml"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_shown_and_the_exit_code_is_1(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], named: str
) -> None:
    damage(run)
    for path in (run, checkpoints(run)[1]):
        code, lines = shown(capsys, str(path))
        assert code == 1
        assert any(named in line.partition("DAMAGED: ")[2] for line in lines), lines
        assert all(line.isprintable() for line in lines)


def test_what_is_no_run_is_a_mistake_and_an_empty_one_is_not(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys, "elsewhere") == (2, [])
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints" / ".step-000040.7.tmp").mkdir(parents=True)
    code, lines = shown(capsys, "run")
    assert code == 0
    assert lines[-1].startswith("none;")
    assert any(line.startswith("leftovers") and "1 of killed processes" in line for line in lines)
