"""The memory of an edge partition: counted by hand, and the same whichever way it is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import ZOO
from neurosurgeon.planner.memory import EdgeMemory, edge_memory, memory_at_points
from tests.models.test_graph_dag import SHAPE, Diamond
from tests.networks import model_graph, trace_module

PLANE = 4 * 8 * 8 * 4  # bytes of a tensor of the diamond
CONV = {"stem": (4 * 4 * 9 + 4) * 4, "left": (4 * 4 + 4) * 4, "right": (4 * 4 * 9 + 4) * 4}


@pytest.fixture(scope="module")
def diamond() -> LayerGraph:
    return trace_module(Diamond(), SHAPE, "diamond")


def nodes_of(graph: LayerGraph, *names: str) -> frozenset[int]:
    return frozenset({0, *(node.index for node in graph.nodes if node.name in names)})


def test_edge_memory_of_the_input_alone(diamond: LayerGraph) -> None:
    assert edge_memory(diamond, {0}) == EdgeMemory(0, PLANE)


def test_boundary_tensors_are_kept_and_others_end_at_their_last_reader(diamond: LayerGraph) -> None:
    two_tensors = nodes_of(diamond, "stem", "left", "act")
    assert edge_memory(diamond, two_tensors) == EdgeMemory(CONV["stem"] + CONV["left"], 3 * PLANE)
    assert edge_memory(diamond, nodes_of(diamond, "stem")) == EdgeMemory(CONV["stem"], 2 * PLANE)


def test_edge_memory_of_the_whole_network(diamond: LayerGraph) -> None:
    whole = edge_memory(diamond, diamond.edge_nodes(len(diamond.layers)))
    assert whole.parameter_bytes == sum(CONV.values())
    assert whole.total_bytes == whole.parameter_bytes + whole.activation_bytes


def test_an_output_that_is_made_early_is_kept() -> None:
    class Early(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(x)
            return y, (y + 1).exp().sin()

    graph = trace_module(Early(), SHAPE)
    *_, before, last = memory_at_points(graph)
    assert before == edge_memory(graph, graph.edge_nodes(3)) == EdgeMemory(0, 3 * PLANE)
    assert last == edge_memory(graph, graph.edge_nodes(4)) == EdgeMemory(0, 3 * PLANE)


@pytest.mark.parametrize("name", [*ZOO, "resnet18", "googlenet"])
def test_memory_at_points_is_that_of_each_point(name: str) -> None:
    graph = model_graph(name)
    memory = memory_at_points(graph)
    assert len(memory) == len(graph.layers) + 1
    for point in range(0, len(memory), 5):
        assert memory[point] == edge_memory(graph, graph.edge_nodes(point))
