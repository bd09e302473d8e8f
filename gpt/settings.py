"""The sources of a run's settings, and the file that stores them.

Five layers, each overriding the one before: defaults, a preset, the resumed run, a TOML file, flags. `config.toml` in a
run's folder holds the result with the origin of every value, and is itself a file that `--config` and `--resume` read.
This file does not import torch, so a mistake in the settings is reported at once.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain, count
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..data.files import write_file
from ..data.untrusted import InputError, printable, read_toml
from .config import (
    DROPOUTS,
    KEYS,
    PRESETS,
    ModelConfig,
    RunConfig,
    SettingError,
    TrainConfig,
    canonical,
    nearest,
    preset,
    shown,
)

DEFAULT_PRESET = "small"
SECTIONS = ("model", "train")
TYPES: dict[str, Any] = get_type_hints(ModelConfig) | get_type_hints(TrainConfig)
# Settings that a resumed run cannot change: its weights or its tokens would no longer fit.
FIXED = (*(f.name for f in fields(ModelConfig) if f.name not in DROPOUTS), "tokenizer", "bpe_vocab_size")
MEND = "mend that file; docs/configuration.md lists the settings"
END = "# end of the settings"
_TAKES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Settings:
    """The settings of a run to start; `origins` has the source of every value: default, preset, run, file or flag."""

    config: RunConfig
    out: Path
    resume: bool
    origins: dict[str, str]


def merge(*layers: tuple[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge layers of (origin, values), each overriding the one before; returns the values and the origin of each.

    A layer that sets `steps` without `epochs` removes the epochs of the layers below.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        if "steps" in layer and "epochs" not in layer:
            layer = {**layer, "epochs": 0.0}
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    return values, origins


def below_flags(
    preset_name: str | None, file: Path | None, resume: Path | None
) -> list[tuple[str, Mapping[str, Any]]]:
    """The layers that flags override. Arguments and errors are those of `resolve`."""
    layers: list[tuple[str, Mapping[str, Any]]] = [
        ("default", RunConfig(ModelConfig(), TrainConfig()).flat())
    ]
    if resume is None and preset_name is None:
        preset_name = DEFAULT_PRESET
    if preset_name is not None:
        preset(preset_name)  # raises for an unknown name
        layers.append((f"preset {preset_name}", PRESETS[preset_name]))
    if resume is not None:
        layers.append((f"run {resume}", read_run(resume)))
    if file is not None:
        layers.append((f"file {file}", read_config(file)))
    return layers


def resolve(
    flags: Mapping[str, Any],
    preset_name: str | None = None,
    file: Path | None = None,
    resume: Path | None = None,
    out: Path | None = None,
) -> Settings:
    """Merge the sources of settings: defaults < preset < resumed run < file < flags.

    Args:
        flags: settings by name or alias (`ALIASES`).
        preset_name: one of `PRESETS`; without it and without `resume`, `DEFAULT_PRESET`.
        file: a TOML file, see `read_config`.
        resume: the folder of a run to continue.
        out: the folder of a new run; by default `runs/<preset>`, numbered if that is in use.

    Raises:
        ValueError: an unknown preset or key (the nearest is named), a wrong type or value, settings that do not fit together
            or that the resumed run cannot change.
        FileNotFoundError: no such file or run.
        FileExistsError: the output folder is in use.
    """
    if resume is not None and out is not None and out.resolve() != resume.resolve():
        raise ValueError(f"--out {out} does not go with --resume {resume}: a run continues in its own folder")
    layers = below_flags(preset_name, file, resume)
    values, origins = merge(*layers, ("flag", _checked(flags)))
    run = dict(layers).get(f"run {resume}", {})
    changed = [
        f"{key} = {shown(values[key])} ({origins[key]}) instead of {shown(run[key])}"
        for key in FIXED
        if key in run and values[key] != run[key]
    ]
    if changed:
        raise ValueError(
            f"{resume} was begun with {len(changed)} other settings: {', '.join(changed[:3])}; leave them out, or start a "
            "new run with another --out"
        )
    files = {f"run {resume}": Path(f"{resume}", "config.toml"), f"file {file}": file}
    if resume is not None:  # its file is where a setting that has its default should stand
        files["default"] = files[f"run {resume}"]
    config = _config(values, {key: files.get(origin) for key, origin in origins.items()})
    if resume is not None:
        return Settings(config, resume, True, origins)
    if out is None:
        first = Path("runs", preset_name or DEFAULT_PRESET)
        numbered = (first.with_name(f"{first.name}-{number}") for number in count(2))
        out = next(folder for folder in chain([first], numbered) if not in_use(folder))
    require_unused(out)
    return Settings(config, out, False, origins)


def in_use(path: Path) -> bool:
    """Whether there is a file or a folder that is not empty.

    Raises:
        InputError: the name is too long, or the folder is another user's.
    """
    try:
        return path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise InputError(path, f"it cannot be used ({error.strerror})", "choose another name") from None


def require_unused(folder: Path) -> None:
    """Raise FileExistsError if `folder` is a file or not empty: nothing is ever overwritten. Nor can the current folder or a
    mount point be created under another name and renamed when it is complete."""
    if not in_use(folder):
        if folder.exists() and (folder.samefile(".") or folder.is_mount()):
            raise FileExistsError(
                f"{folder}: the current folder and mount points cannot be renamed; name a folder in it"
            )
        return
    if (folder / "config.toml").exists():
        raise FileExistsError(
            f"{folder}: output folder in use, it holds a run; continue that with: gpt train --resume {folder}, "
            "or choose another folder"
        )
    raise FileExistsError(f"{folder}: output folder in use, it is not empty; choose another folder")


def read_run(run: Path) -> dict[str, Any]:
    """The settings of the run in the folder `run`, flat.

    Raises:
        FileNotFoundError: the folder holds no run; those beside it or in runs/ are named.
        ValueError: its config.toml is damaged.
    """
    file = run / "config.toml"
    if not os.path.isfile(file):  # False for a name that is too long, too
        what = "it has no config.toml" if os.path.exists(run) else "there is no such folder"
        runs = [
            str(found.parent) for place in (run.parent, Path("runs")) for found in place.glob("*/config.toml")
        ]
        there = f"; there are {', '.join(sorted({*runs})[:5])}" if runs else ""
        raise FileNotFoundError(
            f"{printable(run)[-120:]} is not a run: {what}{nearest(str(run), runs) or there or '; gpt train makes one'}"
        )
    values = read_config(file)
    if (
        not file.read_bytes().rstrip().endswith(END.encode())
    ):  # the settings that are missing would take their defaults
        remedy = f"complete it from the config in a checkpoint's state.json, then end it with: {END}"
        raise InputError(file, "it is cut short: its last line is missing", remedy)
    return values


def run_config(run: Path) -> RunConfig:
    """The configuration of the run in the folder `run`. Errors are those of `read_run`."""
    return _config(read_run(run), dict.fromkeys(KEYS, run / "config.toml"))


def _config(values: Mapping[str, Any], files: Mapping[str, Path | None]) -> RunConfig:
    """The configuration with these values; an error about a setting names the file that it comes from."""
    try:
        return RunConfig.from_flat(values)
    except SettingError as error:
        if (file := files.get(error.name)) is None:
            raise
        raise InputError(file, str(error), MEND) from None


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a TOML file by their own names: in sections [model] and [train], or flat.

    A float may be written as a whole number; every other value must have exactly the type of its setting.

    Raises:
        MissingFile: there is no such file.
        InputError: the file cannot be read, is no TOML (the line is named), or has an unknown section or key (the nearest
            is named) or a wrong type.
    """
    values: dict[str, Any] = {}
    for name, value in read_toml(path, MEND).items():
        if isinstance(value, dict) and name not in SECTIONS:
            what = f"unknown section [{printable(name, 50)}]{nearest(name, SECTIONS)}; there are [model] and [train]"
            raise InputError(path, what, MEND)
        section = value if isinstance(value, dict) else {name: value}
        if twice := sorted(values.keys() & section.keys()):
            raise InputError(path, f"{twice[0]!r} is given twice", MEND)
        values |= section
    try:
        return _checked(values)
    except ValueError as error:
        raise InputError(path, str(error), MEND) from None


def write_config(path: Path, config: RunConfig, origins: Mapping[str, str]) -> None:
    """Write every setting as TOML with its origin in a comment; "default" if `origins` lacks it. The last line is END."""
    lines = ["# The settings of this run. Another one like it: gpt train --config THIS_FILE --out FOLDER"]
    for section, values in asdict(config).items():
        lines += ["", f"[{section}]"]
        for key, value in values.items():
            # JSON's numbers, booleans and strings are valid TOML, except that TOML wants DEL escaped
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            origin = printable(origins.get(key, "default"), 100)  # a long path may fill no file
            lines.append(f"{f'{key} = {text}':<40}  # from {origin}")
    write_file(path, "\n".join([*lines, "", END]) + "\n")


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Translate aliases, check types, and convert whole numbers to float where the setting is one."""
    result = canonical(values, KEYS)
    for key, value in result.items():
        kind = TYPES[key]
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if not any(_is_a(value, one) for one in kinds):
            takes = " or ".join(map(_takes, kinds))
            raise SettingError(key, f"{key} = {shown(value)} is not allowed; it takes {takes}")
        try:
            result[key] = float(value) if kind is float else value
        except OverflowError:
            raise SettingError(key, f"{key} = {shown(value)} is too large") from None
    return result


def _is_a(value: Any, kind: Any) -> bool:
    """Whether value has exactly that type (True is not a whole number) or is one of the literals."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) in ((int, float) if kind is float else (kind,))


def _takes(kind: Any) -> str:
    return " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else _TAKES[kind]
