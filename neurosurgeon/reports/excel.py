"""Tables as Excel files, with openpyxl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.styles import Font
from openpyxl.utils import get_column_letter

from neurosurgeon.utils.errors import writing

MIN_WIDTH = 9


def save_tables(path: Path, sheets: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write tables to a file, each to a sheet of its own. A mapping is a row; the keys of the first are the header.

    Raises: UsageError: the file cannot be written.
    """
    workbook = Workbook()
    workbook.remove(workbook.active)
    for title, rows in sheets.items():
        sheet = workbook.create_sheet(title)
        header = list(rows[0]) if rows else []
        sheet.append(header)
        for row in rows:
            sheet.append([_cell(value) for value in row.values()])
        for column, name in enumerate(header, start=1):
            sheet.cell(1, column).font = Font(bold=True)
            sheet.column_dimensions[get_column_letter(column)].width = max(MIN_WIDTH, len(name) + 2)
        sheet.freeze_panes = "A2"
    with writing(path):
        workbook.save(path)


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else value
