"""Engines: who opens networks, cuts them and runs the partitions. Edge and cloud use them through these interfaces.

Nothing here imports torch. Tensors enter and leave a partition as numpy arrays (`graph.spec`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array, TensorSpec

Predictor = TypeVar("Predictor")  # `predictor.predictor_utils.LatencyPredictor`, which this layer does not know


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where weights come from: a file, else torchvision's pretrained ones, else the fixed seed."""

    file: Path | None = None
    pretrained: bool = False

    @property
    def seeded(self) -> bool:
        """Whether the weights are those of the fixed seed, which have learnt nothing."""
        return self.file is None and not self.pretrained


SEEDED = WeightsSource()


class Side(Enum):
    """Where a partition runs."""

    EDGE = "edge"
    CLOUD = "cloud"


@dataclass(frozen=True, slots=True, eq=False)
class NetworkRef:
    """A network with weights, as far as both sides must agree on it; it holds no parameters."""

    name: str
    graph: LayerGraph
    weights_digest: str
    weights: WeightsSource
    labels: Sequence[str] | None = None  # of the classes in its output, where they are known


class PartitionResult(NamedTuple):
    """The outputs of a partition, and how long this machine computed on them."""

    arrays: tuple[Array, ...]
    compute_ms: float

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum([array.nbytes for array in self.arrays])


class Partition(Protocol):
    """The part of a network on one side of a cut, ready to run; it holds only the parameters that it needs."""

    @property
    def network(self) -> NetworkRef:
        """The network that it is a part of."""

    @property
    def edge_nodes(self) -> frozenset[int]:
        """The nodes of the network's graph that are on the edge."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Its inputs; an image as pixels."""

    @property
    def value_inputs(self) -> tuple[TensorSpec, ...]:
        """The same with an image as values, which may come in place of the pixels."""

    @property
    def device(self) -> str:
        """The device that it runs on."""

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters and buffers."""

    @property
    def can_batch(self) -> bool:
        """Whether tasks joined along the first dimension give the same outputs; tried out at the first call."""

    def run(self, arrays: Sequence[Array], keep_going: Callable[[], bool] | None = None) -> PartitionResult | None:
        """Run it; return None if it was told to stop.

        Args: arrays: its inputs; they may be overwritten.
              keep_going: called between blocks of layers; the partition stops when it returns False.
        """


class Network(Protocol):
    """A network with its weights in memory."""

    @property
    def ref(self) -> NetworkRef:
        """Its description, which outlives it."""

    def partition(self, edge_nodes: frozenset[int], side: Side) -> Partition:
        """Return a partition of it. The caller keeps it: each call makes a new one, which shares the weights.

        Raises: PartitionError: these nodes are no cut.
        """

    def run_whole(self, array: Array) -> Array:
        """Return the output of the unsplit network for one input."""

    def measure(self) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        """Return the measured latency of each layer, ms: medians, and the ends of the middle 90 %. May take seconds."""


class Engine(Protocol):
    """Opens networks by name and runs them on one device. All methods may be called by any thread."""

    @property
    def device(self) -> str:
        """The device: "cpu" or "cuda"."""

    @property
    def threads(self) -> int:
        """CPU threads that the calling thread computes with."""

    def use_threads(self, threads: int) -> int:
        """Let the calling thread compute with ``threads`` CPU threads, at most one for each core; return how many."""

    def canonical_name(self, name: str) -> str:
        """Return the one name of a network. Raises: UnknownModelError, UsageError."""

    def graph(self, name: str) -> LayerGraph:
        """Return the graph of a network; it is traced once. May block for a second.

        No partition may run meanwhile, on any thread. Raises: UnknownModelError, TraceError, InputSizeError.
        """

    def has_graph(self, name: str) -> bool:
        """Whether `graph` would return at once."""

    def open(self, name: str, weights: WeightsSource = SEEDED) -> Network:
        """Return a network with its weights in memory. May block for seconds. Raises: WeightsError, as `graph` does."""

    def scale(self, predictor: Predictor, threads: int) -> Predictor:
        """Return a predictor scaled to the speed of this machine with that many threads, which is measured once."""

    def has_speed(self, threads: int) -> bool:
        """Whether `scale` would return at once."""

    def check_speed(self, measured_to_predicted: float, threads: int) -> None:
        """Have the speed of this machine measured again at the next start, if warm tasks contradict predictions."""


def find_engine(name: str = "torch") -> Callable[..., Engine]:
    """Return the class of an engine; it takes a catalogue of networks, and a device. Imports its library, seconds."""
    engine: Callable[..., Engine] = importlib.import_module(f"neurosurgeon.engine.{name}_engine").ENGINE
    return engine
