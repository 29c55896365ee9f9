"""Import torchvision, also with a CPU build of torch.

torchvision's package is built for a CUDA build of torch. With a CPU build its compiled operators do not load, and the
import fails at the registration of two of them (``operator torchvision::nms does not exist``). Classification
networks use none of these operators. So the missing schemas are declared, and only if the import has failed.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

MISSING_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[Any] = []  # a schema is removed with its library object


def import_torchvision(module: str = "torchvision.models") -> ModuleType:
    """Return a module of torchvision.

    Raises: ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError as exc:
        if "torchvision::" not in str(exc):
            raise
    _declare_missing_schemas()
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module(module)


def _declare_missing_schemas() -> None:
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in MISSING_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + schema)
    _declared.append(library)


def imagenet_labels() -> list[str]:
    """Return the names of ImageNet's 1000 classes, in torchvision's order."""
    import_torchvision()
    labels: list[str] = import_torchvision("torchvision.models._meta")._IMAGENET_CATEGORIES
    return labels
