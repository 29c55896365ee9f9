"""The engine that runs networks with PyTorch, eagerly."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from neurosurgeon.engine.base import SEEDED, NetworkRef, PartitionResult, Predictor, Side, Verdict, WeightsSource
from neurosurgeon.engine.self_check import check, check_key, is_checked, keep_checked, observe, run_whole, verify
from neurosurgeon.graph.spec import Array, TensorSpec, as_floats, synthetic_input, takes_images
from neurosurgeon.models.build import TracedGraph, fold_batch_norms, trace
from neurosurgeon.models.digest import stable_text
from neurosurgeon.models.names import Catalogue, is_own, preprocessing_of
from neurosurgeon.models.own_models import PREPARE
from neurosurgeon.models.partition import PartitionModule, Shared, partition_module
from neurosurgeon.models.preprocess import as_array, as_tensor, as_values, synchronise, use_channels_last
from neurosurgeon.models.torchvision_compat import imagenet_labels
from neurosurgeon.models.weights import load_weights, weights_digest
from neurosurgeon.predictor.machine_speed import (
    DISAGREEMENT,
    doubt_machine_speed,
    kept_machine_speed,
    scaled_to_machine,
)
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from neurosurgeon.predictor.profile import measured_latencies
from neurosurgeon.utils.errors import DeviceError, MismatchError
from neurosurgeon.utils.timing import now_ms

log = logging.getLogger(__name__)

ORDERS = ("channels-last", "contiguous")  # of tensors in memory, as tried
MAX_GRAPHS = 256  # kept; a peer can request every network in every size
BATCH_SEED = 0
BATCH_TOLERANCE = 1e-3  # of the largest output: sums in another order differ by less, another image by more


def check_device(device: str) -> None:
    """Check that this machine has a device. Raises: DeviceError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("this machine has no CUDA device that torch can use: run with -d cpu")


def use_threads(threads: int) -> int:
    """Let the calling thread compute with ``threads`` CPU threads, at most one for each core; return how many."""
    cores = os.cpu_count() or 1
    if threads > cores:
        log.warning("%d threads requested, but there are %d cores: using %d", threads, cores, cores)
    torch.set_num_threads(min(threads, cores))
    return min(threads, cores)


# ---------------------------------------------------------------- networks and partitions


@dataclass(frozen=True, eq=False)
class TorchPartition:
    """A partition as a module; see `engine.base.Partition`."""

    network: NetworkRef
    edge_nodes: frozenset[int]
    inputs: tuple[TensorSpec, ...]
    value_inputs: tuple[TensorSpec, ...]
    module: PartitionModule
    device: str

    def run(self, arrays: Sequence[Array], keep_going: Callable[[], bool] | None = None) -> PartitionResult | None:
        """See `engine.base.Partition`. The time includes pixels to values, and copies to and from a GPU."""
        start_ms = now_ms()
        run = self.module if keep_going is None else partial(self.module, keep_going=keep_going)
        with torch.inference_mode():
            outputs = run(*(as_tensor(array).to(self.device) for array in arrays))
        if outputs is None:
            return None
        result = tuple(map(as_array, outputs))
        synchronise(self.device)
        return PartitionResult(result, now_ms() - start_ms)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters and buffers; shared ones count once."""
        tensors = {id(tensor): tensor for tensor in (*self.module.parameters(), *self.module.buffers())}
        return sum(tensor.nbytes for tensor in tensors.values())

    @cached_property
    def can_batch(self) -> bool:
        """Whether two random tasks, joined, give the same outputs: a network may mix the images of a batch."""
        if not all(spec.shape[:1] == (1,) and spec.dtype in ("float32", "float16") for spec in self.value_inputs):
            return False
        random = np.random.default_rng(BATCH_SEED)
        tasks = [
            [random.standard_normal(spec.shape, np.float32).astype(spec.dtype) for spec in self.value_inputs]
            for _ in range(2)
        ]
        try:
            joined = self._outputs([np.concatenate(pair) for pair in zip(*tasks, strict=True)])
            apart = [self._outputs([array.copy() for array in task]) for task in tasks]
            expected = [np.concatenate(pair) for pair in zip(*apart, strict=True)]
            scales = [BATCH_TOLERANCE * float(abs(array).max()) for array in expected]
        except Exception as exc:  # a network may refuse a batch in any way
            log.debug("no batches for this partition: %s", exc)
            return False
        return all(
            one.shape == other.shape
            and other.dtype.kind != "b"  # a sum in another order might flip it
            and np.allclose(one, other, rtol=0.0, atol=scale, equal_nan=True)
            for one, other, scale in zip(joined, expected, scales, strict=True)
        )

    def _outputs(self, arrays: Sequence[Array]) -> list[Array]:
        result = self.run(arrays)
        return [as_floats(array) for array in result.arrays] if result else []


@dataclass(frozen=True, eq=False)
class TorchNetwork:
    """A network optimised for inference on one device; see `engine.base.Network`."""

    ref: NetworkRef
    graph: TracedGraph
    module: nn.Module
    device: str
    build: Callable[[], nn.Module]  # returns the user's own module with its weights, not optimised
    shared: Shared = field(default_factory=Shared)

    def partition(self, edge_nodes: frozenset[int], side: Side) -> TorchPartition:
        """See `engine.base.Network`. Beside the shared weights, a partition takes 0.1 KB of code for each node."""
        module = partition_module(self.module, self.graph, edge_nodes, side, self.shared)
        nodes = self.graph.boundary(edge_nodes) if side is Side.CLOUD else self.graph.nodes[:1]
        inputs = tuple(sent for node in nodes for sent in node.sent)
        values = tuple(output for node in nodes for output in node.outputs)
        gc.collect(1)  # a partition's program is a cycle of references, cheap to collect while it is young
        return TorchPartition(self.ref, edge_nodes, inputs, values, module, self.device)

    def verify(self, arrays: Sequence[Array], outputs: Sequence[Array]) -> Verdict:
        """See `engine.base.Network`."""
        return verify(self, self.tensors_of(arrays), outputs)

    def tensors_of(self, arrays: Sequence[Array]) -> list[Tensor]:
        """Return inputs as the user's module reads them: images as values, contiguous."""
        specs = self.graph.inputs
        tensors = [as_tensor(array.copy("K")) for array in arrays]
        pairs = zip(tensors, specs, strict=True)
        mean, std = self.graph.preprocessing.mean, self.graph.preprocessing.std
        return [as_values(tensor, mean, std).contiguous() if takes_images(spec) else tensor for tensor, spec in pairs]

    def run_whole(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Return the outputs of the user's own module, which runs eagerly on the CPU."""
        return run_whole(self.build(), self.graph, self.tensors_of(arrays))

    def measure(self) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
        """See `engine.base.Network`. The times are kept for a network of the same shapes."""
        known = measured_latencies(self)
        return known.latency_ms, known.low_ms, known.high_ms


class TorchEngine:
    """The networks of a catalogue on one device; see `engine.base.Engine`.

    Raises: DeviceError: the machine has no such device.
    """

    def __init__(self, catalogue: Catalogue | None = None, device: str = "cpu") -> None:
        check_device(device)
        self._catalogue = catalogue or Catalogue()
        self.device = device
        self._graphs: OrderedDict[str, TracedGraph] = (
            OrderedDict()
        )  # guarded by _tracing; the least recently used is first
        self._tracing = threading.RLock()

    @property
    def threads(self) -> int:
        """See `engine.base.Engine`."""
        return torch.get_num_threads()

    use_threads = staticmethod(use_threads)

    def canonical_name(self, name: str) -> str:
        """See `engine.base.Engine`."""
        return self._catalogue.canonical_name(name)

    def has_graph(self, name: str) -> bool:
        """See `engine.base.Engine`."""
        return self._catalogue.canonical_name(name) in self._graphs

    def graph(self, name: str) -> TracedGraph:
        """See `engine.base.Engine`. torch.fx replaces methods of all modules while it traces."""
        name = self._catalogue.canonical_name(name)
        with self._tracing:
            if name not in self._graphs:
                module, example = self._catalogue.build_module(name).eval(), self._catalogue.example(name)
                scaling = preprocessing_of(name, module)
                self._graphs[name] = trace(module, name, example, is_own=is_own(name), preprocessing=scaling)
            self._graphs.move_to_end(name)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            return self._graphs[name]

    def example(self, name: str) -> tuple[Array, ...]:
        """See `engine.base.Engine`."""
        example = self._catalogue.example(self._catalogue.canonical_name(name))
        if example.is_image:
            return tuple(map(synthetic_input, self.graph(name).inputs))
        return tuple(as_array(tensor.clone()) for tensor in example.tensors)

    def preparation(self, name: str) -> Callable[[Any], Any] | None:
        """See `engine.base.Engine`."""
        return self._catalogue.own.helper(self._catalogue.canonical_name(name), PREPARE)

    def open(self, name: str, weights: WeightsSource = SEEDED) -> TorchNetwork:
        """See `engine.base.Engine`.

        Batch norms are folded and, on the CPU, tensors are channels-last: both measured faster for these models
        (``make bench``). The digest is taken from the weights as given, before folding. A network that was not opened
        before is compared with the user's module (`engine.self_check`); if it is equal only in its own memory order,
        it keeps that.
        """
        name = self._catalogue.canonical_name(name)
        graph = self.graph(name)
        module, knows_imagenet = self._load(name, weights)
        ref = NetworkRef(
            name,
            graph,
            weights_digest({**graph.attributes(module), **module.state_dict()}),
            weights == SEEDED and not is_own(name),
            imagenet_labels() if knows_imagenet else None,
        )

        def build() -> nn.Module:
            return self._load(name, weights)[0]

        source = self._catalogue.own.source(name) + stable_text(module)
        key = check_key(graph, ref.weights_digest, source, self.device)
        order = is_checked(key)
        if order is not None:
            return self._optimised(ref, graph, module, build, order)
        truth = observe(module, name, graph, self._catalogue.example(name))
        try:
            network = self._optimised(ref, graph, module, build, order := ORDERS[0])
            check(network, truth)
        except MismatchError as exc:
            log.info("%s is not equal with channels last: %s", name, exc)
            network = self._optimised(ref, graph, build(), build, order := ORDERS[1])
            check(network, truth)
        keep_checked(key, order)
        return network

    def _load(self, name: str, weights: WeightsSource) -> tuple[nn.Module, bool]:
        """Return the user's module with its weights, and whether they are torchvision's."""
        module = self._catalogue.build_module(name)
        knows_imagenet = load_weights(name, module, weights)
        module.requires_grad_(False)
        return module.eval(), knows_imagenet  # after loading: some networks merge weights in eval()

    def _optimised(
        self, ref: NetworkRef, graph: TracedGraph, module: nn.Module, build: Callable[[], nn.Module], order: str
    ) -> TorchNetwork:
        with torch.inference_mode():
            module = fold_batch_norms(module, graph).to(self.device)
        is_last = self.device == "cpu" and order == "channels-last"
        if is_last:
            use_channels_last(module)
        return TorchNetwork(ref, graph, module, self.device, build, Shared(channels_last=is_last))

    def scale(self, predictor: Predictor, threads: int) -> Predictor:
        """See `engine.base.Engine`."""
        return cast(Predictor, scaled_to_machine(cast(LatencyPredictor, predictor), self.device, threads))

    def has_speed(self, threads: int) -> bool:
        """See `engine.base.Engine`."""
        return kept_machine_speed(self.device, threads) is not None

    def check_speed(self, measured_to_predicted: float, threads: int) -> None:
        """See `engine.base.Engine`."""
        if not 1 / DISAGREEMENT <= measured_to_predicted <= DISAGREEMENT:
            doubt_machine_speed(self.device, threads)


ENGINE = TorchEngine
