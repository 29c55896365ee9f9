"""Modules of users: traced, cut and run, or refused with one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.build import TracedGraph, fold_batch_norms
from neurosurgeon.utils.errors import InputSizeError, TraceError
from tests.equality import assert_equal
from tests.models.cuts_of import cut_module, split_output
from tests.models.test_graph_dag import closed_sets
from tests.networks import trace_module

SHAPE = (1, 4, 8, 8)
INPUT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def traced(model: nn.Module) -> TracedGraph:
    """Return the graph of a module, all of whose cuts compute the output of the whole."""
    torch.manual_seed(0)
    model.eval().requires_grad_(False)
    graph = trace_module(model, SHAPE, "own")
    with torch.inference_mode():
        whole = model(INPUT.clone())
    for edge_nodes in closed_sets(graph):
        output = split_output(model, graph, edge_nodes, INPUT)
        assert_equal(output, whole, same_setup=False, what=sorted(edge_nodes))
    return graph


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; shared ones count once."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def kinds(graph: TracedGraph) -> list[str]:
    return [node.kind.value for node in graph.nodes[1:]]


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x))) + x


def test_module_called_twice_is_two_nodes_with_shared_weights() -> None:
    graph = traced(CalledTwice())
    assert [node.name for node in graph.nodes] == ["x", "conv", "conv#2", "add"]
    assert graph.parameter_bytes([1]) == 4 * (4 * 4 * 9 + 4)
    edge, cloud = cut_module(CalledTwice(), graph, {0, 1})
    assert parameter_bytes(edge) == graph.parameter_bytes({0, 1})
    assert parameter_bytes(cloud) == graph.parameter_bytes({2, 3})


def test_folding_skips_a_convolution_called_twice() -> None:
    model = CalledTwice().eval()
    assert isinstance(fold_batch_norms(model, trace_module(model, SHAPE, "own")).norm, nn.BatchNorm2d)


def test_folding_skips_a_module_with_two_names() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(x))

    model = Alias().eval()
    images = torch.randn(SHAPE)
    graph = trace_module(model, SHAPE, "own")
    assert_equal(cut_module(model, graph, {0}).cloud(images)[0], model(images), same_setup=False)


def test_functions_are_nodes_with_kinds() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            x = functional.hardswish(functional.conv2d(x, self.weight, padding=1))  # (1, 8, 8, 8)
            tokens = x.flatten(2).transpose(1, 2)  # (1, 64, 8)
            tokens = functional.layer_norm(tokens, (8,), self.scale)
            scores = torch.softmax(tokens @ tokens.mT / 8, dim=-1)
            return (scores @ tokens).mean(dim=1)

    graph = traced(Functions())
    expected = "conv activation layer_norm matmul multiply softmax matmul other"
    assert kinds(graph) == expected.split()
    conv = graph.nodes[1]
    assert (conv.flops, conv.weight_bytes, conv.params["Cout"]) == (2 * 8 * 64 * 4 * 9, 4 * 8 * 4 * 9, 8)
    assert graph.nodes[4].flops == 2 * 64 * 8 * 64


def test_sizes_are_never_transferred() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            y = torch.relu(x)
            z = torch.sigmoid(y.mean((2, 3), keepdim=True))
            return torch.relu(z.expand(batch, channels, height, width) * y).reshape(x.size(0), -1) / (height * width)

    graph = traced(Sizes())
    relu = next(node for node in graph.nodes if node.name == "relu")
    assert [node.name for node in graph.boundary({0, relu.index})] == ["relu"]


def test_parts_of_a_tensor_are_transferred_by_themselves() -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=1)
            return torch.cat([torch.relu(first), torch.tanh(second), x[:, :1]], dim=1)

    graph = traced(Parts())
    parts = [node for node in graph.nodes if node.kind is LayerKind.VIEW]
    assert [part.output.shape[1] for part in parts] == [2, 2, 1]


def test_boundary_has_all_tensors_of_one_operation() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens, (hidden, state) = self.lstm(x.flatten(1, 2))
            return tokens.mean(dim=1) + torch.tanh(hidden[-1]) * state[0]

    graph = traced(Recurrent())
    lstm = next(node for node in graph.nodes if node.name == "lstm")
    assert [output.shape for output in lstm.outputs] == [(1, 32, 6), (1, 1, 6), (1, 1, 6)]
    assert lstm.kind is LayerKind.WEIGHTED


def test_values_that_depend_on_no_input_are_computed_once() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3))
            self.register_buffer("index", torch.tensor([0, 2, 1, 1]))
            self.offset = torch.arange(8.0)

        def forward(self, x: Tensor) -> Tensor:
            bias = torch.tanh(self.table[self.index]).sum(dim=1)
            return torch.relu(x * bias.view(1, 4, 1, 1)) + self.offset + torch.arange(8)

    graph = traced(Fixed())
    assert kinds(graph) == ["multiply", "activation", "add", "add"]


def test_trace_keeps_default_arguments() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            return torch.relu(x) * scale if mask is None else x * mask

    assert kinds(traced(Optional())) == ["activation", "multiply"]


def test_trace_follows_a_decision_on_a_shape() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(x.shape[1] // 2):
                x = self.norm(self.conv(x))
            return x if x.shape[0] > 1 else functional.relu(x)

    graph = traced(Shapes())
    assert kinds(graph) == ["conv", "conv", "activation"]  # with folded norms


# ---------------------------------------------------------------- in place


def test_a_later_reader_gets_the_changed_values() -> None:
    class Later(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            z = functional.relu(y, inplace=True)
            return y * 2 + z

    traced(Later())


def test_an_earlier_reader_gets_the_values_before_the_change() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            first = torch.sigmoid(y)
            return self.relu(y) + first

    traced(Before())


def test_in_place_change_without_a_reader_is_kept() -> None:
    class Unread(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            y.add_(1)
            return y * 3

    assert "add" in kinds(traced(Unread()))


def test_in_place_operations_leave_the_input_unchanged() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(x, inplace=True) + 1

    model = First()
    edge, _ = cut_module(model, trace_module(model, SHAPE, "own"), {0, 1, 2})
    images = INPUT.clone()
    edge(images)
    assert torch.equal(images, INPUT)


def test_in_place_change_of_a_part_changes_the_whole() -> None:
    class PartOf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            y[:, :1].add_(1)
            return y

    traced(PartOf())


# ---------------------------------------------------------------- refused


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return torch.relu(x)
        return x


def test_a_decision_that_depends_on_data_is_refused_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError) as caught:
        trace_module(Decides(), SHAPE, "own")
    said = str(caught.value)
    assert "own cannot be traced" in said
    assert f"{__file__}, line" in said
    assert "`if x.sum() > 0:`" in said
    assert "torch.where" in said
    assert "\n" not in said
    assert capfd.readouterr() == ("", "")


def test_a_shape_that_depends_on_data_is_computed_again_on_each_side() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0].sum()

    graph = traced(Counts())
    assert all(spec.is_sized for node in graph.nodes for spec in node.outputs)


def test_trace_refuses_a_module_with_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(InputSizeError, match="missing 1 required positional argument: 'y'"):
        trace_module(Two(), SHAPE, "own")


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(4, 4, 7, stride=4), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.MaxPool2d(5), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(7, 2)),
    ],
)
def test_an_input_of_a_wrong_size_is_refused_with_the_layer(model: nn.Module) -> None:
    with pytest.raises(InputSizeError, match="own cannot take an input of 8x8: 1: "):
        trace_module(model, SHAPE, "own")
