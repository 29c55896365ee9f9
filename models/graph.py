"""A network as a graph: nodes with kinds, shapes, bytes and FLOPs; traced without data, cut into two modules.

Everything the planner knows about a network is here, and nothing here runs it on data: shapes come from one pass
of meta tensors. A chain is a graph in which every layer reads the one before it; a cut is any set of nodes that
contains the inputs of its members, so several tensors may cross.

What costs nothing is no node, unless it is a layer of a chain: sizes, weights, another view of a whole tensor, an
identity. Both halves make it again where they need it, so it never crosses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from models.chain import ChainNetwork
from models.cuts import check_cut, graph_digest
from models.operations import LayerKind, Operation, describe
from models.shapes import NO_TENSOR, TensorSpec, function_name
from models.tracing import trace_program


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: what it computes, what it reads, what it makes.

    ``params`` holds the data-set columns of the kind (``HW``, ``kernel``, ``Cin`` ...). ``folded`` marks a batch
    norm that lives inside the convolution before it: its partition point stays, its work is gone.
    """

    index: int
    name: str
    kind: LayerKind
    layer: int  # index of the chain layer it belongs to; -1 for the input
    inputs: tuple[int, ...]
    output: TensorSpec
    params: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    input_bytes: int = 0
    weight_bytes: int = 0
    folded: bool = False
    further_outputs: tuple[TensorSpec, ...] = ()  # of the few that make several tensors; these stay together
    parameters: Mapping[str, int] = field(default_factory=dict)  # bytes of each, and of buffers, that it needs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All tensors it makes."""
        return (self.output, *self.further_outputs)

    @property
    def output_bytes(self) -> int:
        """Bytes of what it makes."""
        return sum(output.size_bytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Layer:
    """One link of the chain: a name, a kind (``block`` for several nodes), and its nodes."""

    index: int
    name: str
    kind: LayerKind
    nodes: tuple[Node, ...]

    @property
    def output(self) -> TensorSpec:
        """The tensor that leaves the layer."""
        return self.nodes[-1].output

    @property
    def flops(self) -> int:
        """FLOPs of all its nodes."""
        return sum(node.flops for node in self.nodes)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """Nodes in execution order (node 0 is the input, the last one the output), and the layers they form.

    The layers of a `ChainNetwork` are its own; in any other network every node but the input is a layer.
    """

    model: str
    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]
    program: fx.Graph = field(repr=False)  # what torch.fx runs
    made_by: tuple[tuple[fx.Node, ...], ...] = field(repr=False)  # what in the program makes each node's tensors
    fixed: frozenset[fx.Node] = field(repr=False)  # what in the program depends on no input: computed once
    constants: Mapping[str, Tensor] = field(repr=False)  # of the program, made while tracing

    @property
    def input(self) -> TensorSpec:
        """The tensor that enters the network."""
        return self.nodes[0].output

    @property
    def output(self) -> TensorSpec:
        """The tensor that leaves the network."""
        return self.nodes[-1].output

    def attributes(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that the program reads from ``model``, or has made itself, other than in modules."""
        targets = {str(node.target) for node in self.program.nodes if node.op == "get_attr"}
        values = {target: self.constants.get(target) for target in targets}
        return {target: _attribute(model, target) if made is None else made for target, made in values.items()}

    @property
    def is_chain(self) -> bool:
        """Whether one tensor, and no other, crosses at every partition point."""
        return len(self.block_points) == len(self.layers) + 1

    def edge_nodes(self, point: int) -> frozenset[int]:
        """Return the nodes that partition point ``point`` (0 ... len(layers)) leaves on the edge."""
        return frozenset(node.index for node in self.nodes if node.layer < point)

    @cached_property
    def block_points(self) -> tuple[int, ...]:
        """The partition points at which one tensor crosses, and the last one: where a chain of blocks can be cut."""
        last = len(self.layers)
        return (*(point for point in range(last) if self.crossing_counts[point] == 1), last)

    def crossing(self, edge_nodes: Collection[int]) -> tuple[Node, ...]:
        """Return the nodes on the edge whose tensors the other side reads, each once."""
        readers = (node for node in self.nodes if node.index not in edge_nodes)
        wanted = {index for reader in readers for index in reader.inputs if index in edge_nodes}
        if len(edge_nodes) == len(self.nodes):
            wanted = {self.nodes[-1].index}
        return tuple(self.nodes[index] for index in sorted(wanted))

    def parameter_bytes(self, nodes: Iterable[int]) -> int:
        """Return the bytes of the parameters and buffers that some nodes need together; shared ones count once."""
        needed: dict[str, int] = {}
        for index in nodes:
            needed.update(self.nodes[index].parameters)
        return sum(needed.values())

    @cached_property
    def _last_layers(self) -> list[int]:
        """The layer of the last reader of every node."""
        last_reader = [node.layer for node in self.nodes]
        for node in self.nodes:
            for index in node.inputs:
                last_reader[index] = max(last_reader[index], node.layer)
        return last_reader

    def _sums_at_points(self, values: Iterable[int]) -> tuple[int, ...]:
        """Return the sum of the nodes' values over what crosses at every partition point, (layers + 1,)."""
        sums = [0] * (len(self.layers) + 1)
        for node, reader, value in zip(self.nodes, self._last_layers, values, strict=True):
            for point in range(node.layer + 1, reader + 1):
                sums[point] += value
        return tuple(sums)

    @cached_property
    def crossing_bytes(self) -> tuple[int, ...]:
        """Bytes that cross at every partition point, (layers + 1,); nothing crosses behind the last layer."""
        return self._sums_at_points(node.output_bytes for node in self.nodes)

    @cached_property
    def crossing_counts(self) -> tuple[int, ...]:
        """Tensors that cross at every partition point, (layers + 1,)."""
        return self._sums_at_points(len(node.outputs) for node in self.nodes)

    @cached_property
    def digest(self) -> str:
        """What tells the network's structure from every other; its weights have a digest of their own."""
        return graph_digest(self)

    def point_name(self, point: int) -> str:
        """Return the layer that partition point ``point`` follows; ``None`` for point 0."""
        return str(self.layers[point - 1]) if point else "None"


# ---------------------------------------------------------------- tracing


def trace(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> LayerGraph:
    """Return the graph of ``model`` for an input of ``input_shape``, without running it on data.

    The model is not changed; it may live on the meta device and hold no weights at all.

    Raises: TraceError: its control flow depends on its data. InputSizeError: the input is of no size for it.
    """
    traced = trace_program(model, name, input_shape)
    layer_names = _layer_names(model)
    builder = _Builder(traced, _layer_lookup(layer_names), keeps_all=layer_names is not None)
    for fx_node in traced.graph.nodes:
        if fx_node.op != "output":
            builder.add(fx_node)
    nodes = tuple(builder.nodes)
    return LayerGraph(
        model=name,
        nodes=nodes,
        layers=_group_layers(nodes, layer_names),
        program=traced.graph,
        made_by=tuple(builder.made_by),
        fixed=frozenset(builder.fixed),
        constants=_constants(traced, model),
    )


class _Builder:
    """Makes nodes of the operations that compute something, in their order; see the top of this file."""

    def __init__(self, traced: fx.GraphModule, layer_of: Callable[[fx.Node, int], int], *, keeps_all: bool) -> None:
        self.nodes: list[Node] = []
        self.made_by: list[tuple[fx.Node, ...]] = []
        self.fixed: set[fx.Node] = set()
        self._traced = traced
        self._layer_of = layer_of
        self._keeps_all = keeps_all
        self._folded = _foldable_norms(traced.graph, traced)
        self._with_norm = set(self._folded.values())  # their convolutions get a bias
        named = (*traced.named_parameters(), *traced.named_buffers())
        self._parameter_names = {id(value): name for name, value in named}
        self._sources: dict[fx.Node, tuple[int, ...]] = {}  # the nodes whose tensors an operation depends on
        self._parameters: dict[fx.Node, dict[str, int]] = {}  # what comes along with it, other than by those nodes
        self._names: Counter[str] = Counter()
        self._result = traced.graph.output_node().args[0]

    def add(self, fx_node: fx.Node) -> None:
        """Take in the next operation."""
        module = self._traced.get_submodule(str(fx_node.target)) if fx_node.op == "call_module" else None
        tensors = [node for node in fx_node.all_input_nodes if not is_plain(node)]
        sources = tuple(dict.fromkeys(source for node in tensors for source in self._sources[node]))
        parameters = {name: size for node in tensors for name, size in self._parameters[node].items()}
        parameters |= self._own_parameters(fx_node, module)
        if fx_node.op != "placeholder" and self.fixed.issuperset(fx_node.all_input_nodes):
            self.fixed.add(fx_node)
            if fx_node.op != "get_attr":
                parameters = {f"{fx_node.name} (computed once)": spec_of(fx_node).size_bytes}
        made = self._tensors_made(fx_node)
        reads = tuple(spec_of(node) for node in tensors if self._sources[node])
        operation = describe(fx_node, module, reads, spec_of(made[0]) if made else None)
        if fx_node.op != "placeholder" and self._is_free(fx_node, operation, sources, tensors):
            self._sources[fx_node], self._parameters[fx_node] = sources, parameters
            return
        self._sources[fx_node], self._parameters[fx_node] = (len(self.nodes),), {}
        self.made_by.append(made)
        self.nodes.append(self._node(fx_node, module, operation, sources, reads, parameters))

    def _is_free(
        self, fx_node: fx.Node, operation: Operation, sources: tuple[int, ...], tensors: Sequence[fx.Node]
    ) -> bool:
        """Return whether it is made again where it is needed."""
        if is_plain(fx_node) or fx_node in self.fixed:
            return True
        if self._takes_part(fx_node, sources):
            return True
        is_trivial = operation.kind in TRIVIAL_KINDS or fx_node in self._folded
        if not is_trivial or fx_node is self._result:
            return False
        if not sources or "spec" not in fx_node.meta:
            return True
        return not self._keeps_all and spec_of(fx_node).numel == spec_of(tensors[0]).numel

    def _takes_part(self, fx_node: fx.Node, sources: tuple[int, ...]) -> bool:
        """Return whether it takes one of several tensors that a node makes."""
        return function_name(fx_node) == "getitem" and len(sources) == 1 and fx_node in self.made_by[sources[0]]

    def _tensors_made(self, fx_node: fx.Node) -> tuple[fx.Node, ...]:
        """Return what stands for the tensors that an operation makes: itself, or what takes them from its tuple."""
        if "spec" in fx_node.meta:
            return (fx_node,)
        takers = [user for user in fx_node.users if function_name(user) == "getitem"]
        return tuple(made for user in takers for made in self._tensors_made(user))

    def _own_parameters(self, fx_node: fx.Node, module: nn.Module | None) -> dict[str, int]:
        if fx_node in self._folded:
            return {}
        values: Iterable[Any] = (*module.parameters(), *module.buffers()) if module is not None else ()
        if fx_node.op == "get_attr":
            values = [_attribute(self._traced, str(fx_node.target))]
        return {
            self._parameter_names[id(value)]: value.numel() * value.element_size()
            for value in values
            if id(value) in self._parameter_names
        }

    def _node(
        self,
        fx_node: fx.Node,
        module: nn.Module | None,
        operation: Operation,
        sources: tuple[int, ...],
        reads: tuple[TensorSpec, ...],
        parameters: dict[str, int],
    ) -> Node:
        index = len(self.nodes)
        outputs = tuple(spec_of(made) for made in self.made_by[index]) or (NO_TENSOR,)
        weights = parameters.values() if module is None else map(_size_bytes, module.parameters())
        node = Node(
            index=index,
            name=self._name(fx_node),
            kind=operation.kind,
            layer=self._layer_of(fx_node, index - 1),
            inputs=sources,
            output=outputs[0],
            params=operation.params,
            flops=operation.flops,
            input_bytes=sum(spec.size_bytes for spec in reads),
            weight_bytes=sum(weights),
            folded=fx_node in self._folded,
            further_outputs=outputs[1:],
            parameters=parameters,
        )
        return _with_bias(node) if fx_node in self._with_norm else node

    def _name(self, fx_node: fx.Node) -> str:
        """Return the module's name, or the function's behind that of the module which calls it; a second call is #2."""
        if fx_node.op == "call_module":
            name = str(fx_node.target)
        elif fx_node.op == "placeholder":
            name = fx_node.name
        else:
            callers = [entry[0] for entry in fx_node.meta.get("nn_module_stack", {}).values()]
            name = ".".join(part for part in (callers[-1] if callers else "", function_name(fx_node)) if part)
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}#{self._names[name]}"


TRIVIAL_KINDS = frozenset({LayerKind.VIEW, LayerKind.DROPOUT})


def spec_of(fx_node: fx.Node) -> TensorSpec:
    """Return what tensor a traced operation makes; none where it makes something else."""
    spec: TensorSpec = fx_node.meta.get("spec", NO_TENSOR)
    return spec


def is_plain(fx_node: fx.Node) -> bool:
    """Return whether a traced operation makes no tensors, but a size, a type or the like."""
    return "value" in fx_node.meta and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(fx_node.meta["value"]))


def _attribute(root: nn.Module, target: str) -> Any:
    path, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(path), leaf)


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _constants(traced: fx.GraphModule, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a program that the model has not: they were made while it was traced."""
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    known = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    found = {target: _attribute(traced, target) for target in targets - known}
    return {target: value for target, value in found.items() if isinstance(value, Tensor) and not _has(model, target)}


def _has(model: nn.Module, target: str) -> bool:
    try:
        _attribute(model, target)
    except AttributeError:
        return False
    return True


def _with_bias(conv: Node) -> Node:
    """Return a convolution that has a batch norm folded into it: what is left of the norm is a bias."""
    if conv.params["bias"]:
        return conv
    bias_bytes = conv.output.shape[1] * conv.output.item_bytes
    return replace(
        conv,
        params={**conv.params, "bias": 1},
        weight_bytes=conv.weight_bytes + bias_bytes,
        parameters={**conv.parameters, f"{conv.name}.bias": bias_bytes},
    )


def _layer_names(model: nn.Module) -> list[str] | None:
    """Return the qualified names of a chain's layers; None where the model is no chain."""
    if not isinstance(model, ChainNetwork):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model]


def _layer_lookup(names: list[str] | None) -> Callable[[fx.Node, int], int]:
    """Return the function from a traced node to the index of its layer.

    Without a chain every node is a layer of its own.
    """
    if names is None:
        return lambda fx_node, index: index
    positions = {name: index for index, name in enumerate(names)}

    def lookup(fx_node: fx.Node, index: int) -> int:
        path = [entry[0] for entry in fx_node.meta.get("nn_module_stack", {}).values()]
        if fx_node.op == "call_module":
            path.append(str(fx_node.target))
        return next((positions[name] for name in path if name in positions), -1)

    return lookup


def _group_layers(nodes: tuple[Node, ...], names: list[str] | None) -> tuple[Layer, ...]:
    if names is None:
        names = [node.name for node in nodes[1:]]
    members: list[list[Node]] = [[] for _ in names]
    for node in nodes[1:]:
        members[node.layer].append(node)
    return tuple(
        Layer(index, name, group[0].kind if len(group) == 1 else LayerKind.BLOCK, tuple(group))
        for index, (name, group) in enumerate(zip(names, members, strict=True))
    )


# ---------------------------------------------------------------- folding


def _foldable_norms(program: fx.Graph, model: nn.Module) -> dict[fx.Node, fx.Node]:
    """Return {batch norm: convolution} for every batch norm that alone reads a convolution, each of them called once.

    What has two names is left alone, too: one of them would go on meaning the module as it was.
    """
    calls = Counter(str(node.target) for node in program.nodes if node.op == "call_module")
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    pairs = {}
    for node in program.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        targets = [str(node.target), str(source.target)]
        norm, conv = (model.get_submodule(target) for target in targets)
        is_single = all(calls[target] == 1 and names[id(model.get_submodule(target))] == 1 for target in targets)
        if is_single and _is_fixed_norm(norm) and isinstance(conv, nn.Conv2d):
            pairs[node] = source
    return pairs


def _is_fixed_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) and module.running_mean is not None


def fold_batch_norms(model: nn.Module, graph: LayerGraph) -> nn.Module:
    """Fold each batch norm into the convolution before it, in place, and return the model.

    The norm becomes an identity, so every partition point keeps its number, its tensor shape and, bit for bit,
    the result of the whole folded network.
    """
    for norm, conv in _foldable_norms(graph.program, model).items():
        norm_name, conv_name = str(norm.target), str(conv.target)
        norm_module: Any = model.get_submodule(norm_name)
        conv_module: Any = model.get_submodule(conv_name)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv_module, norm_module))
        model.set_submodule(norm_name, nn.Identity())
    return model


# ---------------------------------------------------------------- cutting


def cut(model: nn.Module, graph: LayerGraph, edge_nodes: Collection[int]) -> tuple[nn.Module, nn.Module]:
    """Split ``model`` into what runs on the edge and what runs in the cloud.

    Args:    edge_nodes: indices of the nodes on the edge, with each node all that it reads; node 0 among them.
    Returns: two modules that share the model's parameters, each holding only those it needs. The edge half maps
             the network's input to the tuple of crossing tensors, in the order of ``graph.crossing``; the cloud
             half maps these to the 1-tuple of the network's output.
    Raises:  PartitionError: there is no such cut.
    """
    edge_nodes = frozenset(edge_nodes)
    check_cut(graph, edge_nodes)
    crossing = [made for node in graph.crossing(edge_nodes) for made in graph.made_by[node.index]]
    sides: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    for node, made in zip(graph.nodes, graph.made_by, strict=True):
        sides[node.index not in edge_nodes].extend(made)
    edge, cloud = sides
    return (
        _Half(model, graph, inputs=edge[:1]).module(edge[1:], crossing),
        _Half(model, graph, inputs=crossing).module(cloud, list(graph.made_by[-1])),
    )


class _Half:
    """A part of a program on its way to be a module."""

    def __init__(self, model: nn.Module, graph: LayerGraph, inputs: Sequence[fx.Node]) -> None:
        self._model = model
        self._constants = graph.constants
        self._fixed = graph.fixed
        self._device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._part = fx.Graph()
        self._attributes: dict[str, Any] = {}  # modules and tensors that the part refers to
        self._copies: dict[fx.Node, Any] = {node: self._part.placeholder(node.name) for node in inputs}

    def module(self, body: Iterable[fx.Node], outputs: Sequence[fx.Node]) -> nn.Module:
        """Return the module that computes ``body``, in this order, and returns ``outputs``."""
        for node in body:
            self._copy(node)
        self._part.output(tuple(self._dense(node) for node in outputs))
        return fx.GraphModule(self._attributes, self._part).eval()

    def _copy(self, node: fx.Node) -> Any:
        """Return the copy of an operation, made with all that it needs; a size whose tensor is not here is a number."""
        if node not in self._copies:
            if is_plain(node) and not self._is_here(node):
                return node.meta["value"]
            self._copies[node] = self._copied(node)
        return self._copies[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node in self._fixed and not is_plain(node):
            name = f"{node.name}_value"
            with torch.no_grad():
                self._attributes[name] = self._value(node)
            return self._part.get_attr(name)
        for read in node.all_input_nodes:
            self._copy(read)
        if node.op == "call_module":
            self._attributes[str(node.target)] = self._model.get_submodule(str(node.target))
        return self._part.node_copy(node, self._copy)

    def _value(self, node: fx.Node) -> Any:
        """Return what an operation computes that depends on no input."""
        if node.op == "get_attr":
            target = str(node.target)
            made = self._constants.get(target)
            return _attribute(self._model, target) if made is None else made.to(self._device)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = self._model.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        return function(*args, **kwargs)

    def _is_here(self, node: fx.Node) -> bool:
        if node in self._copies or node in self._fixed:
            return True
        return is_plain(node) and all(self._is_here(read) for read in node.all_input_nodes)

    def _dense(self, node: fx.Node) -> Any:
        """Return an output; a part of a tensor without the rest of it, in the same order of memory."""
        return self._part.call_method("clone", (self._copies[node],)) if _is_part(node) else self._copies[node]


def _is_part(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and function_name(node) in PARTS


PARTS = ("getitem", "narrow", "select", "expand", "slice")
