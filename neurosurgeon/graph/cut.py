"""Cuts as they are sent between two machines, which must agree on the graph and on its cut before a tensor is sent.

A cut is sent as a bit mask over the graph's nodes: bit i % 8 of byte i // 8 is set if node i is on the edge. It has 7
bytes for VGG-16, about 50 for DenseNet-121. A mask has a meaning only for its graph, so the graph's digest is sent too.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import NO_TENSOR
from neurosurgeon.utils.errors import GraphError, PartitionError

# The cloud unpacks the mask of each request three times, in 9 us (LeNet) to 0.2 ms (DenseNet-201) without a cache. The
# tasks of a queue have the same few masks, each with up to 10 KB of node numbers.
KEPT_MASKS = 64


def pack_nodes(graph: LayerGraph, edge_nodes: frozenset[int]) -> bytes:
    """Return the bit mask of the nodes on the edge."""
    bits = np.zeros(len(graph.nodes), dtype=np.uint8)
    bits[list(edge_nodes)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@lru_cache(KEPT_MASKS)
def unpack_nodes(graph: LayerGraph, mask: bytes) -> frozenset[int]:
    """Return the nodes on the edge from a peer's bit mask, checked.

    Raises: PartitionError: the mask has another length than this graph needs, or the nodes are no cut.
    """
    count = len(graph.nodes)
    if len(mask) != -(-count // 8):
        raise PartitionError(f"{len(mask)} bytes name no cut of {graph.model}, which has {count} nodes")
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    edge_nodes = frozenset(np.flatnonzero(bits).tolist())
    check_cut(graph, edge_nodes)
    return edge_nodes


def check_point(model: str, point: int, layers: int) -> None:
    """Refuse a partition point that a network of so many layers does not have.

    Raises: PartitionError.
    """
    if not 0 <= point <= layers:
        raise PartitionError(f"partition point {point} is outside {model}: choose 0 (all in the cloud) to {layers}")


def check_cut(graph: LayerGraph, edge_nodes: Collection[int]) -> None:
    """Check that a set of nodes can be the edge partition of a graph.

    Raises: PartitionError: the input is missing, a node is unknown or reads one of the cloud, or a node of the boundary
            makes no tensor.
    """
    if 0 not in edge_nodes or not all(0 <= index < len(graph.nodes) for index in edge_nodes):
        raise PartitionError(f"a cut of {graph.model} has its input and other nodes of 0 to {len(graph.nodes) - 1}")
    for index in edge_nodes:
        node = graph.nodes[index]
        if not all(read in edge_nodes for read in node.inputs):
            raise PartitionError(f"no cut of {graph.model}: {node.name} on the edge reads a tensor of the cloud")
    for node in graph.boundary(edge_nodes):
        if node.output == NO_TENSOR:
            raise PartitionError(f"no cut of {graph.model}: the result of {node.name} is no tensor and cannot be sent")


def check_graph_digest(graph: LayerGraph, digest: str) -> None:
    """Check that a peer's network of the same name is the same network.

    Raises: GraphError: the digests differ.
    """
    if digest != graph.digest:
        raise GraphError(
            f"the two sides hold different networks under the name {graph.model}: here {graph.digest}, there "
            f"{digest}; start both with the same --model-file, --input-size and version of torchvision"
        )
