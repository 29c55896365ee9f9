"""The names of classes: files of text and JSON, and numbers of them that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from neurosurgeon.edge.labels import check_labels, labels_of, read_labels
from neurosurgeon.edge.outcome import top_guesses
from neurosurgeon.utils.errors import UsageError
from tests.networks import model_graph, trace_module


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\nold bird\n",
        "\ufeffcat\r\ndog\r\nold bird",
        '["cat", "dog", "old bird"]',
        '{"0": "cat", "2": "old bird", "1": "dog"}',
        '{"cat": 0, "dog": 1, "old bird": 2}',
        '{"0": ["n01", "cat"], "1": ["n02", "dog"], "2": ["n03", "old bird"]}',
    ],
)
def test_labels_are_read_in_the_order_of_their_indices(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_bytes(text.encode())
    assert labels_of(tmp_path / "labels") == labels_of(["cat", "dog", "old bird"]) == ("cat", "dog", "old bird")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cat\n\ndog\n", "line 2 is empty"),
        (b"", "it is empty"),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b'["cat"', "is no JSON"),
        (b'{"0": "cat", "2": "dog"}', "of its 2 names none has the index 1"),
        (b'{"cat": "feline"}', "expected a list of names"),
        (b"[]", "it is empty"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read_labels(tmp_path / "labels")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"labels file .*none\.txt cannot be read"):
        read_labels(tmp_path / "none.txt")


def test_a_wrong_number_of_labels_is_refused_with_both() -> None:
    check_labels(["name"] * 1000, model_graph("le_net"))
    check_labels(None, model_graph("le_net"))
    with pytest.raises(UsageError, match="le_net has 1000 classes, and there are 2 labels"):
        check_labels(["cat", "dog"], model_graph("le_net"))


def test_labels_of_a_network_without_classes_are_refused() -> None:
    graph = trace_module(nn.Conv2d(3, 4, 1), (1, 3, 8, 8))
    with pytest.raises(UsageError, match=r"own has no output \(1, classes\): leave out the labels"):
        check_labels(["cat"], graph)


def test_guesses_have_the_labels() -> None:
    guesses = top_guesses(np.array([[0.0, 9.0]], np.float32), ["cat", "dog"])
    assert [guess.label for guess in guesses] == ["dog", "cat"]
