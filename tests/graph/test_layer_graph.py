"""Outputs of a graph on both sides of a cut, and put in their order again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.graph.layer_graph import LayerGraph
from tests.networks import trace_module


class Several(nn.Module):
    """Outputs of three nodes, in another order than they are made, and a constant."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.tanh(x)
        z = y + 1
        return z.exp(), torch.arange(3), y, z


@pytest.fixture(scope="module")
def graph() -> LayerGraph:
    return trace_module(Several(), (1, 4))


@pytest.mark.parametrize(
    ("point", "edge", "cloud"),
    [(0, [1], [0, 2, 3]), (1, [1, 2], [0, 3]), (2, [1, 2, 3], [0]), (3, [0, 1, 2, 3], [])],
)
def test_each_output_is_made_on_one_side(graph: LayerGraph, point: int, edge: list[int], cloud: list[int]) -> None:
    edge_nodes = graph.edge_nodes(point)
    assert graph.outputs_on(edge_nodes, edge=True) == edge
    assert graph.outputs_on(edge_nodes, edge=False) == cloud
    assert graph.assemble(edge_nodes, edge, cloud) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="shorter"):
        graph.assemble(edge_nodes, edge[1:], cloud)


def test_nothing_crosses_behind_the_last_node(graph: LayerGraph) -> None:
    assert graph.boundary(graph.edge_nodes(3)) == ()
    assert [node.name for node in graph.boundary(graph.edge_nodes(1))] == ["tanh"]
    assert (graph.boundary_bytes[-1], graph.boundary_counts[-1]) == (0, 0)
    assert graph.outputs_bytes == 3 * 16 + 3 * 8
