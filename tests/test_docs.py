"""README.md and docs/ against the sources: commands, links, settings and error messages cannot go stale."""

import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import fusedgpt
from fusedgpt.bench.__main__ import main as bench
from fusedgpt.data.corpus import NAMES
from fusedgpt.data.tokenizers import KINDS
from fusedgpt.gpt.cli import main as gpt
from fusedgpt.gpt.config import ALIASES, PRESETS, ModelConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
}
each_page = pytest.mark.parametrize("page", PAGES)
SOURCES = [
    path for folder in ("kernels", "data", "gpt", "bench", "tools") for path in (ROOT / folder).rglob("*.py")
]


# ---- commands


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of this project: whole lines of shell blocks, and what stands in backticks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))]:
        if re.match(r"(gpt [a-z]|make [a-zA-Z]|python -m fusedgpt\S* ?)", line):
            yield shlex.split(line, comments=True)


@functools.cache
def flags(command: str, name: str) -> set[str]:
    """The flags that the help of a command lists; a command that does not exist fails."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as stop:
        {"gpt": gpt, "bench": bench}[command]([name, "--help"])
    assert not stop.value.code, f"{command} {name} --help"
    assert "type: ignore" not in shown.getvalue(), (
        "tyro takes a comment for help where a docstring is missing"
    )
    return {"--debug", *re.findall(r"--[a-z0-9][a-z0-9-]*", shown.getvalue())}


def unknown(words: list[str]) -> list[str]:
    """What a command names that does not exist: targets, a module, flags."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [word for word in words[1:] if "=" not in word and word not in targets]
    module, arguments = ("gpt", words[1:]) if words[0] == "gpt" else (words[2], words[3:])
    if module not in ("gpt", "fusedgpt.bench"):
        return [] if importlib.util.find_spec(module) else [module]
    names = arguments[0].split("|") if arguments else []
    known = set.union(set(), *(flags(module.removeprefix("fusedgpt."), name) for name in names))
    return [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known]


@each_page
def test_every_command_exists_with_its_flags(page: str) -> None:
    wrong = {shlex.join(words): unknown(words) for words in commands(PAGES[page])}
    assert not {line: names for line, names in wrong.items() if names}


# ---- links


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as its renderer makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


@each_page
def test_every_file_that_is_named_exists(page: str) -> None:
    """Paths in backticks that begin with one of the project's folders."""
    for name in re.findall(r"`((?:kernels|data|gpt|bench|tests|tools|docs|examples)/[\w./]*)`", PAGES[page]):
        assert (ROOT / name).exists() or "NAME" in name, name


def test_the_design_page_knows_every_file() -> None:
    named = set(re.findall(r"\b[a-z]\w*\.py\b", PAGES["docs/design.md"]))
    folders = ("kernels", "data", "gpt", "gpt/train")
    assert {path.name for folder in folders for path in (ROOT / folder).glob("[a-z]*.py")} <= named
    assert named <= {path.name for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]}


# ---- README


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 160


def test_the_readme_leads_to_every_page() -> None:
    links = set(re.findall(r"\]\(([^)#\s]+)", PAGES["README.md"]))
    assert {page for page in PAGES if page != "README.md"} <= links


# ---- configuration.md


def written(default: object) -> str:
    """A default as the page writes it: like TOML, strings without quotes."""
    if isinstance(default, bool):
        return str(default).lower()
    return default or '""' if isinstance(default, str) else str(default)


def test_the_configuration_page_has_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \| ", PAGES["docs/configuration.md"], re.MULTILINE))
    settings = [*fields(ModelConfig), *fields(TrainConfig)]
    assert rows == {setting.name: written(setting.default) for setting in settings}


def test_the_configuration_page_has_every_name() -> None:
    text = PAGES["docs/configuration.md"]
    names = {*PRESETS, *NAMES, *KINDS, *(alias for aliases in ALIASES.values() for alias in aliases)}
    assert not {name for name in names if f"`{name}`" not in text}


# ---- troubleshooting.md


def messages() -> Iterator[str]:
    """Every string of the sources but docstrings; of an f-string the pieces between its fields."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                yield node.value


def test_the_messages_on_the_troubleshooting_page_are_real() -> None:
    real = "\n".join(messages())
    quoted = re.findall(r"^\| `(.+?)` \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 30
    for message in quoted:
        for part in message.split("..."):
            assert part.strip(" :;,.'") in real, message


# ---- CITATION.cff


def test_the_citation_has_this_version() -> None:
    assert f"\nversion: {fusedgpt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
