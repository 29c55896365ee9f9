"""Nested inputs and outputs: lists, tuples, dicts, named tuples and dataclasses, with tensors as leaves.

A tree is taken apart into its tensors and a template: the same containers, with a `Leaf` in place of each tensor.
Everything else in it (numbers, texts, sizes, None) is a constant, and stays in the template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """The place of a tensor in a template."""

    index: int  # of the tensors of the tree


def take_apart(tree: Any, is_tensor: Callable[[Any], bool]) -> tuple[Any, list[Any]]:
    """Return the template of a tree, and its tensors in their order; one that is there twice is returned once."""
    tensors: list[Any] = []
    places: dict[int, Leaf] = {}

    def leaf(value: Any) -> Any:
        if not is_tensor(value):
            return value
        if id(value) not in places:
            places[id(value)] = Leaf(len(tensors))
            tensors.append(value)
        return places[id(value)]

    return map_leaves(tree, leaf), tensors


def put_together(template: Any, tensors: Sequence[Any]) -> Any:
    """Return the tree of a template and its tensors."""
    return map_leaves(template, lambda value: tensors[value.index] if isinstance(value, Leaf) else value)


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return a tree of the same containers, with the result of a function for everything that is no container."""
    if isinstance(tree, Leaf):
        return function(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {field.name: map_leaves(getattr(tree, field.name), function) for field in dataclasses.fields(tree)}
        return _with_fields(tree, fields)
    if isinstance(tree, Mapping):
        values = {key: map_leaves(value, function) for key, value in tree.items()}
        return values if type(tree) is dict else _rebuilt(tree, values)
    if isinstance(tree, list | tuple) and type(tree).__module__ != "torch":  # a torch.Size is a constant
        items = [map_leaves(value, function) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else _rebuilt(tree, items)
    return function(tree)


def _with_fields(record: Any, fields: Mapping[str, Any]) -> Any:
    """Return a dataclass of the same type with other values, without running its checks."""
    if isinstance(record, Mapping):  # the outputs of transformers are dataclasses and dicts: their fields may be None
        return type(record)(**fields)
    made = object.__new__(type(record))
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _rebuilt(container: Any, items: Any) -> Any:
    """Return a container of the same type with other items; a plain one if its type takes no such argument."""
    try:
        return type(container)(items)
    except Exception:  # a type of the user may raise anything
        return items if isinstance(items, dict) else tuple(items)


def described(tree: Any, describe: Callable[[Any], Any]) -> Any:
    """Return a tree as JSON values: records and mappings as objects, sequences as arrays, tensors as ``describe`` says.

    Args: describe: called with everything that is no container.
    """
    if isinstance(tree, Leaf):
        return describe(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        return {name: described(getattr(tree, name), describe) for name in names}
    if isinstance(tree, Mapping):
        return {str(key): described(value, describe) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        if hasattr(tree, "_fields"):
            return {name: described(value, describe) for name, value in zip(tree._fields, tree, strict=True)}
        return [described(value, describe) for value in tree]
    return describe(tree)
