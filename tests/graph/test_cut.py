"""Cuts as they are sent, and the digest of a graph: two machines must agree on both before a tensor is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from neurosurgeon.graph.cut import check_cut, check_graph_digest, check_point, pack_nodes, unpack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import ZOO
from neurosurgeon.utils.errors import GraphError, PartitionError
from tests.models.test_graph_dag import SHAPE, Diamond, closed_sets
from tests.networks import model_graph, trace_module

GRAPH = trace_module(Diamond(), SHAPE, "diamond")  # x, stem, left, act, right, add, cat
CUTS = list(closed_sets(GRAPH))
SOME_CUTS = st.sampled_from(CUTS)


@given(SOME_CUTS)
def test_unpack_nodes_reverses_pack_nodes(edge_nodes: frozenset[int]) -> None:
    assert unpack_nodes(GRAPH, pack_nodes(GRAPH, edge_nodes)) == edge_nodes


@given(st.binary(max_size=3))
def test_unpack_nodes_refuses_masks_that_are_no_cut(mask: bytes) -> None:
    try:
        assert unpack_nodes(GRAPH, mask) in CUTS
    except PartitionError as exc:
        assert "diamond" in str(exc)
        assert len(str(exc)) < 200


@pytest.mark.parametrize("name", ZOO)
def test_unpack_nodes_returns_every_partition_point(name: str) -> None:
    graph = model_graph(name)
    for point in range(len(graph.layers) + 1):
        mask = pack_nodes(graph, graph.edge_nodes(point))
        assert len(mask) <= 20
        assert unpack_nodes(graph, mask) == graph.edge_nodes(point)


@pytest.mark.parametrize(
    ("edge_nodes", "why"),
    [
        (set(), "input"),
        ({1}, "input"),
        ({0, 7}, "0 to 6"),
        ({0, -1}, "0 to 6"),
        ({0, 1, 3}, "act on the edge reads a tensor of the cloud"),
    ],
)
def test_a_set_of_nodes_that_is_no_cut_is_refused(edge_nodes: set[int], why: str) -> None:
    with pytest.raises(PartitionError, match=why):
        check_cut(GRAPH, edge_nodes)


@pytest.mark.parametrize("point", [0, 1, 12])
def test_a_point_inside_the_network_passes(point: int) -> None:
    check_point("le_net", point, 12)


@pytest.mark.parametrize("point", [-1, 13, 10**9])
def test_a_point_outside_the_network_is_refused_with_the_range(point: int) -> None:
    with pytest.raises(PartitionError, match=f"{point} is outside le_net: choose 0 .* to 12"):
        check_point("le_net", point, 12)


def test_parts_of_a_tensor_are_boundary_tensors() -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=1)
            return first + second

    graph = trace_module(Parts(), SHAPE, "parts")
    assert [node.name for node in graph.nodes] == ["x", "getitem", "getitem#2", "add"]
    assert [node.name for node in graph.boundary({0, 1})] == ["x", "getitem"]
    for edge_nodes in closed_sets(graph):
        check_cut(graph, edge_nodes)


# ---------------------------------------------------------------- digests


class Small(nn.Module):
    """A network with settings of every kind."""

    def __init__(self, **changes: float) -> None:
        super().__init__()
        settings = {"kernel": 3, "slope": 0.1, "epsilon": 1e-5, "factor": 2.0, "swap": 0, **changes}
        self.conv = nn.Conv2d(4, 4, int(settings["kernel"]), padding=int(settings["kernel"]) // 2)
        self.norm = nn.BatchNorm2d(4, eps=settings["epsilon"])
        self.act = nn.LeakyReLU(settings["slope"])
        self.factor = settings["factor"]
        self.is_swapped = bool(settings["swap"])

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return (x - y if self.is_swapped else y - x) * self.factor


def small(**changes: float) -> LayerGraph:
    return trace_module(Small(**changes), SHAPE, "small")


def test_digest_of_the_same_network_is_the_same() -> None:
    torch.manual_seed(5)  # weights have a digest of their own
    assert small().digest == small().digest
    assert len(small().digest) == 32


@pytest.mark.parametrize(
    "other",
    [
        lambda: small(kernel=5),
        lambda: small(slope=0.2),
        lambda: small(epsilon=1e-3),
        lambda: small(factor=3.0),
        lambda: small(swap=1),
        lambda: trace_module(Small(), (1, 4, 16, 16), "small"),
    ],
    ids=["kernel", "slope", "epsilon", "constant", "order of reading", "input size"],
)
def test_check_graph_digest_refuses_another_network(other: Callable[[], LayerGraph]) -> None:
    with pytest.raises(GraphError, match="different networks under the name small"):
        check_graph_digest(small(), other().digest)


def test_digests_of_the_zoo_differ() -> None:
    assert len({model_graph(name).digest for name in ZOO}) == len(ZOO)
