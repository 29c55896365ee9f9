"""The layer graph of the four models: shapes and costs without data, partitions that give the output of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.build import fold_batch_norms, trace
from neurosurgeon.models.LeNet import LeNet
from neurosurgeon.models.names import ZOO
from neurosurgeon.models.partition import MAX_BLOCKS
from neurosurgeon.models.program import Example
from neurosurgeon.models.weights import seeded_state
from tests.equality import assert_equal
from tests.networks import (
    INPUT_SHAPE,
    Network,
    cut,
    load_network,
    model_graph,
    random_input,
    run,
    run_whole,
    skeleton,
)


@pytest.fixture(scope="module", params=ZOO)
def network(request: pytest.FixtureRequest) -> Network:
    """Each of the four networks, folded and channels-last, as the scripts run them."""
    return load_network(request.param)


def count(module: nn.Module) -> int:
    """Return the number of parameter elements."""
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------- partitions


def test_the_partitions_compute_the_output_of_the_whole_at_every_point(network: Network) -> None:
    images = random_input()
    whole = run_whole(network, images)
    for point in range(len(network.graph.layers)):
        edge, cloud = cut(network, point)
        output = run(cloud, run(edge, [images]).arrays).arrays
        assert len(output) == 1
        assert_equal(output[0], whole, same_setup=True, what=f"point {point}")


def test_a_partition_that_runs_in_blocks_computes_the_same_and_may_be_stopped(network: Network) -> None:
    images, asked = random_input(), list[int]()
    whole = cut(network, len(network.graph.layers)).edge

    def keep_going() -> bool:
        asked.append(1)
        return len(asked) != 3

    assert whole.run([images.copy("K")], keep_going) is None
    assert len(asked) == 3
    result = whole.run([images.copy("K")], keep_going)
    assert result is not None
    assert_equal(result.arrays[0], run_whole(network, images), same_setup=True)
    assert min(len(network.graph.layers), MAX_BLOCKS) / 2 < len(asked) - 3 <= MAX_BLOCKS
    assert_equal(run(whole, [images]).arrays[0], result.arrays[0], same_setup=True)


def test_partitions_hold_only_the_parameters_that_they_need(network: Network) -> None:
    for point in range(len(network.graph.layers) + 1):
        edge, cloud = cut(network, point)
        assert count(edge.module) + count(cloud.module) == count(network.module), f"point {point}"
    assert count(cut(network, 0).edge.module) == 0
    assert count(cut(network, len(network.graph.layers)).cloud.module) == 0


def test_the_boundary_tensors_are_those_of_the_graph(network: Network) -> None:
    for point in (0, 1, len(network.graph.layers) // 2, len(network.graph.layers) - 1):
        edge, cloud = cut(network, point)
        tensors = run(edge, [random_input()]).arrays
        assert [tensor.shape for tensor in tensors] == [spec.shape for spec in cloud.inputs]


@pytest.mark.parametrize("name", ["vgg_net", "mobile_net"])
def test_folding_changes_outputs_by_rounding_only(name: str) -> None:
    model = skeleton(name)
    model.load_state_dict(seeded_state(name, model), assign=True)
    with torch.inference_mode():
        unfolded = model(as_tensor(random_input()))
    folded = run_whole(load_network(name), random_input())
    assert_equal(folded, unfolded, same_setup=False)


def test_folding_replaces_norms_by_identities() -> None:
    model = skeleton("le_net")
    assert fold_batch_norms(model, model_graph("le_net")) is model  # it has no norm to fold
    folded = load_network("mobile_net").module
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


# ---------------------------------------------------------------- boundary tensors


@pytest.mark.parametrize("name", ZOO)
def test_crossing_bytes_are_those_of_the_boundary_tensors(name: str) -> None:
    graph = model_graph(name)
    last = len(graph.layers)
    for point in range(last):
        nodes = graph.boundary(graph.edge_nodes(point))
        assert graph.boundary_bytes[point] == sum(node.sent_bytes for node in nodes), f"point {point}"
    assert len(graph.boundary_bytes) == last + 1
    assert graph.boundary_bytes[0] == 3 * 224 * 224
    assert graph.boundary_bytes[last] == 0


@pytest.mark.parametrize("name", ZOO)
def test_a_cut_of_a_chain_has_exactly_one_boundary_tensor(name: str) -> None:
    graph = model_graph(name)
    for point, layer in enumerate(graph.layers[:-1], start=1):
        assert graph.boundary(graph.edge_nodes(point)) == (layer.nodes[-1],)


# ---------------------------------------------------------------- tracing


def test_trace_leaves_the_model_unchanged() -> None:
    model = LeNet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    graph = trace(model, "le_net", Example.of(torch.randn(INPUT_SHAPE)), is_own=False)
    assert model.training
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert graph.nodes == model_graph("le_net").nodes


class Devices(TorchDispatchMode):
    """Records the devices on which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen |= {tensor.device.type for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor)}
        return output


def test_trace_computes_on_the_meta_device_only() -> None:
    model = skeleton("le_net")
    example = Example.of(torch.randn(INPUT_SHAPE))
    with Devices() as devices:
        trace(model, "le_net", example, is_own=False)
    assert devices.seen == {"meta"}


@pytest.mark.parametrize("name", ZOO)
def test_graph_begins_with_an_image_and_ends_with_logits(name: str) -> None:
    graph = model_graph(name)
    assert graph.nodes[0].kind is LayerKind.INPUT
    assert graph.inputs[0].shape == (1, 3, 224, 224)
    assert graph.outputs[0].spec.shape == (1, 1000)


@pytest.mark.parametrize("name", ZOO)
def test_nodes_are_in_order_and_read_earlier_ones(name: str) -> None:
    graph = model_graph(name)
    assert [node.index for node in graph.nodes] == list(range(len(graph.nodes)))
    assert all(read < node.index for node in graph.nodes for read in node.inputs)
    assert [node for layer in graph.layers for node in layer.nodes] == list(graph.nodes[1:])


@pytest.mark.parametrize("name", ZOO)
def test_weight_bytes_are_those_of_all_weights(name: str) -> None:
    """The biases that folded batch norms add are included."""
    graph, model = model_graph(name), skeleton(name)
    folded_into = [graph.nodes[node.inputs[0]] for node in graph.nodes if node.folded]
    bare = [conv for conv in folded_into if model.get_submodule(conv.name).bias is None]
    biases = sum(conv.output.shape[1] for conv in bare)
    assert sum(node.weight_bytes for node in graph.nodes) == 4 * (count(model) + biases)


def test_layers_of_alex_net_have_kinds_of_their_modules() -> None:
    kinds = [layer.kind.value for layer in model_graph("alex_net").layers]
    features = "conv activation maxpool conv activation maxpool conv activation conv activation conv activation maxpool"
    head = "avgpool flatten dropout linear activation dropout linear activation linear"
    assert kinds == f"{features} {head}".split()


def test_block_of_mobile_net_is_one_layer() -> None:
    graph = model_graph("mobile_net")
    assert graph.layers[3].kind is LayerKind.BLOCK
    kinds = [node.kind for node in graph.layers[3].nodes]
    assert kinds.count(LayerKind.DW_CONV) == 1
    assert kinds[-1] is LayerKind.ADD
    assert graph.layers[3].flops == sum(node.flops for node in graph.layers[3].nodes)


def test_flops_and_shapes_of_known_layers() -> None:
    graph = model_graph("alex_net")
    first, last = graph.layers[0], graph.layers[-1]
    assert (first.name, first.output.shape) == ("features.0", (1, 64, 55, 55))
    assert first.flops == 2 * 64 * 55 * 55 * 3 * 11 * 11
    assert (last.name, last.output.shape) == ("classifier.6", (1, 1000))
    assert last.flops == 2 * 4096 * 1000


@pytest.mark.parametrize(
    ("name", "published_giga_multiply_adds"), [("alex_net", 0.71), ("vgg_net", 15.47), ("mobile_net", 0.30)]
)
def test_flops_of_chains_are_those_that_torchvision_publishes(name: str, published_giga_multiply_adds: float) -> None:
    flops = sum(
        layer_node.flops
        for layer in model_graph(name).layers
        for layer_node in layer.nodes
        if layer_node.kind in (LayerKind.CONV, LayerKind.DW_CONV, LayerKind.LINEAR)
    )
    assert flops / 2e9 == pytest.approx(published_giga_multiply_adds, abs=0.01)


def test_every_batch_norm_of_the_zoo_is_folded() -> None:
    for name in ("vgg_net", "mobile_net"):
        norms = [node for node in model_graph(name).nodes if node.kind is LayerKind.BATCHNORM]
        assert norms
        assert all(node.folded for node in norms)


def test_point_name_is_the_layer_before_it() -> None:
    graph = model_graph("alex_net")
    assert graph.point_name(0) == "None"
    assert graph.point_name(3) == "features.2 (maxpool)"
