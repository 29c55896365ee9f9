"""Drawings of cuts: every node once, every transferred tensor once, and text if Graphviz is missing."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.reports.drawing import boxes_of, dot_text, draw_cut
from neurosurgeon.utils.errors import UsageError
from tests.models.test_graph_dag import SHAPE, Diamond
from tests.networks import model_graph, trace_module


@pytest.fixture(scope="module")
def diamond() -> LayerGraph:
    return trace_module(Diamond(), SHAPE, "diamond")


@pytest.mark.parametrize("name", ["googlenet", "resnet18", "alex_net"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_node_is_in_one_box_on_its_side(name: str, share: float) -> None:
    graph = model_graph(name)
    edge_nodes = graph.edge_nodes(round(share * len(graph.layers)))
    boxes = boxes_of(graph, edge_nodes)
    assert sorted(index for box in boxes for index in box) == list(range(len(graph.nodes)))
    assert all(len({index in edge_nodes for index in box}) == 1 for box in boxes)


def test_trivial_layers_share_the_box_of_a_convolution() -> None:
    graph = model_graph("googlenet")
    assert len(boxes_of(graph, {0})) < 0.7 * len(graph.nodes)


def test_a_tensor_with_two_readers_is_drawn_once(diamond: LayerGraph) -> None:
    text = dot_text(diamond, {0, 1})
    assert text.count("shape=note") == 1
    assert '"stem\\n1x4x8x8 float32\\n1.0 KB"' in text
    assert len(re.findall(r"^  t1 -> b\d+;$", text, re.MULTILINE)) == 2


def test_no_tensor_is_drawn_if_all_is_on_the_edge(diamond: LayerGraph) -> None:
    assert "shape=note" not in dot_text(diamond, range(len(diamond.nodes)))


def test_names_are_escaped(diamond: LayerGraph) -> None:
    named = LayerGraph.__new__(LayerGraph)
    named.__dict__.update(diamond.__dict__ | {"model": 'a"b\\'})
    assert dot_text(named, {0}).startswith('digraph "a\\"b\\\\" {')


def test_dot_suffix_writes_text(diamond: LayerGraph, tmp_path: Path) -> None:
    assert draw_cut(tmp_path / "cut.dot", diamond, {0}) == tmp_path / "cut.dot"
    assert (tmp_path / "cut.dot").read_text() == dot_text(diamond, {0})


def test_without_graphviz_text_is_written_with_a_hint(
    diamond: LayerGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with caplog.at_level(logging.WARNING):
        assert draw_cut(tmp_path / "cut.svg", diamond, {0}) == tmp_path / "cut.dot"
    assert "pip install graphviz" in caplog.text
    assert (tmp_path / "cut.dot").exists()
    assert not (tmp_path / "cut.svg").exists()


class _MissingError(Exception):
    pass


class _FailedError(Exception):
    pass


@pytest.mark.parametrize(("answer", "written"), [(b"<svg/>", "cut.svg"), (_MissingError(), "cut.dot")])
def test_graphviz_draws_if_its_program_is_installed(
    answer: bytes | Exception, written: str, diamond: LayerGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Source:
        def __init__(self, text: str) -> None:
            assert text.startswith("digraph")

        def pipe(self, format: str) -> bytes:
            assert format == "svg"
            if isinstance(answer, Exception):
                raise answer
            return answer

    fake = SimpleNamespace(Source=Source, ExecutableNotFound=_MissingError, CalledProcessError=_FailedError)
    monkeypatch.setitem(sys.modules, "graphviz", fake)
    assert draw_cut(tmp_path / "cut.svg", diamond, {0}) == tmp_path / written


@pytest.mark.parametrize("name", ["cut.txt", "cut", "none/cut.dot"])
def test_an_invalid_path_is_a_usage_error(name: str, diamond: LayerGraph, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot (draw|write)"):
        draw_cut(tmp_path / name, diamond, {0})
