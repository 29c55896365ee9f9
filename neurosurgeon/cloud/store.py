"""The networks and partitions of one cloud. Only this module keeps them; the least recently used are dropped first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from neurosurgeon.cloud.executor import Executor
from neurosurgeon.engine.base import Network, Partition, Side, WeightsSource
from neurosurgeon.graph.cut import check_graph_digest, unpack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array, dtype_of
from neurosurgeon.net.messages import Prepare, Request
from neurosurgeon.utils.errors import ProtocolError, UnknownModelError, UsageError, WeightsError

MAX_MODELS = 16
MAX_PARTITIONS = 64  # of one network; they share its weights, and take 20 KB each


def _is_one_of(given: object, *allowed: object) -> bool:
    return given in allowed


class _Loaded(NamedTuple):
    """A network in memory, and its partitions by checked request, the last used ones last."""

    network: Network
    partitions: OrderedDict[Request, Partition]


class NetworkStore:
    """Networks ready to run. Called on the readers' threads; may block while a network is loaded or traced.

    Args: weights: their source, by canonical name. served: the canonical names that edges may use; None: all.
    """

    def __init__(
        self,
        executor: Executor,
        weights: Mapping[str, WeightsSource],
        served: tuple[str, ...] | None = None,
        max_models: int = MAX_MODELS,
    ) -> None:
        self._executor = executor
        self._engine = executor.engine
        self._weights = weights
        self._served = served
        self._max_models = max_models
        self._lock = threading.Lock()  # guards _loaded
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the last used is last
        self._loading = threading.Lock()  # held while a network is loaded: each needs much memory for the time

    def graph(self, name: str, digest: str) -> LayerGraph:
        """Return the graph of a network that an edge names, with the digest of the edge's graph.

        Raises: UnknownModelError; GraphError: the digests differ.
        """
        graph = self.graph_of(self._canonical(name))
        check_graph_digest(graph, digest)
        return graph

    def graph_of(self, name: str) -> LayerGraph:
        """Return the graph of a canonical name. It is traced while no worker computes (`Engine.graph`)."""
        if self._engine.has_graph(name):
            return self._engine.graph(name)
        return self._executor.run_alone(lambda: self._engine.graph(name))

    def network(self, name: str) -> Network:
        """Return a network, loaded if it is not in memory. A running one stays in memory until its tasks end.

        Raises: UnknownModelError, WeightsError.
        """
        return self._load(self._canonical(name)).network

    def prepare(self, request: Prepare) -> str:
        """Load the network and make the partition of a cut; return the digest of the weights.

        Raises: UnknownModelError, GraphError, PartitionError, WeightsError.
        """
        unpack_nodes(self.graph(request.model, request.graph_digest), request.edge_nodes)  # checked before loading
        digest = self.network(request.model).ref.weights_digest
        self._partition(Request(request.model, request.edge_nodes, request.graph_digest, digest))
        return digest

    def partition(self, request: Request, arrays: Sequence[Array]) -> Partition:
        """Return the cloud partition of a request, its network loaded if it is not in memory.

        Args:   arrays: the boundary tensors that come with the request.
        Raises: UnknownModelError, GraphError, WeightsError, PartitionError; ProtocolError: other inputs.
        """
        partition = self._partition(request)
        sent = [(dtype_of(array), array.shape) for array in arrays]
        inputs, values = ([(s.dtype, s.shape) for s in specs] for specs in (partition.inputs, partition.value_inputs))
        if len(sent) != len(inputs) or not all(map(_is_one_of, sent, inputs, values)):
            raise ProtocolError(f"boundary tensors of this cut: expected {inputs}, got {sent}")
        return partition

    def _partition(self, request: Request) -> Partition:
        with self._lock:
            if (loaded := self._loaded.get(request.model)) and (known := loaded.partitions.get(request)):
                self._loaded.move_to_end(request.model)
                loaded.partitions.move_to_end(request)
                return known
        if (name := self._canonical(request.model)) != request.model:
            return self._partition(request._replace(model=name))
        edge_nodes = unpack_nodes(self.graph(request.model, request.graph_digest), request.edge_nodes)
        loaded = self._load(name)
        digest = loaded.network.ref.weights_digest
        if request.weights_digest != digest:
            raise WeightsError(f"weights of {request.model} differ: cloud {digest}, edge {request.weights_digest}")
        made = loaded.network.partition(edge_nodes, Side.CLOUD)
        with self._lock:
            made = loaded.partitions.setdefault(request, made)  # tasks of one cut share its partition
            while len(loaded.partitions) > MAX_PARTITIONS:
                loaded.partitions.popitem(last=False)
        return made

    def _canonical(self, name: str) -> str:
        """Return the canonical name of a network that is served here; no network is built to check a name.

        Raises: UnknownModelError.
        """
        if self._served is None:
            return self._engine.canonical_name(name)
        with suppress(UsageError):
            if (known := self._engine.canonical_name(name)) in self._served:
                return known
        raise UnknownModelError(f"this cloud does not serve {name[:64]!r}: choose from {', '.join(self._served)}")

    def _load(self, name: str) -> _Loaded:
        if loaded := self._in_memory(name):
            return loaded
        self.graph_of(name)  # traced here, while no worker computes: `Engine.open` would trace beside them
        with self._loading:
            return self._in_memory(name) or self._open(name)

    def _in_memory(self, name: str) -> _Loaded | None:
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return self._loaded.get(name)

    def _open(self, name: str) -> _Loaded:
        with ThreadPoolExecutor(1, "load") as loader:
            source = self._weights.get(name, WeightsSource())
            loaded = _Loaded(loader.submit(self._engine.open, name, source).result(), OrderedDict())
        with self._lock:
            self._loaded[name] = loaded
            while len(self._loaded) > self._max_models:
                self._loaded.popitem(last=False)
        return loaded
