"""The notebook, and the page of the Python API, run from first to last, and their tasks are answered."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from neurosurgeon.cli.process import ROOT

TIMEOUT_S = 300
QUEUED, FAILED = 12, 4  # tasks of its queue, and those of an image that does not exist


@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
def test_the_notebook_runs() -> None:
    path = ROOT / "docs" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    lines = text.splitlines()
    assert "answered by split (1, 1000)" in lines
    assert sum(line.startswith("task ") for line in lines) == QUEUED
    assert sum("missing.jpg does not exist" in line for line in lines) == FAILED
    assert any(line.startswith("split after 2 (avgpool)") for line in lines)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_the_blocks_of_the_python_page_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "guides" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)  # noqa: S102  # our own page
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("split (1, 1000) ") for line in printed)
    assert "4 input image missing.jpg does not exist" in printed
    assert names["outcome"].where == "split"
    assert names["outcome"].output.shape == (1, 10)
