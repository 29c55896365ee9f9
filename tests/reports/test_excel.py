"""Excel tables: written tables are read back, and an unwritable path is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from openpyxl import load_workbook

from neurosurgeon.reports.excel import save_tables
from neurosurgeon.utils.errors import UsageError

ROWS = [
    {"index": 1, "name": "features.0", "output_shape": [1, 64, 55, 55], "edge_ms": 1.25},
    {"index": 2, "name": "features.1", "output_shape": [1, 64, 55, 55], "edge_ms": 0.0},
]


def test_tables_are_read_back_sheet_by_sheet(tmp_path: Path) -> None:
    save_tables(tmp_path / "plan.xlsx", {"layers": ROWS, "candidates": [{"point": 0, "layer": "None"}]})
    book = load_workbook(tmp_path / "plan.xlsx")
    assert book.sheetnames == ["layers", "candidates"]
    assert list(book["layers"].iter_rows(values_only=True)) == [
        ("index", "name", "output_shape", "edge_ms"),
        (1, "features.0", "1x64x55x55", 1.25),
        (2, "features.1", "1x64x55x55", 0),
    ]
    assert list(book["candidates"].iter_rows(values_only=True)) == [("point", "layer"), (0, "None")]


def test_the_header_is_bold_and_stays_in_view(tmp_path: Path) -> None:
    save_tables(tmp_path / "plan.xlsx", {"layers": ROWS})
    sheet = load_workbook(tmp_path / "plan.xlsx")["layers"]
    assert all(cell.font.bold for cell in sheet[1])
    assert sheet.freeze_panes == "A2"


def test_a_table_without_rows_is_an_empty_sheet(tmp_path: Path) -> None:
    save_tables(tmp_path / "empty.xlsx", {"none": []})
    assert load_workbook(tmp_path / "empty.xlsx")["none"].max_row <= 1


@pytest.mark.parametrize("name", ["", "missing/plan.xlsx"])
def test_an_unwritable_path_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write {tmp_path / name}: "):
        save_tables(tmp_path / name, {"layers": ROWS})
