"""Files that are whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neurosurgeon.utils.files import append_durably, cache_directory, replace_file


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    replace_file(path, "old")
    replace_file(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own" / "file.json"
    replace_file(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.json"]


def test_lines_are_appended(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        append_durably(tmp_path / "rows.csv", line)
    assert (tmp_path / "rows.csv").read_text() == "a\nb\n"


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "neurosurgeon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "neurosurgeon"
