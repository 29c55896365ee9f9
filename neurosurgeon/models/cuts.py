"""What two machines must agree on before a tensor is sent: which graph they cut, and where.

A cut travels as a bit mask over the graph's nodes, bit i % 8 of byte i // 8 set where node i is on the edge: 7 bytes
for VGG-16, some 50 for DenseNet-121. A mask means nothing without its graph, so a digest of that travels along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from neurosurgeon.models.shapes import NO_TENSOR
from neurosurgeon.utils.errors import GraphError, PartitionError

if TYPE_CHECKING:
    from torch import fx, nn

    from neurosurgeon.models.graph import LayerGraph

DIGEST_HEX_CHARS = 32  # 128 bits, as of the weights
KEPT_MASKS = 64  # a stream of tasks has the same few, each with 10 KB of node numbers


@lru_cache(KEPT_MASKS)
def pack_nodes(graph: LayerGraph, edge_nodes: frozenset[int]) -> bytes:
    """Return the bit mask of the nodes on the edge."""
    bits = np.zeros(len(graph.nodes), dtype=np.uint8)
    bits[list(edge_nodes)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@lru_cache(KEPT_MASKS)
def unpack_nodes(graph: LayerGraph, mask: bytes) -> frozenset[int]:
    """Return the nodes on the edge that a peer's bit mask names, checked.

    Raises: PartitionError: it is no mask of this graph, or no cut.
    """
    count = len(graph.nodes)
    if len(mask) != -(-count // 8):
        raise PartitionError(f"{len(mask)} bytes name no cut of {graph.model}, which has {count} nodes")
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    edge_nodes = frozenset(np.flatnonzero(bits).tolist())
    check_cut(graph, edge_nodes)
    return edge_nodes


def check_cut(graph: LayerGraph, edge_nodes: Collection[int]) -> None:
    """Refuse a set of nodes that cannot be the edge's share of a graph.

    Raises: PartitionError: the input is missing, a node is unknown or reads one of the cloud, or what crosses is no
            tensor.
    """
    if 0 not in edge_nodes or not all(0 <= index < len(graph.nodes) for index in edge_nodes):
        raise PartitionError(f"a cut of {graph.model} has its input and other nodes of 0 to {len(graph.nodes) - 1}")
    for index in edge_nodes:
        node = graph.nodes[index]
        if not all(read in edge_nodes for read in node.inputs):
            raise PartitionError(f"no cut of {graph.model}: {node.name} on the edge reads what the cloud makes")
    for node in graph.crossing(edge_nodes):
        if node.output == NO_TENSOR:
            raise PartitionError(f"no cut of {graph.model}: what {node.name} makes is no tensor and cannot be sent")


def graph_digest(graph: LayerGraph) -> str:
    """Return 128 bits of SHA-256 over all that a network computes but for its weights.

    These are, one by one, the operations with their settings and constants, what they read, and the shape and type of
    what they make.
    """
    operations = list(graph.program.nodes)
    positions = {node: f"%{index}" for index, node in enumerate(operations)}
    root = graph.program.owning_module
    total = hashlib.sha256()
    for operation in operations:
        arguments = _map_reads((operation.args, operation.kwargs), positions)
        made = operation.meta.get("spec", NO_TENSOR)
        total.update(f"{_operation(operation, root)} {arguments} {made}\n".encode())
    return total.hexdigest()[:DIGEST_HEX_CHARS]


def _map_reads(arguments: Any, positions: dict[fx.Node, str]) -> Any:
    from torch.fx.node import map_arg

    return map_arg(arguments, lambda read: positions[read])


def _operation(node: fx.Node, root: nn.Module | None) -> str:
    """Return what a traced node calls, with the settings of a module."""
    if node.op == "call_module" and root is not None:
        module = root.get_submodule(str(node.target))
        return f"{node.target} {type(module).__qualname__}({module.extra_repr()})"
    if isinstance(node.target, str):
        return f"{node.op} {node.target}" if node.op != "placeholder" else node.op
    return getattr(node.target, "__name__", str(node.target))


def check_graph_digest(graph: LayerGraph, digest: str) -> None:
    """Refuse a peer whose network of the same name is another one.

    Raises: GraphError.
    """
    if digest != graph.digest:
        raise GraphError(
            f"the two sides hold different networks under the name {graph.model}: here {graph.digest}, there "
            f"{digest}; start both with the same --model-file, --input-size and version of torchvision"
        )
