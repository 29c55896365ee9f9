"""README and docs work as typed: their commands, flags and files are there, and the flag reference is whole."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import neurosurgeon
from docs.hooks import flag_reference, on_page_markdown
from neurosurgeon.cli.console import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
MAX_README_BYTES = 10_000
PAGES = [*READMES, "SECURITY.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "neurosurgeon" / "cli").glob("*.py"))
TYPED = re.compile(r"\bpython (?:-m (\w[\w.]*\w)(?: ([a-z][\w-]*))?|([\w/]+\.py))([^\n`#]*)")
FLAG = re.compile(r"--[a-z][\w-]*")
FILE = re.compile(r"--(?:input|input-dir|trace) ([\w./-]+)|-m pytest ([\w./-]+)")
PLACEHOLDER = re.compile(r"[A-Z_]+(\.\w+)?|\d+|rtsp")  # as in --input IMAGE; a camera, or a URL


class Typed(NamedTuple):
    """A command that a page names."""

    module: str  # of python -m
    word: str  # after it
    script: str
    rest: str

    @property
    def name(self) -> str:
        """As the reference writes it."""
        if self.script:
            return f"python {self.script}"
        return f"python -m {self.module}{f' {self.word}' if self.module == 'neurosurgeon' else ''}".strip()


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands_of(page: str) -> list[Typed]:
    return [Typed(*groups) for groups in TYPED.findall(read(page))]


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """The text of the flag reference about every command, and about all."""
    return {text.partition("\n")[0]: text for text in f"\n{flag_reference()}".split("\n## ")[1:]}


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_short(page: str) -> None:
    assert len(read(page).encode()) <= MAX_README_BYTES


def test_both_readmes_name_the_same_commands() -> None:
    english, chinese = (re.findall(r"\b(?:python|make) [^`#\n]*[^`#\n ]", read(page)) for page in READMES)
    assert english == chinese
    assert len(english) > 20


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_modules_that_a_page_names_exist(page: str) -> None:
    for typed in commands_of(page):
        exists = (ROOT / typed.script).is_file() if typed.script else importlib.util.find_spec(typed.module)
        assert exists, typed
        assert typed.module != "neurosurgeon" or not typed.word or typed.word in COMMANDS, typed


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_have_their_flags(page: str, reference: dict[str, str]) -> None:
    for typed in commands_of(page):
        text = next((text for text in reference.values() if f"`{typed.name}`" in text), None)
        known = FLAG.findall(f"{text}{reference['Every command']}")
        assert text is None or set(FLAG.findall(typed.rest)) <= set(known), typed


@pytest.mark.parametrize("page", [*PAGES, *SOURCES])
def test_files_that_a_command_names_exist(page: str) -> None:
    named = {file for groups in FILE.findall(read(page)) for file in groups if file}
    assert [file for file in named if not PLACEHOLDER.fullmatch(file) and not (ROOT / file).exists()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_all_flags_of_a_command(
    name: str, reference: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    options = re.findall(r"^  (-.*?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    assert set(FLAG.findall(" ".join(options))) <= set(FLAG.findall(reference[name] + reference["Every command"]))
    assert f"`python -m neurosurgeon {name}`" in reference[name]


def test_the_reference_names_scripts_and_modules(reference: dict[str, str]) -> None:
    assert "`python edge_api.py`" in reference["edge"]
    assert "`python -m predictor.collect`" in reference["collect"]
    assert "`python -m net.monitor_client`" in reference["monitor-client"]


def test_rows_of_the_reference_have_two_cells(reference: dict[str, str]) -> None:
    rows = [line for text in reference.values() for line in text.splitlines() if line.startswith("|")]
    assert [row for row in rows if row.count("|") != 3] == []


def test_a_page_may_show_a_file_of_the_repository() -> None:
    class Page:
        meta = {"file": "CHANGELOG.md"}

    assert on_page_markdown("", Page()) == read("CHANGELOG.md")


def test_the_citation_names_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {neurosurgeon.__version__}\n" in text
