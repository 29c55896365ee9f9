"""The names of the classes that a network tells apart, from a file of the user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import holds_scores
from neurosurgeon.utils.errors import UsageError


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the names of classes in the order of their indices.

    A file is text with a name in each line; or JSON: a list of names, names by index, or indices by name.

    Raises: UsageError: it cannot be read, or an index is missing.
    """
    try:
        text = path.read_text("utf-8-sig").rstrip()
    except OSError as exc:
        raise UsageError(f"labels file {path} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"labels file {path} cannot be read: it is no UTF-8 text") from exc
    if text[:1] in ("[", "{"):
        return _from_json(path, text)
    labels = tuple(line.strip() for line in text.split("\n"))
    if "" in labels:
        where = f"line {labels.index('') + 1} is empty" if text else "it is empty"
        raise UsageError(f"labels file {path}: {where}, expected the name of a class in each line")
    return labels


def _from_json(path: Path, text: str) -> tuple[str, ...]:
    try:
        given = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"labels file {path} is no JSON: {exc}") from exc
    try:
        by_index = _by_index(given)
    except (ValueError, TypeError, IndexError) as exc:
        raise UsageError(f"labels file {path}: expected a list of names, or names by index, got {text[:40]!r}") from exc
    if not by_index:
        raise UsageError(f"labels file {path}: it is empty, expected the names of the classes")
    missing = next((index for index in range(len(by_index)) if index not in by_index), None)
    if missing is not None:
        raise UsageError(f"labels file {path}: of its {len(by_index)} names none has the index {missing}")
    return tuple(by_index[index] for index in range(len(by_index)))


def _by_index(given: Any) -> dict[int, str]:
    """Return names by index. A name may be the last one of a list, as in {"0": ["n01440764", "tench"]}."""
    if isinstance(given, list):
        given = dict(enumerate(given))
    if given and all(isinstance(value, int) for value in given.values()):
        given = {index: name for name, index in given.items()}
    return {int(index): str(name[-1] if isinstance(name, list) else name) for index, name in given.items()}


def labels_of(given: Path | str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return labels from a file, or from a sequence of names. Raises: UsageError."""
    if given is None or not isinstance(given, str | Path):
        return None if given is None else tuple(map(str, given))
    return read_labels(Path(given))


def check_labels(labels: Sequence[str] | None, graph: LayerGraph) -> None:
    """Check that there is a label for each class of a network. Raises: UsageError: names both numbers."""
    if labels is None:
        return
    specs = (output.spec for output in graph.outputs)
    classes = next((spec.shape[1] for spec in specs if holds_scores(len(spec.shape), spec.dtype)), None)
    if classes is None:
        raise UsageError(f"{graph.model} has no output (1, classes): leave out the labels")
    if classes != len(labels):
        raise UsageError(f"{graph.model} has {classes} classes, and there are {len(labels)} labels: pass one for each")
