"""Networks of every sort that torchvision has: the partitions of any cut compute the output of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.names import torchvision_names
from tests.equality import assert_equal
from tests.models.cuts_of import over_the_wire, random_cuts, split_output
from tests.networks import Network, load_network, model_graph, random_input, run_whole, split

NETWORKS = (
    "resnet18@64 googlenet@64 densenet121@64 mobilenet_v3_small@64 efficientnet_b0@64 shufflenet_v2_x0_5@64 "
    "inception_v3@80 regnet_y_400mf@64 convnext_tiny@64 swin_t@64 swin_v2_t@64"
).split()


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    return load_network.__wrapped__(request.param)  # without the cache: they are many


def test_the_partitions_of_any_cut_compute_the_output_of_the_whole(network: Network) -> None:
    images = random_input(network.graph.inputs[0].shape)
    whole = run_whole(network, images)
    assert np.isfinite(whole).all()
    blocks = [network.graph.edge_nodes(point) for point in network.graph.block_points[::4]]
    most_tensors = 0
    for edge_nodes in (*random_cuts(network.graph, 6), *blocks):
        most_tensors = max(most_tensors, len(network.graph.boundary(edge_nodes)))
        output = split_output(network.module, network.graph, edge_nodes, as_tensor(images))
        assert_equal(output, whole, same_setup=True, what=sorted(edge_nodes))
    assert most_tensors > 1


def test_partitions_hold_the_parameters_that_the_graph_counts(network: Network) -> None:
    everything = frozenset(range(len(network.graph.nodes)))
    for edge_nodes in random_cuts(network.graph, 4, seed=1):
        edge, cloud = split(network, edge_nodes)
        assert network.graph.parameter_bytes(edge_nodes) == edge.parameter_bytes
        assert network.graph.parameter_bytes(everything - edge_nodes) == cloud.parameter_bytes


def test_nodes_are_operations_with_a_result(network: Network) -> None:
    for node in network.graph.nodes[1:]:
        assert node.output_bytes > 0
        assert node.inputs
        if node.kind is LayerKind.VIEW:  # a part of a tensor
            assert node.output.numel < sum(network.graph.nodes[read].output.numel for read in node.inputs)
    assert not any(node.kind is LayerKind.DROPOUT or node.folded for node in network.graph.nodes)
    names = [node.name for node in network.graph.nodes]
    assert len(set(names)) == len(names)


def test_between_blocks_there_is_one_boundary_tensor(network: Network) -> None:
    graph = network.graph
    assert graph.block_points[0] == 0
    assert graph.block_points[-1] == len(graph.layers)
    for point in range(len(graph.layers)):
        assert (len(graph.boundary(graph.edge_nodes(point))) == 1) == (point in graph.block_points)
    assert not graph.is_chain


def test_torchvision_has_eighty_networks() -> None:
    assert len(torchvision_names()) >= 80


def test_wire_keeps_the_memory_layout() -> None:
    tensor = torch.rand(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert over_the_wire(tensor).stride() == tensor.stride()


@pytest.mark.parametrize(
    ("name", "giga_multiply_adds", "million_parameters"),
    [("resnet18", 1.81, 11.7), ("googlenet", 1.50, 6.6), ("swin_t", 4.49, 28.3), ("vit_h_14", 1016.7, 633.5)],
)
def test_flops_and_weights_are_those_of_torchvision(
    name: str, giga_multiply_adds: float, million_parameters: float
) -> None:
    graph = model_graph(name)
    assert sum(node.flops for node in graph.nodes) / 2e9 == pytest.approx(giga_multiply_adds, rel=0.01)
    assert sum(node.weight_bytes for node in graph.nodes) / 4e6 == pytest.approx(million_parameters, rel=0.02)


def test_trace_of_the_largest_network_needs_no_weights() -> None:
    graph = model_graph("regnet_y_128gf")
    assert graph.inputs[0].shape == (1, 3, 384, 384)
    assert graph.parameter_bytes(range(len(graph.nodes))) > 2.5e9
