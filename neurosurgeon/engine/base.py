"""The interfaces of engines: an engine opens networks, cuts them, and runs their partitions.

Edge and cloud know engines by these interfaces alone, and nothing here imports torch. To add an engine, write the
module ``neurosurgeon/engine/NAME_engine.py``, in which ``ENGINE`` is a class that implements `Engine` and takes a
catalogue of networks and a device. `find_engine` returns it. `torch_engine` is the reference implementation.

Threads. The methods of an engine may be called on any thread, and several at one time. A network and its partitions
may run on another thread than the one that opened them. Several partitions, or one, may run on several threads at one
time. CPU threads (`Engine.use_threads`) are set for each calling thread.

Arrays. Tensors enter and leave a partition as numpy arrays in host memory (`graph.spec`): bfloat16 as the uint16 of its
bits; images and activations (N, C, H, W) with the strides of either memory order, C-contiguous or channels-last.
Strides may decide the order of sums, so an engine uses an input with the strides that it has. The caller owns the
inputs of `Partition.run`, passes them writable, and lets the engine overwrite them. It owns the results, too: they may
share memory with the inputs of the same call, but never with those of another call or with the engine.

Errors. A wrong name, weights file or cut of the user raises the `UsageError` that is named below. `Partition.run` may
raise any exception: edge and cloud log it with its traceback as an internal error, and fail that task alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array, TensorSpec

Predictor = TypeVar("Predictor")  # `predictor.predictor_utils.LatencyPredictor`, which this layer must not import


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """The source of weights: a file, else torchvision's, else the fixed seed; for the user's own network its own."""

    file: Path | None = None
    pretrained: bool = False


SEEDED = WeightsSource()


class Side(Enum):
    """The side of a cut on which a partition runs."""

    EDGE = "edge"
    CLOUD = "cloud"


@dataclass(frozen=True, slots=True, eq=False)
class NetworkRef:
    """The description of a network on which both sides must agree; it holds no parameters."""

    name: str  # canonical, see `Engine.canonical_name`
    graph: LayerGraph
    weights_digest: str  # `models.weights.weights_digest` of the weights as given: the same for every engine
    is_seeded: bool  # the weights are those of the fixed seed, which are untrained
    labels: Sequence[str] | None = None  # of the classes in its output; None: unknown


class PartitionResult(NamedTuple):
    """The outputs of a partition, and the computing time on this machine, ms."""

    arrays: tuple[Array, ...]
    compute_ms: float


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
        """Its inputs as the edge sends them; an image as pixels, uint8.

        Those of the edge partition are the network's inputs. Those of the cloud partition are the boundary tensors, in
        the order of `LayerGraph.boundary`.
        """

    @property
    def value_inputs(self) -> tuple[TensorSpec, ...]:
        """The same inputs with an image as scaled and normalised values, float32, which `run` accepts, too."""

    @property
    def device(self) -> str:
        """The device that it runs on: "cpu" or "cuda"."""

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters and buffers."""

    @property
    def can_batch(self) -> bool:
        """Whether tasks joined along the first dimension give the same outputs.

        May block at its first use, which may run the partition; called on a thread that runs partitions.
        """

    def run(self, arrays: Sequence[Array], keep_going: Callable[[], bool] | None = None) -> PartitionResult | None:
        """Return the outputs, or None if the partition was stopped. Blocks until they are in host memory.

        The outputs of the edge partition are the boundary tensors, in the order of `LayerGraph.boundary`, and then the
        outputs of the network that it makes; those of the cloud partition are the other outputs of the network
        (`LayerGraph.outputs_on`).

        Args: arrays: its inputs, or for a batch several of each, joined along the first dimension.
              keep_going: called on this thread between blocks of layers, best every 100 ms or more often. Once it has
                          returned False, `run` must return None. An engine that cannot stop never calls it.
        """


class Verdict(NamedTuple):
    """The difference of outputs from those of the user's own module."""

    max_abs_diff: float
    relative: float  # to the largest value
    is_equal: bool  # within the tolerance, or what the module itself moves if its input does by a millionth


class Network(Protocol):
    """A network with its weights in memory. It is freed with its last reference; its partitions share its weights."""

    @property
    def ref(self) -> NetworkRef:
        """Its description, which does not keep the weights in memory."""

    def partition(self, edge_nodes: frozenset[int], side: Side) -> Partition:
        """Return a new partition, which shares the weights. The caller keeps it, to make each one once.

        Args:   edge_nodes: indices of the nodes on the edge; node 0, the input, is always among them.
        Raises: PartitionError: these nodes are no cut.
        """

    def verify(self, arrays: Sequence[Array], outputs: Sequence[Array]) -> Verdict:
        """Compare outputs with those of the user's own module, unsplit and not optimised, for these inputs. Blocks.

        An image may be pixels or values. Raises: WeightsError: the weights file has changed.
        """

    def measure(self) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        """Return the measured latency of each layer of the graph, ms: medians, and the ends of the middle 90 %.

        Measured with the threads of the calling thread. May block for seconds.
        """


class Engine(Protocol):
    """Opens networks by name and runs them on one device.

    Its class takes a catalogue of networks (`models.names.Catalogue`) and a device. Raises: DeviceError.
    """

    @property
    def device(self) -> str:
        """The device: "cpu" or "cuda"."""

    @property
    def threads(self) -> int:
        """CPU threads with which the calling thread computes."""

    def use_threads(self, threads: int) -> int:
        """Let the calling thread compute with ``threads`` CPU threads, at most one for each core; return how many."""

    def canonical_name(self, name: str) -> str:
        """Return the canonical name of a network. Does not build it: a peer may send any name.

        Raises: UnknownModelError: no such network. UsageError: the name is ambiguous, or has a senseless size.
        """

    def graph(self, name: str) -> LayerGraph:
        """Return the graph of a network: the same for every engine, since both sides compare its digest.

        Traced at the first call, which may block for seconds; during it the caller runs no partition on any thread.

        Raises: UnknownModelError, TraceError, InputSizeError.
        """

    def preparation(self, name: str) -> Callable[[Any], Any] | None:
        """Return the user's own preprocessing of an image (Pillow's), which returns the inputs; None without any."""

    def example(self, name: str) -> tuple[Array, ...]:
        """Return the inputs of a task that has none: those of the user's example, or noise; the same on every run.

        An image is pixels, uint8. Raises: as `graph`.
        """

    def has_graph(self, name: str) -> bool:
        """Return whether `graph` would return at once."""

    def open(self, name: str, weights: WeightsSource = SEEDED) -> Network:
        """Return a network with its weights in memory. May block for seconds.

        Raises: WeightsError: unreadable, or not of this network. UnknownModelError, TraceError, InputSizeError.
        """

    def scale(self, predictor: Predictor, threads: int) -> Predictor:
        """Return a latency predictor scaled to the speed of this machine with ``threads`` CPU threads.

        The speed is measured once and kept, so the first call may block for seconds.
        """

    def has_speed(self, threads: int) -> bool:
        """Return whether `scale` would return at once."""

    def check_speed(self, measured_to_predicted: float, threads: int) -> None:
        """Measure the speed of this machine again at the next start, if warm tasks contradict the predictions.

        Args: measured_to_predicted: the ratio of the computing times of recent tasks.
        """


def find_engine(name: str = "torch") -> Callable[..., Engine]:
    """Return the class of an engine, ``ENGINE`` of its module. Imports the engine's library, which takes seconds."""
    engine: Callable[..., Engine] = importlib.import_module(f"neurosurgeon.engine.{name}_engine").ENGINE
    return engine
