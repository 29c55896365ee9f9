"""A network as a graph: nodes with kinds, shapes, bytes and FLOPs; traced without data, cut into two modules.

Everything the planner knows about a network is here, and nothing here runs it on data: shapes come from one pass
of meta tensors. A chain is a graph in which every layer reads the one before it; a cut is any set of nodes that
contains the inputs of its members, so several tensors may cross.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.chain import ChainNetwork
from models.operations import LayerKind, describe
from models.shapes import NO_TENSOR, ShapeRecorder, TensorSpec


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

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensor it makes."""
        return self.output.size_bytes


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
    """Nodes in execution order (node 0 is the input), and the chain of layers they form."""

    model: str
    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]
    program: fx.Graph = field(repr=False)  # the same nodes, as torch.fx runs them

    @property
    def input(self) -> TensorSpec:
        """The tensor that enters the network."""
        return self.nodes[0].output

    @property
    def output(self) -> TensorSpec:
        """The tensor that leaves the network."""
        return self.nodes[-1].output

    def edge_nodes(self, point: int) -> frozenset[int]:
        """Return the nodes that partition point ``point`` (0 ... len(layers)) leaves on the edge."""
        return frozenset(node.index for node in self.nodes if node.layer < point)

    def crossing(self, edge_nodes: Collection[int]) -> tuple[Node, ...]:
        """Return the nodes on the edge whose tensors the other side reads, each once."""
        readers = (node for node in self.nodes if node.index not in edge_nodes)
        wanted = {index for reader in readers for index in reader.inputs if index in edge_nodes}
        if len(edge_nodes) == len(self.nodes):
            wanted = {self.nodes[-1].index}
        return tuple(self.nodes[index] for index in sorted(wanted))

    @cached_property
    def crossing_bytes(self) -> tuple[int, ...]:
        """Bytes that cross at every partition point, (layers + 1,); nothing crosses behind the last layer."""
        last_reader = [node.layer for node in self.nodes]
        for node in self.nodes:
            for index in node.inputs:
                last_reader[index] = max(last_reader[index], node.layer)
        crossing = [0] * (len(self.layers) + 1)
        for node, reader in zip(self.nodes, last_reader, strict=True):
            for point in range(node.layer + 1, reader + 1):
                crossing[point] += node.output_bytes
        return tuple(crossing)

    @cached_property
    def digest(self) -> str:
        """What tells the network's structure from every other; its weights have a digest of their own."""
        from models.cuts import graph_digest

        return graph_digest(self)

    def point_name(self, point: int) -> str:
        """Return the layer that partition point ``point`` follows; ``None`` for point 0."""
        return str(self.layers[point - 1]) if point else "None"


# ---------------------------------------------------------------- tracing


def trace(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> LayerGraph:
    """Return the graph of ``model`` for an input of ``input_shape``, without running it on data.

    The model is not changed; it may live on the meta device and hold no weights at all.
    """
    skeleton = copy.deepcopy(model).to("meta").eval()
    traced = fx.GraphModule(skeleton, fx.Tracer().trace(skeleton))
    program = traced.graph
    program.eliminate_dead_code()  # what nobody reads would otherwise look like the output
    with torch.inference_mode():
        ShapeRecorder(traced).run(torch.empty(input_shape, device="meta"))
    layer_of = _layer_lookup(skeleton)
    folded = _foldable_norms(program, skeleton)
    with_norm = set(folded.values())  # their convolutions get a bias
    nodes: dict[fx.Node, Node] = {}
    for fx_node in program.nodes:
        if fx_node.op == "output":
            continue
        inputs = tuple(nodes[read] for read in fx_node.all_input_nodes)
        module = skeleton.get_submodule(str(fx_node.target)) if fx_node.op == "call_module" else None
        node = _make_node(fx_node, module, len(nodes), layer_of(fx_node, len(nodes) - 1), inputs, fx_node in folded)
        nodes[fx_node] = _with_bias(node) if fx_node in with_norm else node
    ordered = tuple(nodes.values())
    return LayerGraph(name, ordered, _group_layers(ordered, _layer_names(skeleton)), program)


def _make_node(
    fx_node: fx.Node,
    module: nn.Module | None,
    index: int,
    layer: int,
    inputs: tuple[Node, ...],
    folded: bool,
) -> Node:
    spec: TensorSpec | None = fx_node.meta.get("spec")
    reads = tuple(node.output for node in inputs if node.output is not NO_TENSOR)
    kind, params, flops = describe(fx_node, module, reads, spec)
    weights = module.parameters() if module is not None else ()
    return Node(
        index=index,
        name=str(fx_node.target) if module is not None else fx_node.name,
        kind=kind,
        layer=layer,
        inputs=tuple(node.index for node in inputs),
        output=spec or NO_TENSOR,
        params=params,
        flops=flops,
        input_bytes=sum(spec.size_bytes for spec in reads),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        folded=folded,
    )


def _with_bias(conv: Node) -> Node:
    """Return a convolution that has a batch norm folded into it: what is left of the norm is a bias."""
    bias_bytes = 0 if conv.params["bias"] else conv.output.shape[1] * conv.output.item_bytes
    return replace(conv, params={**conv.params, "bias": 1}, weight_bytes=conv.weight_bytes + bias_bytes)


def _layer_names(model: nn.Module) -> list[str] | None:
    """Return the qualified names of a chain's layers; None where the model is no chain."""
    if not isinstance(model, ChainNetwork):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model]


def _layer_lookup(model: nn.Module) -> Callable[[fx.Node, int], int]:
    """Return the function from a traced node to the index of its layer.

    Without a chain every node is a layer of its own.
    """
    names = _layer_names(model)
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
    """Return {batch norm: convolution} for every batch norm that alone reads a convolution."""
    pairs = {}
    for node in program.nodes:
        if node.op != "call_module" or not isinstance(model.get_submodule(node.target), nn.BatchNorm2d):
            continue
        source = node.args[0]
        is_conv = source.op == "call_module" and isinstance(model.get_submodule(source.target), nn.Conv2d)
        if is_conv and len(source.users) == 1:
            pairs[node] = source
    return pairs


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
    """
    traced = [node for node in graph.program.nodes if node.op != "output"]
    crossing = [traced[node.index] for node in graph.crossing(edge_nodes)]
    edge = [node for node, described in zip(traced, graph.nodes, strict=True) if described.index in edge_nodes]
    cloud = [node for node in traced if node not in set(edge)]
    return (
        _submodule(model, inputs=edge[:1], body=edge[1:], outputs=crossing),
        _submodule(model, inputs=crossing, body=cloud, outputs=[traced[-1]]),
    )


def _submodule(model: nn.Module, inputs: list[fx.Node], body: list[fx.Node], outputs: list[fx.Node]) -> nn.Module:
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in body:
        copies[node] = part.node_copy(node, lambda read: copies[read])
    part.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(model, part).eval()
