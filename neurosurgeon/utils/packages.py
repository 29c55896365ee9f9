"""One line and exit code 2 for a package that is not installed, in place of a traceback. Standard library only."""

from __future__ import annotations

import os
import sys
from types import TracebackType

USAGE_CODE = 2  # of `utils.errors.UsageError`
# By the names that they are imported by, those of requirements.txt; any other module that is missing is a defect.
PACKAGES = {
    "PIL": "pillow",
    "apscheduler": "apscheduler",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "openpyxl": "openpyxl",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "torch": "torch",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
}


def missing_package(exc: BaseException) -> str | None:
    """Return which package an import did not find, and what to do; None for any other error."""
    if not isinstance(exc, ModuleNotFoundError) or exc.name not in PACKAGES:
        return None
    return (
        f"the package {PACKAGES[exc.name]} is not installed in this Python ({sys.executable}): "
        "activate the environment (. .venv/bin/activate) or pip install -r requirements.txt"
    )


def name_missing_packages() -> None:
    """Let this process, a script of ours, end with one line where an import finds a package missing."""
    sys.excepthook = _end


def _end(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
    line = missing_package(exc)
    if line is None:
        sys.__excepthook__(kind, exc, trace)
        return
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {line}\n")
    raise SystemExit(USAGE_CODE)
