"""The edge's half of a network on its own: what a small device has to hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from neurosurgeon.engine.base import WeightsSource
    from neurosurgeon.graph.layer_graph import LayerGraph
    from neurosurgeon.models.zoo import Network


@dataclass(frozen=True, eq=False)
class EdgeHalf:
    """One cut's edge half, with the parameters that it needs and no others, and what it was cut from."""

    name: str
    module: nn.Module  # input -> crossing tensors
    graph: LayerGraph  # of the whole network
    edge_nodes: frozenset[int]
    weights_digest: str  # of the whole network
    device: str
    source: WeightsSource
    knows_imagenet: bool

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left for the cloud."""
        return len(self.edge_nodes) == len(self.graph.nodes)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters and buffers."""
        return parameter_bytes(self.module)


def parameter_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; shared ones count once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def edge_half(network: Network, edge_nodes: frozenset[int]) -> EdgeHalf:
    """Return the edge's half of a cut; it holds none of the network's other parameters.

    Raises: PartitionError.
    """
    return EdgeHalf(
        name=network.name,
        module=network.split(edge_nodes).edge,
        graph=network.graph,
        edge_nodes=edge_nodes,
        weights_digest=network.weights_digest,
        device=network.device,
        source=network.source,
        knows_imagenet=network.knows_imagenet,
    )
