"""Building of a module's layer graph, without running it on data, with batch norms folded into convolutions.

Operations without cost are no nodes, unless they are layers of a chain or outputs: sizes, weights, other views of a
whole tensor, identities. Neither are operations whose result has a size that depends on data, unless they are outputs.
Both partitions of a cut compute them again if they need them, so their results are never sent.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from neurosurgeon.graph.layer_graph import Layer, LayerGraph, Node, Output
from neurosurgeon.graph.spec import IMAGENET, NO_TENSOR, LayerKind, Preprocessing, TensorSpec
from neurosurgeon.models.chain import ChainNetwork
from neurosurgeon.models.digest import graph_digest
from neurosurgeon.models.folding import fold_functions, fold_modules, foldable_norms
from neurosurgeon.models.operations import Operation, describe
from neurosurgeon.models.program import Example, Program, attribute_named, function_name, is_known, spec_of
from neurosurgeon.models.tracing import trace_known, trace_own

UNKNOWN = Operation(LayerKind.OTHER, {"HW": 1, "Cin": 1}, 0)  # of a result whose size depends on data


@dataclass(frozen=True, eq=False)
class TracedGraph(LayerGraph):
    """The graph of a module, and the program from which its partitions are made."""

    program: fx.Graph = field(repr=False)  # for torch.fx
    tracer: str
    made_by: tuple[tuple[fx.Node, ...], ...] = field(repr=False)  # the operations that make each node's tensors
    output_nodes: tuple[fx.Node, ...] = field(repr=False)  # the operations of its outputs, in their order
    fixed: frozenset[fx.Node] = field(repr=False)  # operations that depend on no input: computed once
    constants: Mapping[str, Any] = field(repr=False)  # of the program, created while it was traced
    folded: Mapping[str, str] = field(repr=False)  # the names of modules: of a batch norm, and of its convolution

    def attributes(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that the program reads outside of modules: constants, and attributes of ``model``."""
        targets = {str(node.target) for node in self.program.nodes if node.op == "get_attr"}
        values = {target: self.constants.get(target) for target in targets}
        found = {target: attribute_named(model, target) if made is None else made for target, made in values.items()}
        return {target: value for target, value in found.items() if isinstance(value, Tensor)}


# ---------------------------------------------------------------- tracing


def trace(
    model: nn.Module,
    name: str,
    example: Example,
    *,
    is_own: bool = True,
    preprocessing: Preprocessing = IMAGENET,
) -> TracedGraph:
    """Return the graph of ``model`` for inputs like those of the example. The model is not changed.

    Args:   is_own: whether it is a module of the user; if not, it may be on the meta device, without any weights.
            preprocessing: of its images.
    Raises: TraceError: it cannot become a graph; names the line. InputSizeError: it cannot take such inputs.
    """
    program = (trace_own if is_own else trace_known)(model, name, example)
    folded = fold_functions(program) if program.tracer == "torch.export" else foldable_norms(program)
    layer_names = _layer_names(model)
    builder = _Builder(program, layer_names, folded)
    for fx_node in program.graph.nodes:
        if fx_node.op != "output":
            builder.add(fx_node)
    nodes = tuple(builder.nodes)
    return TracedGraph(
        model=name,
        nodes=nodes,
        layers=_group_layers(nodes, layer_names),
        digest=graph_digest(program, preprocessing),
        preprocessing=preprocessing,
        input_template=program.input_template,
        input_names=_argument_names(model, example.names),
        outputs=builder.outputs(),
        output_template=program.output_template,
        program=program.graph,
        tracer=program.tracer,
        made_by=tuple(builder.made_by),
        output_nodes=program.outputs,
        fixed=frozenset(builder.fixed),
        constants=program.constants,
        folded={str(norm.target): str(conv.target) for norm, conv in folded.items() if norm.op == "call_module"},
    )


def _argument_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return names of inputs with those of forward's arguments in place of their positions."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [
        argument.name for argument in inspect.signature(model.forward).parameters.values() if argument.kind in kinds
    ]
    named = []
    for name in names:
        position, dot, rest = name.partition(".")
        is_known = position.isdigit() and int(position) < len(known)
        named.append(f"{known[int(position)]}{dot}{rest}" if is_known else name)
    return tuple(named)


def fold_batch_norms(model: nn.Module, graph: TracedGraph) -> nn.Module:
    """Fold the batch norms of a network into its convolutions, in place, and return it."""
    return fold_modules(model, graph.folded)


class _Needs(NamedTuple):
    """The nodes whose tensors an operation needs, and the bytes of the further parameters that it needs, by name."""

    nodes: tuple[int, ...]
    parameters: Mapping[str, int]


class _Builder:
    """Makes nodes of the operations with a cost, in their order; see the top of this file."""

    def __init__(self, program: Program, layer_names: list[str] | None, folded: Mapping[fx.Node, fx.Node]) -> None:
        self.nodes: list[Node] = []
        self.made_by: list[tuple[fx.Node, ...]] = []
        self.fixed: set[fx.Node] = set()
        self._program = program
        self._outputs = frozenset(program.outputs)
        self._layer_names = layer_names  # None: every node is a layer of its own
        self._folded = folded
        root = program.root
        named = (*root.named_parameters(), *root.named_buffers(), *program.constants.items())
        self._parameter_names = {id(value): name for name, value in named}
        self._needs: dict[fx.Node, _Needs] = {}
        self._names: Counter[str] = Counter()  # how often each was given

    def outputs(self) -> tuple[Output, ...]:
        """Return the place of each output in the graph."""
        places = {
            made: (node.index, position)
            for node, all_made in zip(self.nodes, self.made_by, strict=True)
            for position, made in enumerate(all_made)
        }
        found = [(*places.get(made, (None, 0)), spec_of(made)) for made in self._program.outputs]
        return tuple(Output(node, position, spec) for node, position, spec in found)

    def add(self, fx_node: fx.Node) -> None:
        """Add the next operation of the program."""
        if fx_node.op == "placeholder":
            self._add_input(fx_node)
            return
        module = self._program.module(fx_node)
        reads = [node for node in fx_node.all_input_nodes if not is_known(node)]
        sources = tuple(dict.fromkeys(source for node in reads for source in self._needs[node].nodes))
        parameters = {name: size for node in reads for name, size in self._needs[node].parameters.items()}
        parameters |= self._own_parameters(fx_node, module)
        if self.fixed.issuperset(fx_node.all_input_nodes):
            self.fixed.add(fx_node)
            if fx_node.op != "get_attr":
                parameters = {f"{fx_node.name} (computed once)": spec_of(fx_node).size_bytes}
        made = self._tensors_made(fx_node)
        specs = tuple(spec_of(node) for node in reads if self._needs[node].nodes and "spec" in node.meta)
        has_size = all(spec.is_sized for spec in (*specs, *map(spec_of, made)))
        operation = describe(fx_node, module, specs, spec_of(made[0]) if made else None) if has_size else UNKNOWN
        needs = _Needs(sources, parameters)
        if self._is_free(fx_node, operation, sources, specs, has_size):
            self._needs[fx_node] = needs
            return
        self._needs[fx_node] = _Needs((len(self.nodes),), {}) if has_size else needs
        self.made_by.append(made)
        self.nodes.append(self._node(fx_node, module, operation, sources, specs, parameters))

    def _add_input(self, fx_node: fx.Node) -> None:
        """Add an input; all of them are the tensors of node 0."""
        self._needs[fx_node] = _Needs((0,), {})
        if self.nodes:
            self.made_by[0] = (*self.made_by[0], fx_node)
            self.nodes[0] = replace(self.nodes[0], further_outputs=(*self.nodes[0].further_outputs, spec_of(fx_node)))
            return
        self.made_by.append((fx_node,))
        self.nodes.append(self._node(fx_node, None, Operation(LayerKind.INPUT, {}, 0), (), (), {}))

    def _is_free(
        self,
        fx_node: fx.Node,
        operation: Operation,
        sources: tuple[int, ...],
        reads: Sequence[TensorSpec],
        has_size: bool,
    ) -> bool:
        """Return whether an operation is no node, so that each partition that needs its result computes it again."""
        takes_part = function_name(fx_node) == "getitem" and len(sources) == 1 and fx_node in self.made_by[sources[0]]
        if is_known(fx_node) or fx_node in self.fixed or takes_part:
            return True
        is_output = fx_node in self._outputs
        if not has_size:
            return not is_output
        is_trivial = operation.kind in TRIVIAL_KINDS or fx_node in self._folded
        if not is_trivial or is_output:
            return False
        if not sources or "spec" not in fx_node.meta:
            return True
        return self._layer_names is None and bool(reads) and spec_of(fx_node).numel == reads[0].numel

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
            values = [self._program.values[str(fx_node.target)]]
        return {
            self._parameter_names[id(value)]: value.nbytes
            for value in values
            if id(value) in self._parameter_names and isinstance(value, Tensor)
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
            name = "x" if len(self._program.inputs) == 1 else "inputs"
        else:
            callers = [entry[0] for entry in fx_node.meta.get("nn_module_stack", {}).values() if entry[0]]
            caller = callers[-1] if callers else ""
            is_whole = caller and not next(self._program.root.get_submodule(caller).children(), None)
            parts = (caller, "" if is_whole and self._program.tracer == "torch.export" else function_name(fx_node))
            name = ".".join(part for part in parts if part)
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}#{self._names[name]}"


TRIVIAL_KINDS = frozenset({LayerKind.VIEW, LayerKind.DROPOUT})


def _with_bias(conv: Node) -> Node:
    """Return a convolution with a folded batch norm, which adds a bias to it."""
    if conv.params.get("bias", 1):
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
