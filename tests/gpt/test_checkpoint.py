"""Checkpoints: damage of every kind is noticed and skipped, what does not fit is refused."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusedgpt.data.tokenizers import CharTokenizer
from fusedgpt.data.untrusted import InputError
from fusedgpt.gpt.checkpoint import (
    CheckpointWriter,
    NotFinite,
    State,
    checkpoints,
    load_model,
    load_optimizers,
    model_tensors,
    optimizer_tensors,
    valid_checkpoint,
    verify,
)
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.lock import lock_run
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import Optimizers, build_optimizers
from fusedgpt.gpt.run import load_run
from fusedgpt.gpt.train.loop import train

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SHAPE = ModelConfig(29, context_length=16, n_layer=1, n_head=2, n_embd=16)
NAMES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a cache, and a run of 6 steps with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDGPT_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text(TEXT)
        train(configuration(folder), folder / "run")
    return folder


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run; its data are beside the original."""
    monkeypatch.setenv("FUSEDGPT_CACHE", str(original / "cache"))
    return Path(shutil.copytree(original / "run", tmp_path / "run"))


def configuration(folder: Path, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"steps": 6, "save_interval": 2, "keep_checkpoints": 3, "eval_interval": 6}
    settings |= {
        "data": str(folder / "text.txt"),
        "tokenizer": "char",
        "batch_size": 4,
        "sample_tokens": 0,
        "device": "cpu",
        "optimizer": "muon",
    }
    return RunConfig(SHAPE, TrainConfig(**(settings | changes)))


def newest(run: Path) -> Path:
    return checkpoints(run)[-1]


def fresh(optimizer: str = "muon", **changes: Any) -> tuple[GPT, Optimizers]:
    model = GPT(replace(SHAPE, **changes))
    return model, build_optimizers(model, TrainConfig(optimizer=optimizer))  # type: ignore[arg-type]


def rewrite_manifest(checkpoint: Path, **changes: Any) -> None:
    """A manifest that fits the files as they are, as somebody would write who means harm."""
    files = {name: entry(checkpoint / name) for name in NAMES[:3] if (checkpoint / name).exists()}
    manifest = {"format": 1, "step": int(checkpoint.name[5:]), "files": files} | changes
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def entry(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# ---- what is written


def test_the_manifest_has_the_size_and_sha256_of_every_file(run: Path) -> None:
    for checkpoint in checkpoints(run):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["step"] == int(checkpoint.name[5:])
        assert manifest["files"] == {name: entry(checkpoint / name) for name in NAMES[:3]}
        assert {file.name for file in checkpoint.iterdir()} == set(NAMES)


def test_the_tensors_are_the_parameters_and_the_state_of_their_optimizers(run: Path) -> None:
    model, optimizers = fresh()
    with safe_open(newest(run) / "model.safetensors", "pt") as file:
        assert set(file.keys()) == dict(model.named_parameters()).keys()
        assert file.get_slice("wte.weight").get_shape() == [29, 16], "without the padding's rows"
    load_model(model, newest(run))
    load_optimizers(model, optimizers, newest(run))
    saved = load_file(newest(run) / "optimizer.safetensors")
    ours = optimizer_tensors(model, optimizers)
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in saved.items())
    assert saved["wte.weight|step"].item() == 6.0
    assert "h.0.attn.c_attn.weight|momentum_buffer" in saved


# ---- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def swap(file: Path) -> None:
    shutil.copy(checkpoints(file.parents[2])[0] / file.name, file)


def swap_and_rewrite(file: Path) -> None:
    swap(file)
    if file.name != "manifest.json":
        rewrite_manifest(file.parent)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def empty(file: Path) -> None:
    file.write_bytes(b"")


KINDS: list[Callable[[Path], None]] = [flip, cut, empty, swap, folder, Path.unlink]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(
    run: Path, name: str, damage: Callable[[Path], None]
) -> None:
    before = checkpoints(run)
    assert valid_checkpoint(run) == (before[-1], [])
    damage(newest(run) / name)
    found, ((skipped, reason),) = valid_checkpoint(run)
    assert (found, skipped) == (before[-2], before[-1])
    assert reason.startswith(f"{name}: ") or name == "manifest.json", "whose own damage another file may show"


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_link_out_of_the_checkpoint_is_not_followed(run: Path, name: str) -> None:
    file = newest(run) / name
    file.rename(run / "elsewhere")
    file.symlink_to(run / "elsewhere")
    with pytest.raises(InputError, match=r"it names .*, which is not in its folder"):
        verify(newest(run))


def test_a_state_of_another_step_is_noticed_even_where_the_manifest_fits_it(run: Path) -> None:
    swap_and_rewrite(newest(run) / "state.json")
    with pytest.raises(InputError, match=r"state\.json: it is of step 2"):
        verify(newest(run))


def test_a_renamed_checkpoint_is_noticed(run: Path) -> None:
    newest(run).rename(run / "checkpoints" / "step-000008")
    found, ((skipped, reason),) = valid_checkpoint(run)
    assert (found, skipped.name) == (checkpoints(run)[-2], "step-000008")
    assert reason == "manifest.json: it is of step 6"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "it has format 2 instead of 1; use the version of fusedgpt that wrote it"),
        ({"format": "1"}, "it has format '1' instead of 1"),
        ({"files": {}}, "it lacks model.safetensors"),
        ({"files": {"model.safetensors": {}}}, "missing required field"),
        ({"files": 3}, "Expected `object`, got `int`"),
    ],
)
def test_a_manifest_of_another_form_is_refused(run: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_manifest(newest(run), **changes)
    with pytest.raises(InputError, match=message):
        verify(newest(run))


@pytest.mark.parametrize("name", ["../../config.toml", "/etc/passwd", "x.py"])
def test_a_manifest_names_only_the_files_of_a_checkpoint(run: Path, name: str) -> None:
    files = {one: entry(newest(run) / one) for one in NAMES[:3]}
    rewrite_manifest(newest(run), files=files | {name: {"size": 1, "sha256": "0"}})
    with pytest.raises(InputError, match="it names"):
        verify(newest(run))


def test_a_trained_checkpoint_without_its_optimizer_is_refused(run: Path) -> None:
    (newest(run) / "optimizer.safetensors").unlink()
    rewrite_manifest(newest(run))
    with pytest.raises(InputError, match=r"manifest\.json: it lacks optimizer\.safetensors"):
        verify(newest(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loader": {}}, "it lacks the position in the data"),
        ({"loader": None}, "Expected `object`, got `null` - at `\\$.loader`"),
        ({"step": "6"}, "Expected `int`, got `str`"),
        ({"step": 2**70}, "state.json: "),
        ({"skipped": -1}, "Expected `int` >= 0 - at `\\$.skipped`"),
        ({"files": {"metrics.jsonl": -5}}, "Expected `int` >= 0"),
        ({"scaler": {"scale": 1.0}}, "its loss scale is incomplete"),
    ],
)
def test_a_state_that_lacks_something_is_refused(run: Path, changes: dict[str, Any], message: str) -> None:
    file = newest(run) / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    rewrite_manifest(newest(run))
    with pytest.raises(InputError, match=message):
        verify(newest(run))


def test_a_run_without_a_good_checkpoint_is_refused_rather_than_begun_again(run: Path) -> None:
    for checkpoint in checkpoints(run):
        flip(checkpoint / "model.safetensors")
    with pytest.raises(
        InputError, match=r"all of its 3 checkpoints are damaged \(step-000006, model.safetens"
    ):
        valid_checkpoint(run)
    shutil.rmtree(run / "checkpoints")
    assert valid_checkpoint(run) == (None, [])


def test_resuming_takes_the_checkpoint_before_a_damaged_one_and_ends_as_if_nothing_had_been(
    run: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(newest(run) / "optimizer.safetensors")
    train(configuration(original), run, resume=True)
    assert (
        "warning: step-000006 is skipped: optimizer.safetensors: its content is not"
        in capsys.readouterr().err
    )
    for ours, theirs in zip(checkpoints(run), checkpoints(original / "run"), strict=True):
        for name in NAMES[:2]:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (ours.name, name)
    assert valid_checkpoint(run) == (newest(run), [])


def test_using_a_model_takes_model_and_state_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(newest(run) / "optimizer.safetensors")
    assert load_run(run).step == 6
    flip(newest(run) / "model.safetensors")
    assert load_run(run).step == 4
    assert "step-000006 is skipped: model.safetensors" in capsys.readouterr().err


def test_a_checkpoint_is_loaded_by_its_own_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint in checkpoints(run):
        loaded = load_run(checkpoint)
        assert loaded.step == int(checkpoint.name[5:])
        theirs = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in model_tensors(loaded.model).items())
    assert GPT.from_pretrained(newest(run)).tokenizer is not None
    monkeypatch.chdir(newest(run))
    assert load_run(Path()).step == 6
    flip(newest(run) / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: its content"):
        load_run(newest(run))


# ---- what does not fit


def reshaped(key: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(key, tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            reshaped("wpe.weight|exp_avg", torch.zeros(1)),
            r"wpe.weight\|exp_avg has shape \(1,\) instead of \(16, 16\)",
        ),
        (reshaped("wpe.weight|exp_avg_sq", torch.zeros(0, 16)), r"has shape \(0, 16\) instead"),
        (reshaped("wpe.weight|step", torch.zeros(1)), r"wpe.weight\|step has shape \(1,\) instead of \(\)"),
        (reshaped("wpe.weight|exp_avg", torch.zeros(16, 16).half()), r"is float16 instead of float32"),
        (reshaped("wpe.weight|max_exp_avg_sq", torch.zeros(16, 16)), "does not belong there"),
        (reshaped("ghost|step", torch.zeros(())), "ghost.step does not belong there"),
        (lambda tensors: tensors.pop("wpe.weight|step"), r"wpe.weight\|step is missing"),
        (
            reshaped("h.0.mlp.c_fc.weight|momentum_buffer", torch.zeros(1, 16)),
            r"\(1, 16\) instead of \(64, 16\)",
        ),
    ],
)
def test_every_tensor_of_the_optimizers_is_checked_before_torch_sees_it(
    run: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = load_file(newest(run) / "optimizer.safetensors")
    change(tensors)
    save_file(tensors, newest(run) / "optimizer.safetensors")
    rewrite_manifest(newest(run))
    verify(newest(run))
    model, optimizers = fresh()
    with pytest.raises(InputError, match=message):
        load_optimizers(model, optimizers, newest(run))
    assert not any(optimizer.state for optimizer in optimizers.all)


def test_a_model_of_another_shape_is_refused_and_left_as_it_is(run: Path) -> None:
    model, _ = fresh(n_layer=2)
    before = model.wte.weight.detach().clone()
    with pytest.raises(InputError, match=r"12 tensors do not fit: h\.1\.ln_1\.weight is missing"):
        load_model(model, newest(run))
    assert torch.equal(model.wte.weight, before)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, ["seed 0, now 1"]),
        ({"align_documents": True, "seed": 3}, ["document_start -1, now 28", "seed 0, now 3"]),
        ({"val_fraction": 0.4}, ["number of windows 151, now", "training tokens", "validation tokens"]),
        ({"data": "other.txt"}, ["cannot continue in these data: training tokens"]),
        ({"optimizer": "adamw"}, ["does not fit step-000006: optimizer = 'adamw' instead of 'muon'"]),
    ],
)
def test_a_resume_that_does_not_fit_lists_the_differences(
    run: Path, original: Path, changes: dict[str, Any], named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    Path("other.txt").write_text(TEXT.replace("fox", "ofx"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(InputError) as caught:
        train(configuration(original, **({"steps": 8} | changes)), run, resume=True)
    assert all(name in str(caught.value) for name in named), caught.value
    assert all(file.read_bytes() == data for file, data in before.items())


def test_another_model_or_tokenizer_is_refused_before_the_text_is_read(
    run: Path, original: Path, tmp_path: Path
) -> None:
    config = configuration(original, steps=8, data=str(tmp_path / "absent"))
    with pytest.raises(
        InputError, match=r"does not fit step-000006: n_head = 4 instead of 2, n_embd = 32 instea"
    ):
        train(replace(config, model=replace(SHAPE, n_embd=32, n_head=4)), run, resume=True)
    CharTokenizer.train([TEXT.replace("q", "Q")]).save(run / "tokenizer.json")
    for use in (lambda: train(config, run, resume=True), lambda: load_run(run)):
        with pytest.raises(
            InputError, match=r"does not fit step-000006: another tokenizer\.json; put back its"
        ):
            use()


def test_a_run_that_another_process_trains_is_refused_and_left_as_it_is(run: Path, original: Path) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with lock_run(run), pytest.raises(InputError, match="is training in it"):
        train(configuration(original, steps=8), run, resume=True)
    assert all(file.read_bytes() == data for file, data in before.items() if file.name != ".lock")
    train(configuration(original, steps=8), run, resume=True)
    assert load_run(run).step == 8


def test_settings_that_no_tensor_shows_are_compared_too(run: Path) -> None:
    file = run / "config.toml"
    file.write_text(
        file.read_text().replace("n_head = 2", "n_head = 4").replace('gelu = "tanh"', 'gelu = "exact"')
    )
    with pytest.raises(InputError, match="n_head = 4 instead of 2, gelu = 'exact' instead of 'tanh'"):
        load_run(run)


# ---- weights that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(run: Path, value: float) -> None:
    model, optimizers = fresh()
    with torch.no_grad():
        model.wpe.weight[3, 2] = value
    before = checkpoints(run)
    with pytest.raises(NotFinite, match=r"wpe\.weight is no longer finite after step 8"):
        CheckpointWriter(run, 1, 0, False).save(
            model, optimizers, State(8, {}, None, [], 0, 0, {}, {}, {}, ""), []
        )
    assert checkpoints(run) == before
    save_file(model_tensors(model), newest(run) / "model.safetensors")
    rewrite_manifest(newest(run))
    with pytest.raises(InputError, match=r"model\.safetensors: wpe\.weight is not finite"):
        load_model(model, newest(run))
