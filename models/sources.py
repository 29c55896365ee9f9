"""Where the weights of every model come from, as a command line says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from models.zoo import ZOO, WeightsSource, canonical_name, check_weights_file, model_of_weights
from utils.errors import UsageError, WeightsError


def parse_weights(texts: Sequence[str], pretrained: bool) -> dict[str, WeightsSource]:
    """Return the source of every model's weights; a bare file goes to the model that it fits.

    Raises: UsageError: a file is missing, does not fit, or two are given for one model.
    """
    sources = {
        name: WeightsSource(pretrained=pretrained and entry.torchvision_weights is not None)
        for name, entry in ZOO.items()
    }
    for text in texts:
        named = re.fullmatch(r"(\w+)=(.+)", text)
        path = Path(named[2] if named else text)
        if not path.is_file():
            raise WeightsError(f"weights file {path} does not exist")
        if named:
            model = canonical_name(named[1])
            check_weights_file(model, path)
        else:
            model = model_of_weights(path)
        if sources[model].file:
            raise UsageError(f"two weights files for {model}: {sources[model].file} and {path}")
        sources[model] = WeightsSource(path)
    return sources
