"""Files that are whole at any moment: written beside and renamed, or appended with one write."""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)


# What reading a document that is damaged, or was written by somebody else, raises.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside ``path``, put it on disk, and rename it: whoever reads sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def append_durably(path: Path, text: str) -> None:
    """Add lines to a file with one write, and put them on disk; a new file appears with its first lines in it."""
    if not path.exists():
        replace_file(path, text)
        return
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
        os.fsync(file.fileno())


def file_name(name: str) -> str:
    """Return what a file for a thing of that name is called: its letters and digits, with hyphens between words."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_directory() -> Path:
    """Return where this project keeps what it can make again: ``$XDG_CACHE_HOME/neurosurgeon``.

    Raises: OSError: this user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "neurosurgeon"
    except RuntimeError as exc:
        raise OSError(f"no cache directory: {exc}") from exc


def data_directory() -> Path:
    """Return where the shipped data lies: `predictor/` of a checkout, `data/` in the installed package."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "data"
    return installed if installed.is_dir() else package.parent / "predictor"


def warn_if_others_can_read(file: BinaryIO, path: Path) -> None:
    """Say so where a file with a secret is readable by more than its owner."""
    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("%s holds a secret and is readable by others (mode %o): chmod 600 %s", path, mode, path)
