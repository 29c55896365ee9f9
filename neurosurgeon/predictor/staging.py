"""Replace the data sets of a directory as a whole, so that readers see the old ones or the new ones.

    DIR/.partial     being measured; no reader looks there; the next run continues it
    DIR/.complete    complete, and being copied into DIR; readers read it in place of DIR
    DIR/.unused      being made or being removed; never read

A rename moves the files from one state to the next. A process that is killed at any moment therefore leaves a whole
profile, the old one or the new one. Other files of DIR, and its subdirectories, stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from neurosurgeon.utils.files import replace_file

PARTIAL, COMPLETE, UNUSED = ".partial", ".complete", ".unused"


def active_directory(directory: Path) -> Path:
    """Return the directory from which readers read the files of ``directory``."""
    complete = directory / COMPLETE
    return complete if complete.is_dir() else directory


def final_directory(directory: Path) -> Path:
    """Return the directory for which files of ``directory`` are measured."""
    return directory.parent if directory.name in (PARTIAL, COMPLETE) else directory


def start_partial(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Make the directory in which to measure, with some files to begin with.

    Raises: OSError.
    """
    unused = directory / UNUSED
    discard(unused)
    unused.mkdir(parents=True)
    for name, content in contents.items():
        replace_file(unused / name, content)
    unused.rename(directory / PARTIAL)


def activate(directory: Path, names: Iterable[str]) -> None:
    """Replace the files of these names by the measured ones; remove those that were not measured.

    Raises: OSError.
    """
    (directory / PARTIAL).rename(directory / COMPLETE)
    finish_activation(directory, names)


def finish_activation(directory: Path, names: Iterable[str]) -> None:
    """Copy complete files into place, if there are any; this also finishes an activation that was interrupted.

    Raises: OSError.
    """
    complete = directory / COMPLETE
    if not complete.is_dir():
        return
    for name in names:
        if (complete / name).exists():
            replace_file(directory / name, (complete / name).read_bytes())
        else:
            (directory / name).unlink(missing_ok=True)
    discard(complete)


def discard(directory: Path) -> None:
    """Remove a directory, if it exists.

    It is renamed first, so that an interrupted removal leaves no directory that looks whole.

    Raises: OSError.
    """
    unused = directory.with_name(UNUSED)
    if unused.exists():
        shutil.rmtree(unused)
    if directory.exists():
        directory.rename(unused)
        shutil.rmtree(unused)
