"""The output of a task: a tree in the JSON interface, its digest, and its classes."""

from __future__ import annotations

import hashlib
import json
from collections import namedtuple
from typing import Any

import numpy as np
import pytest

from neurosurgeon.edge.outcome import (
    MAX_LISTED,
    main_output,
    output_document,
    outputs_digest,
    top_class,
    top_guesses,
)
from neurosurgeon.edge.records import Guess
from neurosurgeon.edge.task import check_reply
from neurosurgeon.graph.spec import Array
from neurosurgeon.graph.trees import take_apart
from neurosurgeon.utils.errors import ProtocolError
from tests.models.test_exporting import Calls, early_and_late, exported

SCORES = np.array([[0.0, 3.0, 1.0]], np.float32)
BOXES = np.arange(8, dtype=np.int64).reshape(2, 4)[None]
LARGE = np.zeros((1, 8, 8, 8), np.float32)
Detections = namedtuple("Detections", "boxes scores")


def document_of(tree: Any, guesses: list[Guess]) -> Any:
    template, arrays = take_apart(tree, lambda value: isinstance(value, np.ndarray))
    document = output_document(template, arrays, guesses)
    assert json.loads(json.dumps(document)) == document
    return document


def fields(array: Array, **others: Any) -> dict[str, Any]:
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "digest": digest, **others}


def test_an_output_of_several_arrays_is_a_tree_of_their_fields() -> None:
    guess = Guess(1, None, 0.8)
    top5 = [{"index": 1, "label": None, "probability": 0.8}]
    document = document_of({"found": Detections(BOXES, [SCORES]), "features": LARGE, "count": 2}, [guess])
    assert document == {
        "found": {"boxes": fields(BOXES, values=BOXES.tolist()), "scores": [fields(SCORES, top5=top5)]},
        "features": fields(LARGE),  # too many values to be listed
        "count": 2,
    }
    assert LARGE.size > MAX_LISTED


def test_one_output_keeps_its_place_for_classes() -> None:
    assert document_of(LARGE, []) == fields(LARGE, top5=[])


def test_values_of_any_type_are_listed() -> None:
    bfloat16 = (SCORES.view(np.uint32) >> 16).astype(np.uint16)
    document = document_of((SCORES, bfloat16, np.array([True]), np.array([1j])), [])
    assert (document[1]["dtype"], document[1]["values"]) == ("bfloat16", SCORES.tolist())
    assert document[2]["values"] == [True]
    assert "values" not in document[3]


def test_the_digest_covers_all_outputs() -> None:
    digests = [outputs_digest(outputs) for outputs in ([SCORES], [BOXES], [SCORES, BOXES], [BOXES, SCORES])]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([SCORES], 1),
        ([LARGE, SCORES, -SCORES], 1),
        ([np.array([[True, False]]), SCORES], 1),
        ([np.array([0.0, 2.0])], 1),  # without a batch
        ([LARGE, LARGE], None),
        ([np.zeros((1, 0), np.float32)], None),
        ([], None),
    ],
)
def test_the_classes_are_those_of_the_first_output_of_two_dimensions(
    outputs: list[Array], expected: int | None
) -> None:
    assert top_class(outputs) == expected
    scores = main_output(outputs)
    if scores is not None and scores.size:
        assert top_guesses(scores, None)[0].index == expected


def test_outputs_of_a_cut_are_those_of_its_sides() -> None:
    graph = exported(Calls(early_and_late))
    relu = graph.outputs[0].node
    assert relu is not None
    cut = graph.edge_nodes(relu)
    early, late = (np.zeros(output.spec.shape, np.float32) for output in graph.outputs)
    assert graph.split(cut, (LARGE, early)) == ((LARGE,), (early,))
    check_reply(graph, cut, (late,))
    for wrong in ((), (late, late), (late[0],), (late.astype(np.float16),)):
        with pytest.raises(ProtocolError, match=r"the cloud replied .*, expected \[\('float32', \(1, 4, 8, 8\)\)\]"):
            check_reply(graph, cut, wrong)
