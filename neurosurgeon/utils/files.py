"""Write files that are complete at any moment, and find the directories of cached and collected data."""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

# The exceptions that may be raised when a damaged document, or one of another program, is read.
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def replace_file(path: Path, content: str | bytes) -> None:
    """Replace a file, and make its directory; a reader sees the old or the new one, also after a power cut.

    The temporary file has a random name, and is not opened if it exists: it may be a link of another user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def append_durably(path: Path, text: str) -> None:
    """Append lines to a file with one write. Blocks until they are on disk; a new file is never empty."""
    if not path.exists():
        replace_file(path, text)
        return
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
        os.fsync(file.fileno())


def file_name(name: str) -> str:
    """Return a name as part of a file name: its letters and digits in lower case, with hyphens between words."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_directory() -> Path:
    """Return the directory of files that can be made again: ``$XDG_CACHE_HOME/neurosurgeon``.

    Raises: OSError: this user has no home.
    """
    return _user_directory("XDG_CACHE_HOME", ".cache")


def _user_directory(variable: str, default: str) -> Path:
    """Return our directory below that of an XDG variable, or below a default in the user's home.

    Raises: OSError: this user has no home.
    """
    base = os.environ.get(variable)
    try:
        return (Path(base) if base else Path.home() / default) / "neurosurgeon"
    except RuntimeError as exc:
        raise OSError(f"no directory for {variable}: {exc}") from exc


def data_directory() -> Path:
    """Return the directory of the shipped data: `predictor/` of a checkout, `data/` in the installed package."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "data"
    return installed if installed.is_dir() else package.parent / "predictor"


def data_directories() -> list[Path]:
    """Return the directories of shipped and collected data; new collections are written to the first.

    A writable checkout holds its collections beside the shipped data. Those of an installed package, which an upgrade
    replaces with all its files, lie in ``$XDG_DATA_HOME/neurosurgeon``.
    """
    shipped = data_directory()
    try:
        own = _user_directory("XDG_DATA_HOME", ".local/share")
    except OSError:
        return [shipped]
    is_checkout = shipped.name == "predictor"
    return [shipped, own] if is_checkout and os.access(shipped, os.W_OK) else [own, shipped]


def warn_if_others_can_read(file: BinaryIO, path: Path) -> None:
    """Warn if a file with a secret is readable by others than its owner."""
    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("%s holds a secret and is readable by others (mode %o): chmod 600 %s", path, mode, path)
