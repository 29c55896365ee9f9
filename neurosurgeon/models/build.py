"""Building of a module's layer graph, without running it on data, with batch norms folded into convolutions.

Operations without cost are no nodes, unless they are layers of a chain: sizes, weights, other views of a whole tensor,
identities. Both partitions of a cut compute them again if they need them, so their results are never sent.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.utils.fusion import fuse_conv_bn_eval

from neurosurgeon.graph.layer_graph import Layer, LayerGraph, Node
from neurosurgeon.graph.spec import NO_TENSOR, LayerKind, TensorSpec
from neurosurgeon.models.chain import ChainNetwork
from neurosurgeon.models.operations import Operation, describe
from neurosurgeon.models.shapes import attribute_named, function_name, makes_no_tensor, spec_of
from neurosurgeon.models.tracing import trace_program

DIGEST_HEX_CHARS = 32  # 128 bits, as of the weights


@dataclass(frozen=True, eq=False)
class TracedGraph(LayerGraph):
    """The graph of a module, and the program from which its partitions are made."""

    program: fx.Graph = field(repr=False)  # for torch.fx
    made_by: tuple[tuple[fx.Node, ...], ...] = field(repr=False)  # the operations that make each node's tensors
    fixed: frozenset[fx.Node] = field(repr=False)  # operations that depend on no input: computed once
    constants: Mapping[str, Tensor] = field(repr=False)  # of the program, created while it was traced

    def attributes(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that the program reads outside of modules: constants, and attributes of ``model``."""
        targets = {str(node.target) for node in self.program.nodes if node.op == "get_attr"}
        values = {target: self.constants.get(target) for target in targets}
        return {target: attribute_named(model, target) if made is None else made for target, made in values.items()}


# ---------------------------------------------------------------- tracing


def trace(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> TracedGraph:
    """Return the graph of ``model`` for an input of ``input_shape``, without running it on data.

    The model is not changed; it may be on the meta device, without any weights.

    Raises: TraceError: its control flow depends on its data. InputSizeError: it cannot take an input of this size.
    """
    traced = trace_program(model, name, input_shape)
    layer_names = _layer_names(model)
    builder = _Builder(traced, layer_names)
    for fx_node in traced.graph.nodes:
        if fx_node.op != "output":
            builder.add(fx_node)
    nodes = tuple(builder.nodes)
    return TracedGraph(
        model=name,
        nodes=nodes,
        layers=_group_layers(nodes, layer_names),
        digest=graph_digest(traced.graph),
        program=traced.graph,
        made_by=tuple(builder.made_by),
        fixed=frozenset(builder.fixed),
        constants=_constants(traced, model),
    )


class _Needs(NamedTuple):
    """The nodes whose tensors an operation needs, and the bytes of the further parameters that it needs, by name."""

    nodes: tuple[int, ...]
    parameters: Mapping[str, int]


class _Builder:
    """Makes nodes of the operations with a cost, in their order; see the top of this file."""

    def __init__(self, traced: fx.GraphModule, layer_names: list[str] | None) -> None:
        self.nodes: list[Node] = []
        self.made_by: list[tuple[fx.Node, ...]] = []
        self.fixed: set[fx.Node] = set()
        self._traced = traced
        self._layer_names = layer_names  # None: every node is a layer of its own
        self._folded = _foldable_norms(traced.graph, traced)
        named = (*traced.named_parameters(), *traced.named_buffers())
        self._parameter_names = {id(value): name for name, value in named}
        self._needs: dict[fx.Node, _Needs] = {}
        self._names: Counter[str] = Counter()  # how often each was given

    def add(self, fx_node: fx.Node) -> None:
        """Add the next operation of the program."""
        module = self._traced.get_submodule(str(fx_node.target)) if fx_node.op == "call_module" else None
        tensors = [node for node in fx_node.all_input_nodes if not makes_no_tensor(node)]
        sources = tuple(dict.fromkeys(source for node in tensors for source in self._needs[node].nodes))
        parameters = {name: size for node in tensors for name, size in self._needs[node].parameters.items()}
        parameters |= self._own_parameters(fx_node, module)
        if fx_node.op != "placeholder" and self.fixed.issuperset(fx_node.all_input_nodes):
            self.fixed.add(fx_node)
            if fx_node.op != "get_attr":
                parameters = {f"{fx_node.name} (computed once)": spec_of(fx_node).size_bytes}
        made = self._tensors_made(fx_node)
        reads = tuple(spec_of(node) for node in tensors if self._needs[node].nodes)
        operation = describe(fx_node, module, reads, spec_of(made[0]) if made else None)
        if fx_node.op != "placeholder" and self._is_free(fx_node, operation, sources, tensors):
            self._needs[fx_node] = _Needs(sources, parameters)
            return
        self._needs[fx_node] = _Needs((len(self.nodes),), {})
        self.made_by.append(made)
        self.nodes.append(self._node(fx_node, module, operation, sources, reads, parameters))

    def _is_free(
        self, fx_node: fx.Node, operation: Operation, sources: tuple[int, ...], tensors: Sequence[fx.Node]
    ) -> bool:
        """Return whether an operation has no cost, so that each partition that needs its result computes it again."""
        takes_part = function_name(fx_node) == "getitem" and len(sources) == 1 and fx_node in self.made_by[sources[0]]
        if makes_no_tensor(fx_node) or fx_node in self.fixed or takes_part:
            return True
        is_trivial = operation.kind in TRIVIAL_KINDS or fx_node in self._folded
        if not is_trivial or fx_node is self._traced.graph.output_node().args[0]:
            return False
        if not sources or "spec" not in fx_node.meta:
            return True
        return self._layer_names is None and spec_of(fx_node).numel == spec_of(tensors[0]).numel

    def _tensors_made(self, fx_node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the operations of the tensors of a result: the operation itself, or those that unpack its tuple."""
        if "spec" in fx_node.meta:
            return (fx_node,)
        takers = [user for user in fx_node.users if function_name(user) == "getitem"]
        return tuple(made for user in takers for made in self._tensors_made(user))

    def _own_parameters(self, fx_node: fx.Node, module: nn.Module | None) -> dict[str, int]:
        if fx_node in self._folded:
            return {}
        values: Iterable[Any] = (*module.parameters(), *module.buffers()) if module is not None else ()
        if fx_node.op == "get_attr":
            values = [attribute_named(self._traced, str(fx_node.target))]
        return {
            self._parameter_names[id(value)]: value.nbytes for value in values if id(value) in self._parameter_names
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
        weights = parameters.values() if module is None else (weight.nbytes for weight in module.parameters())
        node = Node(
            index=index,
            name=self._name(fx_node),
            kind=operation.kind,
            layer=self._layer(fx_node, index - 1),
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
        return _with_bias(node) if fx_node in self._folded.values() else node

    def _layer(self, fx_node: fx.Node, index: int) -> int:
        """Return the index of the layer of a traced node; -1 for the input."""
        if self._layer_names is None:
            return index
        path = [entry[0] for entry in fx_node.meta.get("nn_module_stack", {}).values()]
        if fx_node.op == "call_module":
            path.append(str(fx_node.target))
        return next((self._layer_names.index(name) for name in path if name in self._layer_names), -1)

    def _name(self, fx_node: fx.Node) -> str:
        """Return the name of a module, or of a function after that of its calling module; a second call ends in #2."""
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


def _constants(traced: fx.GraphModule, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a program that the model does not have: they were created while it was traced."""
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    found = {target: attribute_named(traced, target) for target in targets if not _has(model, target)}
    return {target: value for target, value in found.items() if isinstance(value, Tensor)}


def _has(model: nn.Module, target: str) -> bool:
    try:
        attribute_named(model, target)
    except AttributeError:
        return False
    return True


def _with_bias(conv: Node) -> Node:
    """Return a convolution with a folded batch norm, which adds a bias to it."""
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
    """Return the qualified names of a chain's layers; None if the model is no chain."""
    if not isinstance(model, ChainNetwork):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model]


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

    Modules with two names are left out: the other name would still refer to the unfolded module.
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
        is_fixed_norm = isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
        if is_single and is_fixed_norm and isinstance(conv, nn.Conv2d):
            pairs[node] = source
    return pairs


def fold_batch_norms(model: nn.Module, graph: TracedGraph) -> nn.Module:
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


# ---------------------------------------------------------------- digest


def graph_digest(program: fx.Graph) -> str:
    """Return 128 bits of SHA-256 over a network's structure, without its weights.

    It covers the operations in their order, with their settings, constants and inputs, and the shapes and types of
    their results.
    """
    operations = list(program.nodes)
    positions = {node: f"%{index}" for index, node in enumerate(operations)}
    root = program.owning_module
    total = hashlib.sha256()
    for operation in operations:
        arguments = map_arg((operation.args, operation.kwargs), lambda read: positions[read])
        made = operation.meta.get("spec", NO_TENSOR)
        total.update(f"{_operation(operation, root)} {arguments} {made}\n".encode())
    return total.hexdigest()[:DIGEST_HEX_CHARS]


def _operation(node: fx.Node, root: nn.Module | None) -> str:
    """Return the name of the function or module that a traced node calls, with the module's settings."""
    if node.op == "call_module" and root is not None:
        module = root.get_submodule(str(node.target))
        return f"{node.target} {type(module).__qualname__}({module.extra_repr()})"
    if isinstance(node.target, str):
        return f"{node.op} {node.target}" if node.op != "placeholder" else node.op
    return getattr(node.target, "__name__", str(node.target))
