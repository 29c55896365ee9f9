"""The notebook of the documentation runs from its first cell to its last, and splits a network."""

from __future__ import annotations

import nbformat
import pytest
from nbclient import NotebookClient

from neurosurgeon.cli.process import ROOT

TIMEOUT_S = 300


@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
def test_the_notebook_runs() -> None:
    path = ROOT / "docs" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("answered by split" in text for text in printed)
