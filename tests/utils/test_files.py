"""Write whole files, and find the directories of the user."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from neurosurgeon.utils import files
from neurosurgeon.utils.files import append_durably, cache_directory, data_directories, data_directory, replace_file


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    replace_file(path, "old")
    replace_file(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.json"]


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own" / "file.json"
    replace_file(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.json"]


def test_a_planted_link_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("old")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".file.json.guessed").symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "file.json", "new")
    assert victim.read_text() == "old"


def test_lines_are_appended(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        append_durably(tmp_path / "rows.csv", line)
    assert (tmp_path / "rows.csv").read_text() == "a\nb\n"


def test_the_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "neurosurgeon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "neurosurgeon"


@pytest.mark.parametrize(
    ("shipped", "is_writable", "expected"),
    [
        ("checkout/predictor", True, ["checkout/predictor", "user/neurosurgeon"]),
        ("checkout/predictor", False, ["user/neurosurgeon", "checkout/predictor"]),
        ("site-packages/neurosurgeon/data", True, ["user/neurosurgeon", "site-packages/neurosurgeon/data"]),
    ],
)
def test_new_data_goes_to_a_writable_checkout_or_the_user(
    shipped: str, is_writable: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(files, "data_directory", lambda: tmp_path / shipped)
    monkeypatch.setattr(os, "access", lambda path, mode: is_writable)
    assert data_directories() == [tmp_path / directory for directory in expected]


def test_a_user_without_home_has_the_shipped_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(Path, "home", fail)
    assert data_directories() == [data_directory()]
