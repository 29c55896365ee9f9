"""The sources of weights on a command line: files, which may be of other numbers of classes, and torchvision's."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.models.checkpoints import read_checkpoint
from neurosurgeon.models.names import ZOO, Catalogue, name_parts, torchvision_name, usual_classes
from neurosurgeon.models.weights import check_fit, of_other_classes, read_weights_file
from neurosurgeon.utils.errors import UsageError, WeightsError

log = logging.getLogger(__name__)


def fitted_name(catalogue: Catalogue, name: str, path: Path) -> str:
    """Return the name of the network that a weights file fits: this one, or it with the number of classes of the file.

    Raises: WeightsError: the file does not fit, or cannot be read.
    """
    model = catalogue.build_module(name)
    state = read_weights_file(path, model)
    try:
        check_fit(model, state, f"{path} does not fit {name}")
    except WeightsError:
        if (other := of_other_classes(name, model, state)) is None:
            raise
        with contextlib.suppress(WeightsError):
            check_fit(catalogue.build_module(other), state, "")
            log.info("%s: %d classes, in place of %d", path, name_parts(other).classes, usual_classes(name))
            return other
        raise
    return name


def model_of_weights(catalogue: Catalogue, path: Path) -> str:
    """Return the name of the classic network that a weights file fits.

    Raises: WeightsError: it fits none.
    """
    read_checkpoint(path)  # for its own errors
    for name in ZOO:
        with contextlib.suppress(WeightsError):
            return fitted_name(catalogue, name, path)
    raise WeightsError(f"weights file {path} fits none of {', '.join(ZOO)}")


class WeightsSources(Mapping[str, WeightsSource]):
    """The source of every model's weights: files for some; for all others torchvision, or the seed."""

    def __init__(self, files: Mapping[str, Path], pretrained: bool) -> None:
        self._files = files
        self._pretrained = pretrained

    def __getitem__(self, name: str) -> WeightsSource:
        """Return the source of a model's weights; a file for its usual size is used for all sizes."""
        parts = name_parts(name)
        file = self._files.get(name) or self._files.get(str(parts._replace(size=None)))
        has_trained = self._pretrained and not file and parts.classes is None and torchvision_name(name) is not None
        return WeightsSource(file, has_trained)

    def named(self, name: str) -> str:
        """Return the canonical name of a model with the number of classes of its file, if there is one.

        Raises: UsageError: there are files of several numbers of classes.
        """
        parts = name_parts(name)
        if parts.classes is not None or self[name].file:
            return name
        known = {
            str(found._replace(size=parts.size))
            for found in map(name_parts, self._files)
            if parts._replace(size=found.size, classes=found.classes) == found and found.size in (None, parts.size)
        }
        if len(known) > 1:
            raise UsageError(f"there are weights files for {' and '.join(sorted(known))}: name one of them, not {name}")
        return known.pop() if known else name

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def parse_weights(catalogue: Catalogue, texts: Sequence[str], pretrained: bool) -> WeightsSources:
    """Return the source of every model's weights from a command line.

    Args:   texts: ``MODEL=FILE``, or ``FILE`` for the classic network that it fits.
            pretrained: torchvision's weights for all other models that have them.
    Raises: UsageError: a file is missing, does not fit, or two are given for one model.
    """
    files: dict[str, Path] = {}
    for text in texts:
        named = re.fullmatch(r"([\w:.@#]+)=(.+)", text)
        path = Path(named[2] if named else text)
        if not path.is_file():
            raise WeightsError(f"weights file {path} does not exist")
        if named:
            model = fitted_name(catalogue, catalogue.canonical_name(named[1]), path)
        else:
            model = model_of_weights(catalogue, path)
        if model in files:
            raise UsageError(f"two weights files for {model}: {files[model]} and {path}")
        files[model] = path
    return WeightsSources(files, pretrained)
