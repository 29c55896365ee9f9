"""Trees of inputs and outputs: taken apart and put together again, and as JSON values."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from neurosurgeon.graph.spec import Array
from neurosurgeon.graph.trees import Leaf, described, map_leaves, put_together, take_apart


class Pair(NamedTuple):
    first: Any
    second: Any = None


Untyped = namedtuple("Untyped", "scores mask")


@dataclass
class Record:
    scores: Any
    size: int = 3


@dataclass(frozen=True)
class Frozen:
    scores: Any

    def __post_init__(self) -> None:
        assert not isinstance(self.scores, Leaf), "its checks know tensors alone"


class Outputs(OrderedDict[str, Any]):
    """As the outputs of transformers: keys are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Demanding(list[Any]):
    def __init__(self, items: Any, length: int) -> None:
        super().__init__(items)
        assert length == len(self)


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


A, B = np.arange(3.0), np.ones((2, 2))


@pytest.mark.parametrize(
    "tree",
    [
        A,
        (A,),
        [A, (B, [A])],
        {"a": A, "b": {"c": [B, None, 3, "text"]}},
        Pair(A, Pair(B)),
        Untyped(A, {"m": B}),
        Record([A, B], 7),
        Frozen((A, B)),
        Outputs(a=A, b=(B, B)),
        (),
        {},
        None,
        (torch.Size((2, 3)), A),
    ],
    ids=repr,
)
def test_a_tree_is_put_together_as_it_was(tree: Any) -> None:
    template, tensors = take_apart(tree, is_array)
    assert not any(is_array(leaf) for leaf in leaves(template))
    again = put_together(template, tensors)
    assert type(again) is type(tree)
    assert repr(again) == repr(tree)
    assert list(map(id, tensors)) == list(dict.fromkeys(id(leaf) for leaf in leaves(tree) if is_array(leaf)))


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    map_leaves(tree, found.append)
    return found


def test_a_tensor_that_is_there_twice_is_one_tensor() -> None:
    template, tensors = take_apart({"one": A, "two": [B, A]}, is_array)
    assert len(tensors) == 2
    assert template == {"one": Leaf(0), "two": [Leaf(1), Leaf(0)]}
    again = put_together(template, [B, A])
    assert again["one"] is again["two"][1] is B


def test_a_size_is_a_constant() -> None:
    template, tensors = take_apart([torch.Size((2, 3)), A], is_array)
    assert template == [torch.Size((2, 3)), Leaf(0)]
    assert isinstance(template[0], torch.Size)
    assert len(tensors) == 1


def test_attributes_of_a_mapping_stay() -> None:
    again = put_together(*take_apart(Outputs(logits=A), is_array))
    assert isinstance(again, Outputs)
    assert again.logits is A


def test_a_container_that_cannot_be_made_again_becomes_a_plain_one() -> None:
    template, tensors = take_apart(Demanding([A, B], 2), is_array)
    assert template == (Leaf(0), Leaf(1))
    assert len(tensors) == 2


# ---------------------------------------------------------------- JSON values


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (A, 3),
        ((A, [B]), [3, [2]]),
        (Pair(A, B), {"first": 3, "second": 2}),
        (Record(A), {"scores": 3, "size": "3"}),
        ({1: A, "b": None}, {"1": 3, "b": "None"}),
        (Outputs(a=A), {"a": 3}),
    ],
    ids=repr,
)
def test_records_and_mappings_are_objects(tree: Any, expected: Any) -> None:
    def describe(value: Any) -> Any:
        return len(value) if is_array(value) else str(value)

    assert described(tree, describe) == expected


def test_the_leaves_of_a_template_are_described_as_leaves() -> None:
    arrays: list[Array] = [A, B]
    template, _ = take_apart({"a": A, "b": (B,)}, is_array)

    def describe(value: Any) -> Any:
        assert isinstance(value, Leaf)
        return arrays[value.index].shape

    made = described(template, describe)
    assert isinstance(made, Mapping)
    assert made == {"a": (3,), "b": [(2, 2)]}
