"""A directory of data sets changes as a whole: rows are measured aside, and take effect when all of them are there.

    DIR/.partial     being measured; no reader looks there; the next run goes on with it
    DIR/.complete    complete, and being copied into DIR; readers read it in place of DIR
    DIR/.unused      being made, or being removed: of no use to anybody

A rename takes the files from one state to the next, so a process that is killed at any moment leaves a whole profile
in effect, the old one or the new one. Other files of DIR, and its subdirectories, stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from neurosurgeon.utils.files import replace_file

PARTIAL, COMPLETE, UNUSED = ".partial", ".complete", ".unused"


def in_effect(directory: Path) -> Path:
    """Return where the files of a directory are to be read."""
    complete = directory / COMPLETE
    return complete if complete.is_dir() else directory


def home_of(directory: Path) -> Path:
    """Return the directory in which files are to take effect that are measured here."""
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


def put_into_effect(directory: Path, names: Iterable[str]) -> None:
    """Let what was measured aside take the place of the files of these names, whether or not it has all of them.

    Raises: OSError.
    """
    (directory / PARTIAL).rename(directory / COMPLETE)
    finish(directory, names)


def finish(directory: Path, names: Iterable[str]) -> None:
    """Copy complete files into place, where there are any; after a power cut, go on with that.

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
    """Remove a directory, where there is one; what a power cut leaves of it has a name of its own.

    Raises: OSError.
    """
    unused = directory.with_name(UNUSED)
    if unused.exists():
        shutil.rmtree(unused)
    if directory.exists():
        directory.rename(unused)
        shutil.rmtree(unused)
