"""A network as a graph: nodes with kinds, shapes, bytes and FLOPs, their layers, and the boundaries of cuts.

This is all that the planner knows about a network. A chain is a graph in which every layer reads the one before it. A
cut is any set of nodes that contains the inputs of its members, so its boundary may have several tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from neurosurgeon.graph.spec import IMAGENET, Arrays, LayerKind, Preprocessing, TensorSpec, takes_images


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: its kind, its inputs and its outputs.

    ``params`` holds the data-set columns of the kind (``HW``, ``kernel``, ``Cin`` ...). ``folded`` marks a batch
    norm that is folded into the convolution before it: it keeps its partition point, but computes nothing.
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
    further_outputs: tuple[TensorSpec, ...] = ()  # of the few nodes with several tensors, which stay together
    parameters: Mapping[str, int] = field(default_factory=dict)  # bytes of each parameter and buffer that it needs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All tensors it makes."""
        return (self.output, *self.further_outputs)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors it makes."""
        return sum(output.size_bytes for output in self.outputs)

    @property
    def sent(self) -> tuple[TensorSpec, ...]:
        """All tensors it makes, as they are sent: an image as pixels."""
        if self.kind is not LayerKind.INPUT:
            return self.outputs
        return tuple(TensorSpec(spec.shape, "uint8") if takes_images(spec) else spec for spec in self.outputs)

    @property
    def sent_bytes(self) -> int:
        """Bytes of its tensors, as they are sent."""
        return sum(tensor.size_bytes for tensor in self.sent)


@dataclass(frozen=True, slots=True)
class Layer:
    """One link of the chain: a name, a kind (``block`` for several nodes), and its nodes."""

    index: int
    name: str
    kind: LayerKind
    nodes: tuple[Node, ...]

    @property
    def output(self) -> TensorSpec:
        """The tensor that the layer makes."""
        return self.nodes[-1].output

    @property
    def flops(self) -> int:
        """FLOPs of all its nodes."""
        return sum(node.flops for node in self.nodes)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


class Output(NamedTuple):
    """One output of a network: the node that makes it, and its position among the tensors of this node."""

    node: int | None  # None: a constant, which the edge adds
    position: int
    spec: TensorSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerGraph:
    """Nodes in execution order (node 0 makes all inputs), the layers they form, and the outputs.

    The layers of a `ChainNetwork` are its own; in any other network every node but the input is a layer. Inputs and
    outputs are trees (`graph.trees`): templates, and tensors in their order.
    """

    model: str
    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]
    digest: str  # of the network's structure; its weights have a digest of their own
    input_template: Any  # of its arguments, by position and by name
    input_names: tuple[str, ...]
    outputs: tuple[Output, ...]
    output_template: Any
    preprocessing: Preprocessing = IMAGENET  # of its images

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the network reads."""
        return self.nodes[0].outputs

    @property
    def outputs_bytes(self) -> int:
        """Bytes of the outputs; those of unknown size are left out."""
        return sum(output.spec.size_bytes for output in self.outputs)

    def split(self, edge_nodes: Collection[int], results: Arrays) -> tuple[Arrays, Arrays]:
        """Return the boundary tensors among the results of an edge partition, and the outputs that it has made."""
        sent = len(results) - len(self.outputs_on(edge_nodes, edge=True))
        return results[:sent], results[sent:]

    def assemble(
        self, edge_nodes: Collection[int], on_edge: Sequence[Any], in_cloud: Sequence[Any] = ()
    ) -> tuple[Any, ...]:
        """Return all outputs in their order, from those that each side of a cut has made."""
        made = dict(zip(self.outputs_on(edge_nodes, edge=True), on_edge, strict=True))
        made.update(zip(self.outputs_on(edge_nodes, edge=False), in_cloud, strict=True))
        return tuple(made[index] for index in range(len(self.outputs)))

    def outputs_on(self, edge_nodes: Collection[int], *, edge: bool) -> list[int]:
        """Return which outputs one side of a cut makes, by their positions in ``outputs``."""
        return [
            index
            for index, output in enumerate(self.outputs)
            if (output.node is None or output.node in edge_nodes) is edge
        ]

    @property
    def is_chain(self) -> bool:
        """Whether the boundary of every partition point is a single tensor."""
        return len(self.block_points) == len(self.layers) + 1

    def edge_nodes(self, point: int) -> frozenset[int]:
        """Return the nodes on the edge for partition point ``point`` (0 ... len(layers))."""
        last = self.layers[point - 1].nodes[-1] if point else self.nodes[0]
        return frozenset(range(last.index + 1))

    @cached_property
    def block_points(self) -> tuple[int, ...]:
        """The partition points of a chain of blocks: those whose boundary is a single tensor, and the last one."""
        last = len(self.layers)
        return (*(point for point in range(last) if self.boundary_counts[point] == 1), last)

    def boundary(self, edge_nodes: Collection[int]) -> tuple[Node, ...]:
        """Return the nodes on the edge whose tensors the cloud reads, each once; none with all on the edge."""
        readers = (node for node in self.nodes if node.index not in edge_nodes)
        wanted = {index for reader in readers for index in reader.inputs if index in edge_nodes}
        return tuple(self.nodes[index] for index in sorted(wanted))

    def parameter_bytes(self, nodes: Iterable[int]) -> int:
        """Return the bytes of the parameters and buffers that some nodes need; shared ones count once."""
        needed: dict[str, int] = {}
        for index in nodes:
            needed.update(self.nodes[index].parameters)
        return sum(needed.values())

    def _sums_at_points(self, values: Iterable[int]) -> tuple[int, ...]:
        """Return the sum of a value of the nodes over the boundary of every partition point, (layers + 1,)."""
        last_readers = [node.layer for node in self.nodes]  # the layer of the last reader of every node
        for node in self.nodes:
            for index in node.inputs:
                last_readers[index] = max(last_readers[index], node.layer)
        sums = [0] * (len(self.layers) + 1)
        for node, last_reader, value in zip(self.nodes, last_readers, values, strict=True):
            for point in range(node.layer + 1, last_reader + 1):
                sums[point] += value
        return tuple(sums)

    @cached_property
    def sent_bytes(self) -> tuple[int, ...]:
        """Bytes of the tensors of each node, as they are sent, (nodes,)."""
        return tuple(node.sent_bytes for node in self.nodes)

    @cached_property
    def tensor_counts(self) -> tuple[int, ...]:
        """Number of tensors that each node makes, (nodes,)."""
        return tuple(len(node.outputs) for node in self.nodes)

    @cached_property
    def boundary_bytes(self) -> tuple[int, ...]:
        """Bytes to send at every partition point, (layers + 1,); none after the last layer."""
        return self._sums_at_points(self.sent_bytes)

    @cached_property
    def boundary_counts(self) -> tuple[int, ...]:
        """Number of tensors to send at every partition point, (layers + 1,)."""
        return self._sums_at_points(self.tensor_counts)

    def point_name(self, point: int) -> str:
        """Return the layer before partition point ``point``; ``None`` for point 0."""
        return str(self.layers[point - 1]) if point else "None"
