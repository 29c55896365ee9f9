"""Modules of users as torch.export traces them: every cut computes what the module computes, or one line says no.

Everything that Python can do in a forward is tested against the module itself, run eagerly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from neurosurgeon.graph.spec import UNKNOWN
from neurosurgeon.graph.trees import put_together, take_apart
from neurosurgeon.models.build import TracedGraph, trace
from neurosurgeon.models.program import Example
from neurosurgeon.models.tracing import run_module
from neurosurgeon.utils.errors import InputSizeError, TraceError
from tests.equality import assert_equal
from tests.models.cuts_of import cut_module, over_the_wire, random_cuts

SHAPE = (1, 4, 8, 8)
INPUT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def split(model: nn.Module, graph: TracedGraph, edge_nodes: frozenset[int], inputs: tuple[Tensor, ...]) -> Any:
    """Return the tree of outputs of both partitions of a cut, one after the other."""
    edge, cloud = cut_module(model, graph, edge_nodes)
    with torch.inference_mode():
        made = edge(*(tensor.clone() for tensor in inputs))
        sent = sum(len(node.outputs) for node in graph.boundary(edge_nodes))
        remote = cloud(*map(over_the_wire, made[:sent])) if len(edge_nodes) < len(graph.nodes) else ()
    return put_together(graph.output_template, graph.assemble(edge_nodes, made[sent:], remote))


def exported(model: nn.Module, inputs: Any = INPUT, tracer: str = "torch.export") -> TracedGraph:
    """Return the graph of a module, all of whose cuts compute what the module computes, for other inputs, too."""
    model.eval()
    example = Example.of(inputs)
    graph = trace(model, "own", example)
    assert graph.tracer == tracer
    cuts = [*map(graph.edge_nodes, range(len(graph.layers) + 1)), *random_cuts(graph, 5)]
    for tensors in (example.tensors, tuple(example.drawn(1))):
        expected = run_module(model, example.template, [tensor.clone() for tensor in tensors])
        template, arrays = take_apart(expected, is_tensor)
        for cut in cuts:
            given = take_apart(split(model, graph, cut, tensors), is_tensor)
            assert given[0] == template, sorted(cut)
            for one, other in zip(given[1], arrays, strict=True):
                assert_equal(one, other, same_setup=False, what=sorted(cut))
    return graph


class Calls(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


# ---------------------------------------------------------------- what runs around forward


def conv_and_relu() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))


def with_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, args, output: output * 2 + args[0])


def with_pre_hook(model: nn.Sequential) -> None:
    model[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def with_hook_of_the_whole(model: nn.Sequential) -> None:
    model.register_forward_hook(lambda module, args, output: output.exp())


def with_replaced_forward(model: nn.Sequential) -> None:
    plain = model[0].forward
    model[0].forward = lambda x: plain(x).abs() + 1


def with_replaced_part(model: nn.Sequential) -> None:
    model[1].forward = functools.partial(functional.leaky_relu, negative_slope=0.3)


def with_norm_of_the_weight(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[0])


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        with_pre_hook,
        with_hook_of_the_whole,
        with_replaced_forward,
        with_replaced_part,
        with_norm_of_the_weight,
    ],
)
def test_hooks_and_replaced_methods_are_part_of_the_network(change: Callable[[nn.Module], None]) -> None:
    model = conv_and_relu()
    change(model)
    changed, plain = exported(model), exported(conv_and_relu())
    assert changed.digest != plain.digest


def test_autocast_is_part_of_the_network() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.relu(self.conv(x))

    graph = exported(Calls(forward))
    assert graph.outputs[0].spec.dtype == "bfloat16"


def test_switches_of_gradients_change_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv(x)
        with torch.enable_grad():
            return torch.relu(y) + x.detach()

    exported(Calls(forward))


def test_a_branch_of_cond_depends_on_the_data_of_each_task() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return torch.cond(y.sum() > self.limit, lambda y: y * 2, lambda y: y - 1, (y,))

    model = Calls(forward, limit=torch.tensor(70.0)).eval()
    graph = exported(model)
    for scale in (0.1, 10.0):
        given = split(model, graph, graph.edge_nodes(1), (INPUT * scale,))
        with torch.inference_mode():
            assert_equal(given, model(INPUT * scale), same_setup=False)


# ---------------------------------------------------------------- aliases and changes in place


def changes_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    row = y[:, 0]
    row.mul_(2)
    y[0, 1, :, ::2] = 3.0
    return y + row.sum()


def reads_a_view_after_a_change(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    part = y.view(4, -1)[1:3]
    y.add_(1)
    return part.tanh()


def has_two_names(self: Any, x: Tensor) -> Tensor:
    y = x
    y += 1
    return self.conv(x) * y


def writes_into_a_new_tensor(self: Any, x: Tensor) -> Tensor:
    out = torch.zeros(2, *x.shape[1:])
    out[0] = self.conv(x)[0]
    out[1].copy_(x[0]).clamp_(min=0)
    return out


def sets_elements(self: Any, x: Tensor) -> Tensor:
    y = torch.tanh(self.conv(x))
    y[y < 0] = 0.5
    return y.index_add_(1, torch.tensor([0, 3]), x[:, :2])


def splits_and_changes(self: Any, x: Tensor) -> Tensor:
    first, second = self.conv(x).chunk(2, 1)
    first.add_(second)
    second.mul_(first)
    return torch.cat((first, second), 1)


@pytest.mark.parametrize(
    "forward",
    [
        changes_a_view,
        reads_a_view_after_a_change,
        has_two_names,
        writes_into_a_new_tensor,
        sets_elements,
        splits_and_changes,
    ],
)
def test_changes_in_place_and_aliases_have_their_meaning(forward: Callable[..., Tensor]) -> None:
    exported(Calls(forward))


def test_inputs_of_a_task_are_not_changed() -> None:
    model = Calls(has_two_names).eval()
    graph = trace(model, "own", Example.of(INPUT.clone()))
    images = INPUT.clone()
    cut_module(model, graph, graph.edge_nodes(len(graph.layers))).edge(images)
    assert torch.equal(images, INPUT)


def test_a_buffer_that_a_run_only_writes_is_left_alone() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.conv(x)

    model = Calls(forward, seen=torch.zeros(()))
    graph = trace(model.eval(), "own", Example.of(INPUT))
    assert len(graph.layers) == 1
    split(model, graph, graph.edge_nodes(1), (INPUT,))
    assert model.seen == 0


# ---------------------------------------------------------------- constants


def test_tensors_that_forward_makes_are_part_of_the_network() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, -2.0, 3.0, 4.0]).view(1, 4, 1, 1)
        return self.conv(x) * scale + torch.linspace(0, 1, 8) + self.offset

    exported(Calls(forward, offset=torch.ones(8)))


def test_a_tensor_that_is_an_attribute_is_a_constant() -> None:
    model = Calls(lambda self, x: self.conv(x) * self.plain[0])
    model.plain = [torch.full((8,), 3.0)]  # in a list: no buffer
    graph = exported(model)
    assert [list(value.shape) for value in graph.constants.values()] == [[8]]
    values = graph.attributes(model)
    assert any(torch.equal(value, torch.full((8,), 3.0)) for value in values.values())


def test_other_constants_are_other_weights() -> None:
    def make(value: float) -> dict[str, Tensor]:
        model = Calls(lambda self, x: self.conv(x) * self.plain[0]).eval()
        model.plain = [torch.full((8,), value)]
        return trace(model, "own", Example.of(INPUT)).attributes(model)

    one, other = make(3.0), make(4.0)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- inputs


def test_several_inputs_by_position() -> None:
    graph = exported(Calls(lambda self, x, y: self.conv(x) + torch.relu(y)), (INPUT, torch.randn(1, 4, 8, 1)))
    assert [spec.shape for spec in graph.inputs] == [SHAPE, (1, 4, 8, 1)]
    assert graph.input_names == ("0", "1")
    assert graph.nodes[0].outputs == graph.inputs


def test_inputs_by_name() -> None:
    def forward(self: Any, *, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return torch.where(mask, self.conv(x) * scale, 0)

    mask = torch.rand(SHAPE) > 0.5
    graph = exported(Calls(forward), {"x": INPUT, "mask": mask, "scale": 3.0})
    assert graph.input_names == ("x", "mask")
    assert [spec.dtype for spec in graph.inputs] == ["float32", "bool"]


def test_nested_inputs() -> None:
    def forward(self: Any, pair: tuple[Tensor, list[Tensor]], options: dict[str, Any]) -> Tensor:
        x, (first, second) = pair
        return self.conv(x) * options["scale"] + first - second

    inputs = ((INPUT, [torch.randn(8), torch.randn(8, 1)]), {"scale": torch.tensor(2.0), "name": "unread"})
    graph = exported(Calls(forward), inputs)
    assert graph.input_names == ("0.0", "0.1", "0.2", "1")


def test_tokens_are_inputs() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            hidden = self.embedding(tokens).masked_fill(~mask[..., None], 0)
            return self.head(functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True))

    graph = exported(Embeds(), (torch.arange(12)[None], torch.arange(12)[None] < 9))
    assert [spec.dtype for spec in graph.inputs] == ["int64", "bool"]


def test_an_input_that_is_not_read_stays_an_input() -> None:
    graph = exported(Calls(lambda self, x, unread: self.conv(x)), (INPUT, torch.ones(3)))
    assert len(graph.inputs) == 2


# ---------------------------------------------------------------- outputs


class Pair(NamedTuple):
    scores: Tensor
    features: Tensor


@dataclass
class Result:
    scores: Tensor
    loss: Tensor | None = None


def nested(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return {"pair": Pair(y.mean((2, 3)), torch.relu(y)), "list": [y, (x * 2, None, 7, "text")]}


def dataclass_of(self: Any, x: Tensor) -> Any:
    return Result(self.conv(x))


def early_and_late(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return y.relu(), self.conv(y.relu()).tanh()


def twice(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return y, {"again": y}


def the_input(self: Any, x: Tensor) -> Any:
    return x, self.conv(x)


def a_constant(self: Any, x: Tensor) -> Any:
    return self.conv(x), torch.arange(5), self.conv.bias


def views(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return y[:, :1], y.flatten(1), y.mT


def two_types(self: Any, x: Tensor) -> Any:
    y = self.conv(x)
    return y.half(), y > 0, y.to(torch.complex64), y.argmax(), y.bfloat16()


def parts_of_one_operation(self: Any, x: Tensor) -> Any:
    values, indices = self.conv(x).topk(2, dim=1)
    return indices, values


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (nested, 4),
        (dataclass_of, 1),
        (early_and_late, 2),
        (twice, 1),
        (the_input, 2),
        (a_constant, 3),
        (views, 3),
        (two_types, 5),
        (parts_of_one_operation, 2),
    ],
)
def test_outputs_are_any_tree(forward: Callable[..., Any], count: int) -> None:
    graph = exported(Calls(forward))
    assert len(graph.outputs) == count


def test_outputs_are_made_on_the_side_of_their_operation() -> None:
    graph = exported(Calls(early_and_late))
    relu = graph.outputs[0].node
    assert relu is not None
    edge_nodes = graph.edge_nodes(relu)
    assert graph.outputs_on(edge_nodes, edge=True) == [0]
    assert graph.outputs_on(edge_nodes, edge=False) == [1]


def test_a_constant_output_is_added_by_the_edge() -> None:
    graph = exported(Calls(a_constant))
    assert [output.node for output in graph.outputs[1:]] == [None, None]
    assert graph.outputs_on(graph.edge_nodes(0), edge=True) == [1, 2]


def test_a_network_may_return_its_input_alone() -> None:
    graph = exported(nn.Identity())
    assert [output.node for output in graph.outputs] == [0]


# ---------------------------------------------------------------- sizes that depend on data


def test_an_output_may_have_a_size_that_depends_on_data() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.conv(x)
        kept = y[y > 0]
        return kept, torch.nonzero(y > 1), kept.sum()

    graph = exported(Calls(forward))
    assert graph.outputs[0].spec.shape == (UNKNOWN,)
    assert graph.outputs[1].spec.shape == (UNKNOWN, 4)
    assert graph.outputs[2].spec.shape == ()
    assert graph.outputs_bytes == 4


def test_tensors_of_a_size_that_depends_on_data_are_not_sent() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        kept = torch.relu(y[y > 0] * 2)
        return kept.max() * y.tanh()

    graph = exported(Calls(forward))
    for point in range(len(graph.layers)):
        assert all(spec.is_sized for node in graph.boundary(graph.edge_nodes(point)) for spec in node.outputs)


# ---------------------------------------------------------------- refused


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def test_a_module_whose_answer_depends_on_a_buffer_that_it_changes_is_refused_with_its_line() -> None:
    said = r"own keeps state: forward changes its buffer count \(.*test_exporting.py, line \d+: `self.count \+= 1`\)"
    with pytest.raises(TraceError, match=said) as caught:
        trace(Counts().eval(), "own", Example.of(INPUT))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_no_buffer_may_be_memory_for_results() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.memory[0].copy_(self.conv(x)) * 2

    model = Calls(forward)
    model.memory = [torch.zeros(SHAPE)]
    exported(model, tracer="torch.fx")


@pytest.mark.parametrize(
    ("draw", "operation"),
    [
        (lambda x: x + torch.rand(8), "rand"),
        (torch.bernoulli, "bernoulli"),
        (lambda x: functional.dropout(x, 0.5, training=True), "dropout"),
        (lambda x: x + torch.randn_like(x), "randn_like"),
    ],
)
def test_a_module_that_draws_random_numbers_is_refused_with_its_line(
    draw: Callable[[Tensor], Tensor], operation: str
) -> None:
    with pytest.raises(TraceError, match=f"own draws random numbers .*{operation}.*test_exporting.py, line"):
        trace(Calls(lambda self, x: draw(torch.sigmoid(x))), "own", Example.of(INPUT))


def test_dropout_of_a_network_that_only_runs_is_none() -> None:
    graph = exported(Calls(lambda self, x: functional.dropout(self.drop(self.conv(x)), 0.5, False), drop=nn.Dropout()))
    assert len(graph.layers) == 1


def test_a_module_that_fails_on_its_input_is_refused_with_the_part() -> None:
    with pytest.raises(InputSizeError, match="own cannot take an input of 8x8: 1: "):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)).eval(), "own", Example.of(INPUT))


@pytest.mark.parametrize("device", ["meta", "lazy"])
def test_a_module_without_weights_is_refused(device: str) -> None:
    model = nn.LazyLinear(3) if device == "lazy" else nn.Linear(8, 3, device="meta")
    with pytest.raises(TraceError, match="own has no weights: weight is on the meta device or not initialised"):
        trace(model, "own", Example.of(INPUT))


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning):
        model: nn.Module = torch.jit.trace(nn.Linear(8, 3), INPUT)
    with pytest.raises(TraceError, match="TorchScript, which cannot be split: give the Python module"):
        trace(model, "own", Example.of(INPUT))


def test_an_example_without_a_tensor_is_refused() -> None:
    with pytest.raises(TraceError, match="the example of the inputs holds no tensor"):
        Example.of({"x": 3})


# ---------------------------------------------------------------- the module is left as it is


def test_the_module_is_not_changed_by_tracing() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    exported(model)
    assert list(map(id, model.parameters())) == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_a_module_that_torch_export_cannot_trace_is_traced_by_torch_fx() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise NotImplementedError
        return torch.relu(self.conv(x))

    graph = exported(Calls(forward), tracer="torch.fx")
    assert [node.name for node in graph.nodes] == ["x", "conv", "relu"]


def test_tensors_that_forward_makes_are_constants_of_torch_fx_too() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise NotImplementedError
        return self.conv(x) * torch.tensor([1.0, -2.0, 3.0, 4.0]).view(1, 4, 1, 1)

    model = Calls(forward)
    attributes = set(vars(model))
    graph = exported(model, tracer="torch.fx")
    assert set(vars(model)) == attributes
    assert len(graph.constants) == 1
    assert_equal(graph.attributes(model)[next(iter(graph.constants))].flatten()[1], torch.tensor(-2.0), same_setup=True)
