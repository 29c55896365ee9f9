"""Report a package that is not installed with one line instead of a traceback. Imports the standard library only."""

from __future__ import annotations

import sys

# The packages of requirements.txt, by the name of their import; another missing module is a defect of this program.
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
    """Return the message for an import that did not find a package; None for any other error."""
    if not isinstance(exc, ModuleNotFoundError) or exc.name not in PACKAGES:
        return None
    return (
        f"the package {PACKAGES[exc.name]} is not installed in this Python ({sys.executable}): "
        "activate the environment (. .venv/bin/activate) or pip install -r requirements.txt"
    )
