"""The layer graph of a network that is no chain: branches, shared tensors, and cuts with several boundary tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.build import TracedGraph, fold_batch_norms
from tests.equality import assert_equal
from tests.models.cuts_of import cut_module
from tests.networks import trace_module

SHAPE = (1, 4, 8, 8)


class Diamond(nn.Module):
    """Two branches of one tensor; one of them is read twice; added, then concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shared = self.stem(x)
        left, right = self.act(self.left(shared)), self.right(shared)
        return torch.cat([left + right, left], dim=1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Diamond().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> TracedGraph:
    return trace_module(model, SHAPE, "diamond")


def closed_sets(graph: TracedGraph) -> Iterator[frozenset[int]]:
    """Yield every set of nodes that contains the input and the inputs of its members."""
    others = range(1, len(graph.nodes))
    for size in range(len(graph.nodes)):
        for chosen in itertools.combinations(others, size):
            edge = frozenset((0, *chosen))
            if all(read in edge for index in edge for read in graph.nodes[index].inputs):
                yield edge


def test_every_cut_computes_the_output_of_the_whole(model: nn.Module, graph: TracedGraph) -> None:
    images = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    whole = model(images)
    most_tensors = 0
    for edge_nodes in closed_sets(graph):
        if len(edge_nodes) == len(graph.nodes):
            continue
        edge, cloud = cut_module(model, graph, edge_nodes)
        boundary = edge(images)
        most_tensors = max(most_tensors, len(boundary))
        assert_equal(cloud(*boundary)[0], whole, same_setup=False, what=sorted(edge_nodes))
    assert most_tensors >= 2


def test_boundary_tensors_have_the_order_of_the_graph(model: nn.Module, graph: TracedGraph) -> None:
    names = {node.name: node.index for node in graph.nodes}
    edge_nodes = {names[name] for name in ("x", "stem", "left", "act")}
    assert [node.name for node in graph.boundary(edge_nodes)] == ["stem", "act"]
    edge, _ = cut_module(model, graph, edge_nodes)
    assert len(edge(torch.zeros(SHAPE))) == 2


def test_a_tensor_read_twice_is_one_boundary_tensor(graph: TracedGraph) -> None:
    assert [node.name for node in graph.boundary({0, 1})] == ["stem"]


def test_every_node_is_a_layer_of_its_own(graph: TracedGraph) -> None:
    assert len(graph.layers) == len(graph.nodes) - 1
    assert [layer.nodes for layer in graph.layers] == [(node,) for node in graph.nodes[1:]]


def test_every_partition_point_of_the_execution_order_works(model: nn.Module, graph: TracedGraph) -> None:
    images = torch.ones(SHAPE)
    for point in range(len(graph.layers)):
        edge, cloud = cut_module(model, graph, graph.edge_nodes(point))
        assert_equal(cloud(*edge(images))[0], model(images), same_setup=False, what=f"point {point}")
        boundary = graph.boundary(graph.edge_nodes(point))
        assert graph.boundary_bytes[point] == sum(node.sent_bytes for node in boundary)


def test_sums_and_concatenations_have_kinds(graph: TracedGraph) -> None:
    kinds = {node.name: node.kind for node in graph.nodes}
    assert kinds["add"] is LayerKind.ADD
    assert kinds["cat"] is LayerKind.CONCAT
    assert graph.outputs[0].spec.shape == (1, 8, 8, 8)


def test_folding_skips_a_convolution_with_two_readers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = Shared().eval()
    graph = trace_module(model, SHAPE, "shared")
    assert not any(node.folded for node in graph.nodes)
    assert isinstance(fold_batch_norms(model, graph).norm, nn.BatchNorm2d)


class _DeadCode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        torch.flatten(y)
        return y


def test_an_unread_result_is_not_taken_for_the_output() -> None:
    graph = trace_module(_DeadCode(), (1, 2, 3, 3), "dead")
    assert graph.outputs[0].spec.shape == (1, 2, 3, 3)
