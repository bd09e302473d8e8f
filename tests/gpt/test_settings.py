"""Settings: which source wins, what is remembered of it, and what a TOML file may and may not say."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusedgpt.data.untrusted import InputError
from fusedgpt.gpt.config import ALIASES, KEYS, PRESETS, ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.settings import (
    END,
    FIXED,
    SECTIONS,
    Settings,
    read_config,
    read_run,
    resolve,
    run_config,
    write_config,
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    """Writes run.toml in the working folder."""

    def write(text: str) -> Path:
        Path("run.toml").write_text(text)
        return Path("run.toml")

    return write


def make_run(path: str = "runs/old", **values: Any) -> Path:
    """A run folder with this configuration, as far as settings go."""
    run = Path(path)
    run.mkdir(parents=True)
    write_config(run / "config.toml", RunConfig.from_flat(values), {})
    return run


def value_and_origin(settings: Settings, key: str) -> tuple[Any, str]:
    return settings.config.flat()[key], settings.origins[key]


# ---- who wins, and who is said to have won


def test_each_source_stands_over_the_one_before(toml: Callable[[str], Path]) -> None:
    """Six settings, each given by one source more than the one before: every source wins exactly once."""
    run = make_run(weight_decay=0.21, beta1=0.31, beta2=0.41, grad_clip=0.51)
    # the run's config.toml holds every key: cut it to what the resumed run shall decide
    (run / "config.toml").write_text(f"beta1 = 0.31\nbeta2 = 0.41\ngrad_clip = 0.51\n{END}\n")
    file = toml("beta2 = 0.42\ngrad_clip = 0.52\n")
    settings = resolve({"grad_clip": 0.53}, preset_name="verdict", file=file, resume=run)
    assert value_and_origin(settings, "min_lr_ratio") == (TrainConfig().min_lr_ratio, "default")
    assert value_and_origin(settings, "lr") == (PRESETS["verdict"]["lr"], "preset verdict")
    assert value_and_origin(settings, "beta1") == (0.31, "run runs/old")
    assert value_and_origin(settings, "beta2") == (0.42, "file run.toml")
    assert value_and_origin(settings, "grad_clip") == (0.53, "flag")


def test_a_flag_is_the_origin_even_where_it_repeats_the_value_below() -> None:
    settings = resolve({"n_layer": 4}, preset_name="small")
    assert value_and_origin(settings, "n_layer") == (4, "flag")
    assert value_and_origin(settings, "n_head") == (4, "preset small")


def test_the_default_preset_is_small_and_every_key_has_an_origin() -> None:
    settings = resolve({})
    assert settings.config == RunConfig.from_flat(PRESETS["small"])
    assert settings.out == Path("runs/small")
    assert not settings.resume
    assert settings.origins.keys() == set(KEYS)
    assert settings.origins["lr"] == "preset small"
    assert settings.origins["beta1"] == "default"


def test_the_default_folder_is_named_after_the_preset() -> None:
    assert resolve({}, preset_name="tales").out == Path("runs/tales")
    assert resolve({}, preset_name="tales", out=Path("elsewhere")).out == Path("elsewhere")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves(name: str) -> None:
    assert resolve({}, preset_name=name).config == RunConfig.from_flat(PRESETS[name])


def test_values_that_only_fit_together_are_judged_together(toml: Callable[[str], Path]) -> None:
    """5 heads do not divide the preset's 192 channels; with the flag's 160 they do."""
    file = toml("n_head = 5")
    with pytest.raises(ValueError, match="n_head = 5 does not divide n_embd = 192"):
        resolve({}, file=file)
    assert resolve({"n_embd": 160}, file=file).config.model.head_dim == 32


def test_steps_replace_the_epochs_of_a_source_below() -> None:
    assert resolve({}, preset_name="verdict").config.train.epochs == 10.0
    settings = resolve({"steps": 7}, preset_name="verdict")
    assert (settings.config.train.steps, settings.config.train.epochs) == (7, 0.0)
    assert settings.origins["epochs"] == "flag"
    assert resolve({"steps": 7, "epochs": 2.0}).config.train.epochs == 2.0


@pytest.mark.parametrize(("alias", "name"), [(a, name) for name, aliases in ALIASES.items() for a in aliases])
def test_every_alias_sets_its_setting(alias: str, name: str, toml: Callable[[str], Path]) -> None:
    value = {"tie_weights": False, "lr": 0.5, "grad_clip": 0.5, "gelu": "exact"}.get(name, 8)
    value = 0.5 if name.endswith("dropout") else value
    text = json.dumps(value)
    assert resolve({}, file=toml(f"{alias} = {text}\n")).config.flat()[name] == value
    assert resolve({alias: value}).config.flat()[name] == value


@pytest.mark.parametrize(
    ("theirs", "ours"), [("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("gelu", "exact")]
)
def test_transformers_names_of_gelu_are_taken(theirs: str, ours: str, toml: Callable[[str], Path]) -> None:
    file = toml(f'activation_function = "{theirs}"\n')
    assert resolve({}, file=file).config.model.gelu == ours
    assert ModelConfig.from_dict({"activation_function": theirs}).gelu == ours
    with pytest.raises(ValueError, match="gelu = 'relu' is not allowed; it takes 'tanh' or 'exact'"):
        ModelConfig.from_dict({"activation_function": "relu"})


def test_one_dropout_rate_sets_all_three(toml: Callable[[str], Path]) -> None:
    settings = resolve({}, file=toml("[model]\ndrop_rate = 0.3\n"))
    for key in ("embd_dropout", "attn_dropout", "resid_dropout"):
        assert value_and_origin(settings, key) == (0.3, "file run.toml")


# ---- resuming


def test_a_resumed_run_keeps_its_settings_and_its_folder() -> None:
    run = make_run(n_layer=3, n_embd=96, n_head=3, steps=50)
    settings = resolve({"steps": 80}, resume=run)
    assert settings.resume
    assert settings.out == run
    assert value_and_origin(settings, "n_layer") == (3, "run runs/old")
    assert value_and_origin(settings, "steps") == (80, "flag")
    assert "preset small" not in settings.origins.values()


@pytest.mark.parametrize("key", FIXED)
def test_what_defines_the_model_stays_when_a_run_is_resumed(key: str) -> None:
    run = make_run(n_embd=96, n_head=3)
    old = read_run(run)[key]
    names = {"norm": "post", "gelu": "exact"}
    other = {bool: lambda: not old, int: lambda: old * 2, str: lambda: names.get(key, "char")}
    changed = other[type(old)]()
    assert resolve({key: old}, resume=run).config.flat()[key] == old
    with pytest.raises(
        ValueError, match=rf"runs/old was .* {key} = {changed!r} \(flag\) instead of {old!r};.*--out"
    ):
        resolve({key: changed}, resume=run)


def test_all_that_a_resumed_run_cannot_change_is_listed() -> None:
    listed = r"3 other settings: n_layer = 9 \(flag\) instead of 4, .*n_head = 3 .*gelu = 'exact'"
    with pytest.raises(ValueError, match=listed):
        resolve({"n_layer": 9, "n_head": 3, "gelu": "exact", "lr": 0.5}, resume=make_run(n_layer=4))


def test_dropout_may_change_when_a_run_is_resumed() -> None:
    assert resolve({"attn_dropout": 0.5}, resume=make_run()).config.model.attn_dropout == 0.5


def test_a_run_that_is_not_there_names_one_that_is() -> None:
    make_run("runs/novel")
    Path("runs/empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"runs/nvel is not a run: .*did you mean 'runs/novel'"):
        resolve({}, resume=Path("runs/nvel"))
    with pytest.raises(FileNotFoundError, match=r"runs/empty is not a run: it has no config\.toml"):
        resolve({}, resume=Path("runs/empty"))


def test_a_run_continues_in_its_own_folder_only() -> None:
    run = make_run()
    assert resolve({}, resume=run, out=run.absolute()).out == run
    with pytest.raises(ValueError, match="--out elsewhere does not go with --resume"):
        resolve({}, resume=run, out=Path("elsewhere"))


def test_a_folder_in_use_is_refused_and_the_remedy_named() -> None:
    run = make_run()
    with pytest.raises(FileExistsError, match=r"runs/old: output folder in use.*--resume runs/old"):
        resolve({}, out=run)
    Path("mine").mkdir()
    assert resolve({}, out=Path("mine")).out == Path("mine")
    Path("mine/thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="mine: output folder in use"):
        resolve({}, out=Path("mine"))
    with pytest.raises(FileExistsError, match=r"mine/thesis\.tex: output folder in use"):
        resolve({}, out=Path("mine/thesis.tex"))


# ---- TOML


def test_sections_and_flat_keys_say_the_same(toml: Callable[[str], Path]) -> None:
    flat = read_config(toml("n_layer = 3\nlr = 0.5\n"))
    assert flat == read_config(toml("[model]\nn_layer = 3\n[train]\nlr = 0.5\n")) == {"n_layer": 3, "lr": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer = 3\nlr 0.5\n", r"run\.toml: .*line 2"),
        ("n_layer = 3\nn_layer = 4\n", r"run\.toml: .*line 2"),
        ("n_layr = 3", r"run\.toml: unknown key 'n_layr'; did you mean 'n_layer'\?"),
        ("emb_dm = 3", r"run\.toml: unknown key 'emb_dm'; did you mean 'emb_dim' \(n_embd\)\?"),
        ("[modle]\nn_layer = 3", r"run\.toml: unknown section \[modle\]; did you mean 'model'\?"),
        ("[optimizer]\nlr = 3", r"run\.toml: unknown section \[optimizer\].*\[model\] and \[train\]"),
        ("n_layer = 3\n[model]\nn_layer = 4", r"run\.toml: 'n_layer' is given twice"),
        ("n_layer = 3\nn_layers = 4", r"run\.toml: 'n_layers' sets n_layer to 4, but it is already 3"),
        ("steps = '100'", r"run\.toml: steps = '100' is not allowed; it takes a whole number"),
        ("steps = 100.0", r"run\.toml: steps = 100\.0 .* a whole number"),
        ("steps = true", r"run\.toml: steps = True .* a whole number"),
        ("lr = true", r"run\.toml: lr = True .* a number"),
        ("lr = '1e-3'", r"run\.toml: lr = '1e-3' .* a number"),
        ("bias = 1", r"run\.toml: bias = 1 .* true or false"),
        ("data = 3", r"run\.toml: data = 3 .* a string"),
        ("data = ['a.txt']", r"run\.toml: data = \['a\.txt'\] .* a string"),
        ("norm = 'mid'", r"run\.toml: norm = 'mid' .* 'pre' or 'post'"),
        ("norm = true", r"run\.toml: norm = True .* 'pre' or 'post'"),
        ("seed = 2020-01-01", r"run\.toml: seed = .* a whole number"),
        ("model = 3", r"run\.toml: unknown key 'model'"),
    ],
)
def test_a_mistake_in_a_file_is_named(text: str, message: str, toml: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(toml(text))


def test_a_setting_that_a_runs_file_leaves_out_is_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"[model]\nn_embd = 8\n{END}\n")  # the default of n_head is 12
    with pytest.raises(InputError, match=r"config\.toml: n_head = 12 does not divide n_embd = 8"):
        run_config(tmp_path)


def test_a_whole_number_does_for_a_float(toml: Callable[[str], Path]) -> None:
    value = read_config(toml("lr = 1"))["lr"]
    assert value == 1.0
    assert isinstance(value, float)


def test_a_file_that_is_no_utf8_names_the_position() -> None:
    Path("run.toml").write_bytes(b"data = 'caf\xe9'\n")
    with pytest.raises(ValueError, match=r"run\.toml: .*position 11"):
        read_config(Path("run.toml"))


def test_an_editors_byte_order_mark_is_no_mistake() -> None:
    Path("run.toml").write_bytes("steps = 3\n".encode("utf-8-sig"))
    assert read_config(Path("run.toml")) == {"steps": 3}


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_reads_back(name: str) -> None:
    config = RunConfig.from_flat(PRESETS[name])
    write_config(Path("config.toml"), config, {})
    assert RunConfig.from_flat(read_config(Path("config.toml"))) == config


def test_a_runs_settings_that_were_cut_short_are_refused(tmp_path: Path) -> None:
    """At any line's end they are TOML; what is missing would take its default."""
    file = tmp_path / "config.toml"
    write_config(file, RunConfig.from_flat(PRESETS["tales"]), {})
    assert read_run(tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    for kept in range(0, len(lines), 7):
        file.write_text("".join(lines[:kept]))
        with pytest.raises(InputError, match=r"config\.toml: it is cut short"):
            read_run(tmp_path)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    lr=st.floats(0, 1e30),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_value_reads_back_exactly(
    text: str, lr: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = RunConfig(ModelConfig(), TrainConfig(prompt=text, data=text, lr=lr, seed=seed))
    path = tmp_path_factory.getbasetemp() / "any.toml"
    write_config(path, config, {"prompt": f"file {text}", "lr": "run a\nlr = 3"})
    assert RunConfig.from_flat(read_config(path)) == config


def test_the_saved_file_says_of_each_key_where_it_came_from() -> None:
    settings = resolve({"n_layer": 6}, preset_name="tales", file=None)
    write_config(Path("config.toml"), settings.config, settings.origins)
    text = Path("config.toml").read_text()
    assert tuple(tomllib.loads(text)) == SECTIONS
    lines = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    assert lines.keys() == set(KEYS)
    assert lines["n_layer"].split() == ["6", "#", "from", "flag"]
    assert lines["optimizer"].split() == ['"muon"', "#", "from", "preset", "tales"]
    assert lines["bias"].split() == ["true", "#", "from", "default"]
    assert resolve({}, file=Path("config.toml")).config == settings.config
