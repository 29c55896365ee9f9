"""One line and exit code 2 for a package that is not installed, in place of a traceback. Standard library only."""

from __future__ import annotations

import sys

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
