"""Partitions of a network, and its single layers: modules that share its parameters, each with those that it uses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from neurosurgeon.engine.base import Side
from neurosurgeon.graph.cut import check_cut
from neurosurgeon.graph.layer_graph import Layer
from neurosurgeon.graph.spec import takes_images
from neurosurgeon.models.build import TracedGraph
from neurosurgeon.models.preprocess import as_values
from neurosurgeon.models.program import attribute_named, function_name, is_known

MAX_BLOCKS = 32  # of a partition that may be stopped
PARTIAL_VIEWS = ("getitem", "narrow", "select", "expand", "slice")  # operations whose result may share other memory


@dataclass(eq=False)
class Shared:
    """What all partitions of a network share."""

    values: dict[fx.Node, Any] = field(default_factory=dict)  # of operations that depend on no input
    channels_last: bool = True  # whether they run in this memory order


def partition_module(
    model: nn.Module,
    graph: TracedGraph,
    edge_nodes: Collection[int],
    side: Side,
    shared: Shared | None = None,
) -> PartitionModule:
    """Return the partition of ``model`` on one side of a cut; it shares the parameters that it uses, and has no others.

    The edge partition maps the network's inputs to the tuple of boundary tensors, in the order of ``graph.boundary``,
    and then the outputs that it makes itself; the cloud partition maps the boundary tensors to the other outputs. An
    image may be pixels or values, and is sent as the one that was given.

    Args:   edge_nodes: indices of the nodes on the edge: node 0, and with each node all nodes that it reads.
            shared: of all partitions of the network; what this partition needs is added.
    Raises: PartitionError: these nodes are no cut.
    """
    edge_nodes = frozenset(edge_nodes)
    check_cut(graph, edge_nodes)
    boundary = [made for node in graph.boundary(edge_nodes) for made in graph.made_by[node.index]]
    body = [
        made
        for node, all_made in zip(graph.nodes, graph.made_by, strict=True)
        if (node.index in edge_nodes) is (side is Side.EDGE)
        for made in all_made
    ]
    outputs = [graph.output_nodes[index] for index in graph.outputs_on(edge_nodes, edge=side is Side.EDGE)]
    if side is Side.EDGE:
        inputs = graph.made_by[0]
        return _Part(model, graph, inputs, shared).module(body[len(inputs) :], boundary, outputs)
    return _Part(model, graph, boundary, shared).module(body, (), outputs)


def program_module(model: nn.Module, graph: TracedGraph, results: Sequence[fx.Node]) -> PartitionModule:
    """Return the module that computes the whole program, and returns the results of some of its operations."""
    body = [node for node in graph.program.nodes if node.op not in ("placeholder", "output")]
    return _Part(model, graph, graph.made_by[0]).module(body, (), results)


class PartitionModule(nn.Module):
    """A part of a program: the code of its operations, and as children the modules that it calls.

    It is no `fx.GraphModule`, which keeps its graph, a tree of modules around the called ones, and its own class:
    0.5 MB for a cut of GoogLeNet. Only the source is kept, for `_run_blocks`.
    """

    def __init__(self, program: fx.Graph, attributes: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._code = program.python_code("self")
        self._run: Callable[..., tuple[Tensor, ...]] = self._compiled(self._code.src)

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the part."""
        return self._run(self, *tensors)

    def forward(self, *tensors: Tensor, keep_going: Callable[[], bool] | None = None) -> tuple[Tensor, ...] | None:
        """Return the outputs of the part, or None once ``keep_going``, called between blocks, has returned False."""
        if keep_going is None:
            return self.run(*tensors)
        blocks = self._run_blocks(self, *tensors)
        return next(outputs for outputs in blocks if outputs is not None or not keep_going())

    @cached_property
    def _run_blocks(self) -> Callable[..., Iterator[tuple[Tensor, ...] | None]]:
        """The same operations as a generator, which yields None between two blocks, and at the end the outputs."""
        *operations, outputs = self._code.src.rstrip().splitlines()  # one a line, after the function's head
        first = next(number for number, line in enumerate(operations, 1) if line.startswith("def "))
        size = (len(operations) - first) // MAX_BLOCKS + 1
        for end in reversed(range(first + size, len(operations), size)):
            operations.insert(end, "    yield")
        return self._compiled("\n".join([*operations, outputs.replace("return", "yield", 1)]))

    def _compiled(self, source: str) -> Callable[..., Any]:
        values = dict(self._code.globals)
        exec(compile(source, "<partition>", "exec", dont_inherit=True), values)  # noqa: S102  # fx made it
        function: Callable[..., Any] = values.pop("forward")
        return function


class _Part:
    """Builds the module of a part of a program."""

    def __init__(
        self,
        model: nn.Module,
        graph: TracedGraph,
        inputs: Sequence[fx.Node],
        shared: Shared | None = None,
    ) -> None:
        self._model = model
        self._graph = graph
        self._shared = shared or Shared()
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._part = fx.Graph()
        self._attributes: dict[str, Any] = {}  # modules and tensors that the part refers to
        self._names: dict[str, str] = {}  # of modules, as the part calls them
        self._copies: dict[fx.Node, Any] = {node: self._part.placeholder(node.name) for node in inputs}
        specs = zip(graph.made_by[0], graph.inputs, strict=True)
        self._maps = {node: takes_images(spec) for node, spec in specs if len(spec.shape) == 4}
        self._values: dict[fx.Node, fx.Node] = {}  # of the maps

    def module(
        self, body: Iterable[fx.Node], sent: Sequence[fx.Node], outputs: Sequence[fx.Node] = ()
    ) -> PartitionModule:
        """Return the module that computes ``body``, in this order, and returns the sent tensors and the outputs."""
        for node in body:
            self._copy(node)
        results = [self._dense(node, self._copies[node]) for node in sent]
        results += [self._dense(node, self._read(node)) for node in outputs]
        self._part.output(tuple(results))
        module = PartitionModule(self._part, self._attributes)
        module.eval()
        return module

    def _copy(self, node: fx.Node) -> Any:
        """Return the copy of an operation after all that it reads; the size of a tensor of another part is a number."""
        if node not in self._copies:
            if is_known(node) and not self._is_here(node):
                return self._here(node.meta["value"])
            self._copies[node] = self._copied(node)
        return self._copies[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node in self._graph.fixed and not is_known(node):
            name = f"{node.name}_value"
            self._attributes[name] = self._value(node)
            return self._part.get_attr(name)
        for read in node.all_input_nodes:
            self._copy(read)
        copy = self._part.node_copy(node, self._read)
        copy.args, copy.kwargs = map_aggregate((copy.args, copy.kwargs), self._here)
        if node.op == "call_module":
            target = str(node.target)
            copy.target = self._names.setdefault(target, f"module{len(self._names)}")
            self._attributes[copy.target] = self._model.get_submodule(target)
        return copy

    def _here(self, value: Any) -> Any:
        """Return a constant of the program; a device is this partition's own."""
        return self._device if isinstance(value, torch.device) else value

    def _read(self, node: fx.Node) -> Any:
        """Return the copy of an operation as others read it: an image as values, in the memory order of the network."""
        copy = self._copy(node)
        if node not in self._maps:
            return copy
        if node not in self._values:
            scaling = self._graph.preprocessing
            read = (copy, scaling.mean, scaling.std)
            values = self._part.call_function(as_values, read) if self._maps[node] else copy
            if not self._shared.channels_last:
                values = self._part.call_method("contiguous", (values,))
            self._values[node] = values
        return self._values[node]

    def _value(self, node: fx.Node) -> Any:
        """Return the result of an operation that depends on no input."""
        if node not in self._shared.values:
            with torch.no_grad():
                self._shared.values[node] = self._in_order(node, self._computed(node))
        return self._shared.values[node]

    def _in_order(self, node: fx.Node, value: Any) -> Any:
        """Return a value; the weight of a two-dimensional convolution in the memory order of the network."""
        is_kernel = any(function_name(user) == "conv2d" for user in node.users)
        if is_kernel and self._shared.channels_last and value.dim() == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value

    def _computed(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            target = str(node.target)
            made = self._graph.constants.get(target)
            value = attribute_named(self._model, target) if made is None else made
            return value.to(self._device) if isinstance(value, Tensor | nn.Module) else value
        args, kwargs = map_aggregate(fx.map_arg((node.args, node.kwargs), self._value), self._here)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = self._model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        return function(*args, **kwargs)

    def _is_here(self, node: fx.Node) -> bool:
        if node in self._copies or node in self._graph.fixed:
            return True
        return is_known(node) and all(self._is_here(read) for read in node.all_input_nodes)

    def _dense(self, node: fx.Node, copy: Any) -> Any:
        """Return an output that shares no memory with the partition.

        A view of a part of a tensor is copied without the rest, in the same memory order.
        """
        is_view = node.op in ("call_function", "call_method") and function_name(node) in PARTIAL_VIEWS
        return self._part.call_method("clone", (copy,)) if is_view or node in self._graph.fixed else copy


# ---------------------------------------------------------------- one layer after another


Values = dict[fx.Node, Tensor]


class LayerStep(NamedTuple):
    """One layer ready to run. Tensors are named by the operations that make them."""

    layer: Layer
    run: Callable[..., tuple[Tensor, ...]]
    reads: tuple[fx.Node, ...]
    makes: tuple[fx.Node, ...]
    last_reads: tuple[fx.Node, ...]  # of ``reads``, those that no later layer reads

    def apply(self, values: Values) -> None:
        """Run the layer: it reads its inputs from ``values``, and adds its outputs."""
        values.update(zip(self.makes, self.run(*(values[read] for read in self.reads)), strict=True))


def layer_steps(model: nn.Module, graph: TracedGraph) -> list[LayerStep]:
    """Return the layers of a network, to run one after another on the same ``values``.

    At the start these hold the network's inputs, under the operations ``graph.made_by[0]``.
    """
    layer_of = {made: node.layer for node in graph.nodes for made in graph.made_by[node.index]}
    reads: list[dict[fx.Node, None]] = [{} for _ in graph.layers]
    last_reader: dict[fx.Node, int] = dict.fromkeys(graph.output_nodes, len(graph.layers))
    for node in graph.nodes[1:]:
        for made in (made for read in node.inputs for made in graph.made_by[read]):
            if layer_of[made] != node.layer:
                reads[node.layer][made] = None
                last_reader[made] = max(node.layer, last_reader.get(made, 0))
    steps = []
    shared = Shared()
    for layer in graph.layers:
        body = [made for node in layer.nodes for made in graph.made_by[node.index]]
        makes = tuple(made for made in body if made in last_reader)
        read = tuple(reads[layer.index])
        part = _Part(model, graph, read, shared).module(body, makes)
        done = tuple(made for made in read if last_reader[made] == layer.index)
        steps.append(LayerStep(layer, part.run, read, makes, done))
    return steps
