"""Reading files that cannot be trusted: one error in one line, limits, schemas, and no way out of a folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.data.untrusted import InputError, MissingFile, inside, printable, read_json, read_toml


@dataclass
class Thing:
    name: str
    sizes: list[int]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"name": "a"}', "missing required field `sizes`"),
        ('{"name": 3, "sizes": []}', "$.name"),
        ('{"name": "a", "sizes": [1, "b"]}', "$.sizes[1]"),
        ("[]", "Expected `object`"),
        ('{"name": ', "damaged or no JSON"),
        ('{"name": NaN, "sizes": []}', "damaged or no JSON"),
        ("[" * 100_000, "nested too deep"),
        ("", "damaged or no JSON"),
    ],
)
def test_json_of_another_kind_is_refused_in_one_line(tmp_path, text, what):
    file = tmp_path / "thing.json"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_json(file, Thing if "deep" not in what else Any, "make it again")  # type: ignore[arg-type]
    message = str(caught.value)
    assert "thing.json: " in message
    assert what in message
    assert message.endswith("; make it again")
    assert "\n" not in message


def test_json_of_the_right_kind_is_read(tmp_path):
    file = tmp_path / "thing.json"
    file.write_text('{"name": "a", "sizes": [1, 2], "more": null}')
    assert read_json(file, Thing, "") == Thing("a", [1, 2])


def test_size_absence_and_folders_are_named(tmp_path):
    file = tmp_path / "thing.json"
    with pytest.raises(MissingFile, match="no such file; make it"):
        read_json(file, Thing, "make it")
    file.write_text('{"name": "a", "sizes": []}' + " " * 100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        read_json(file, Thing, "make it", limit=100)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="it is no file; make it"):
            read_json(other, Thing, "make it")
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\)"):
        read_json(tmp_path / ("x" * 300), Thing, "make it")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a = 1\nb == 2", "line 2"),
        ("a = " + "[" * 20_000, "too deep"),
        ("a" + ".a" * 30_000 + " = 1", "too deep"),
        ("a = 1\n" * 50_000, "bytes"),
        ("a = '\udcff'", "utf-8"),
    ],
)
def test_toml_has_limits_too(tmp_path, text, what):
    file = tmp_path / "config.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"config\.toml: .*{what}.*; mend it"):
        read_toml(file, "mend it")


def test_a_message_is_one_line_without_escape_sequences_and_not_long():
    error = InputError("a/" * 300 + "\x1b[31mred.json", "bad\nvalue \x1b]0;owned\x07" * 50, "do\rthis" * 50)
    assert str(error).isprintable()
    assert len(str(error)) <= 400
    assert "red.json" in str(error)


def test_printable_keeps_lines_where_it_is_told_to():
    assert printable("a\nb\x1b[2J\u202e", keep="\n") == "a\nb\\x1b[2J\\u202e"
    assert printable("straße 日本 🙂") == "straße 日本 🙂"
    assert printable("x" * 50, 10) == "x" * 9 + "…"


def test_a_name_cannot_leave_its_folder(tmp_path):
    folder, outside = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    outside.write_text("")
    (folder / "link").symlink_to(outside)
    (folder / "own").write_text("")
    (folder / "inner").symlink_to("own")
    for name in ("../secret", str(outside), "a/../../secret", "link", "x\0y", "link/.."):
        with pytest.raises(InputError, match="not in its folder"):
            inside(folder, name, Path("index.json"))
    assert inside(folder, "inner", Path("index.json")) == folder / "inner"
