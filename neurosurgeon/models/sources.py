"""Which model, and where the weights of every model come from, as a command line says it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.names import canonical_name, torchvision_name
from neurosurgeon.models.own_models import register_files
from neurosurgeon.models.zoo import check_weights_file, model_of_weights
from neurosurgeon.utils.errors import UsageError, WeightsError


def chosen_model(name: str, files: Sequence[Path], input_size: int | None) -> str:
    """Return the one name of the network that a command line chooses: ``-t``, ``--model-file``, ``--input-size``.

    Raises: UsageError: there is no such network, a model file raises, or two sizes are given.
    """
    register_files(files)
    if input_size is None:
        return canonical_name(name)
    if "@" in name:
        raise UsageError(f"{name} names a size already: leave out --input-size")
    return canonical_name(f"{name}@{input_size}")


class WeightsSources(Mapping[str, WeightsSource]):
    """Where the weights of every model come from: files for some, and what there is for any other name."""

    def __init__(self, files: Mapping[str, Path], pretrained: bool) -> None:
        self._files = files
        self._pretrained = pretrained

    def __getitem__(self, name: str) -> WeightsSource:
        """Return the source of a model's weights; those for its usual size serve every other."""
        file = self._files.get(name) or self._files.get(name.partition("@")[0])
        has_trained = self._pretrained and not file and torchvision_name(name) is not None
        return WeightsSource(file, has_trained)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def parse_weights(texts: Sequence[str], pretrained: bool) -> WeightsSources:
    """Return the source of every model's weights; a bare file goes to the model that it fits.

    Raises: UsageError: a file is missing, does not fit, or two are given for one model.
    """
    files: dict[str, Path] = {}
    for text in texts:
        named = re.fullmatch(r"([\w:.@]+)=(.+)", text)
        path = Path(named[2] if named else text)
        if not path.is_file():
            raise WeightsError(f"weights file {path} does not exist")
        if named:
            model = canonical_name(named[1])
            check_weights_file(model, path)
        else:
            model = model_of_weights(path)
        if model in files:
            raise UsageError(f"two weights files for {model}: {files[model]} and {path}")
        files[model] = path
    return WeightsSources(files, pretrained)
