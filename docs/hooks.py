"""The generated parts of the site: the flags of all commands, from their own parsers, and files of the repository.

A page whose metadata has ``file: PATH`` shows that file of the repository. `FLAGS_HERE` in a page becomes the flags.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from neurosurgeon.cli.console import COMMANDS
from neurosurgeon.cli.parser import base_parser
from neurosurgeon.cli.process import script

ROOT = Path(__file__).resolve().parent.parent
FLAGS_HERE = "<!-- the flags of all commands -->"
CALLS = re.compile(r'^main = script\("(\w+)", "[^"]+"(?:, "(\w+)")?\)', re.MULTILINE)  # in a script, or a re-export


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the final Markdown of a page. Called by mkdocs for every page."""
    if "file" in page.meta:
        text: str = (ROOT / page.meta["file"]).read_text(encoding="utf-8")
        return text
    return markdown.replace(FLAGS_HERE, flag_reference()) if FLAGS_HERE in markdown else markdown


def flag_reference() -> str:
    """Return all commands with their flags, as Markdown."""
    shared = base_parser("", None)._actions
    hidden = {action.dest for action in shared}
    return "\n\n".join(["## Every command", table(shared), *(section(name, hidden) for name in COMMANDS)])


def section(name: str, hidden: set[str]) -> str:
    """Return one command as Markdown, without the flags that every command has."""
    parser = parser_of(name)
    first, *paragraphs = inspect.cleandoc(parser.description or "").split("\n\n")
    ways = " or ".join(f"`{way}`" for way in (*scripts_of(name), f"python -m neurosurgeon {name}"))
    rest = [fenced(paragraph) for paragraph in paragraphs]
    own = [action for action in parser._actions if action.dest not in hidden and action.help != argparse.SUPPRESS]
    return "\n\n".join(part for part in (f"## {name}", ways, first, *rest, table(own)) if part)


def fenced(paragraph: str) -> str:
    """Return a paragraph of a description as Markdown: commands in a block of their own, text as it is."""
    text = textwrap.dedent(paragraph)
    return f"```\n{text}\n```" if text.startswith(("python ", "make ")) else text


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command. The command's body runs until it parses the command line, where it is stopped."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        found.append(parser)
        raise SystemExit

    command = COMMANDS[name]
    with patch.object(argparse.ArgumentParser, "parse_args", stop), suppress(SystemExit):
        script(command.module, f"neurosurgeon {name}", command.function)([])
    return found[0]


def scripts_of(name: str) -> Iterator[str]:
    """Yield the other ways to type a command: its scripts, and modules of the reference."""
    wanted = (COMMANDS[name].module, COMMANDS[name].function)
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("net/*.py"), *ROOT.glob("predictor/*.py")]):
        calls = CALLS.findall(path.read_text(encoding="utf-8"))
        if wanted in [(module, function or "main") for module, function in calls]:
            yield f"python {path.name}" if path.parent == ROOT else f"python -m {path.parent.name}.{path.stem}"


def table(actions: Iterable[argparse.Action]) -> str:
    """Return a table of flags and their meanings."""
    rows = [f"| {signature(action)} | {' '.join((action.help or '').split())} |" for action in actions]
    return "\n".join(["| flag | meaning |", "|---|---|", *rows])


def signature(action: argparse.Action) -> str:
    """Return the notation of a flag: its names, and the name or the choices of its value."""
    choices = f"{{{','.join(map(str, action.choices or ()))}}}"
    value = str(action.metavar or (choices if action.choices else action.dest.upper()))
    if not action.option_strings:
        return f"`{value}`"
    shown = "" if action.nargs == 0 else f" {value}{' …' if action.nargs == '+' else ''}"
    return f"`{', '.join(action.option_strings)}{shown}`" + (" (required)" if action.required else "")
