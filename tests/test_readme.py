"""What the README tells to type works as typed: the files that its commands name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = re.compile(r"[A-Z_.]+")  # as in --input IMAGE


@pytest.mark.parametrize(
    "name", ["README.md", "README.zh-CN.md", "neurosurgeon/cli/edge.py", "neurosurgeon/cli/tasks_edge.py"]
)
def test_the_inputs_that_a_command_names_are_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"python \S+\.py .*?--input(?:-dir)? ([\w./-]+)", text))
    files = {path for path in named if not PLACEHOLDER.fullmatch(path)}
    assert files
    assert all((ROOT / path).exists() for path in files)
