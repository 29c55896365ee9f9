"""The cloud's engine: networks kept warm, and workers that run cloud halves in a bounded order fair to every edge."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from neurosurgeon.cloud.scheduler import FairQueue, QueueFullError
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.engine.torch_engine import WireSpec, allows_batches, check_device, run_half, use_threads
from neurosurgeon.graph.cut import check_graph_digest, unpack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.zoo import MAX_CUTS, ZOO, Cut, Network, build_network, canonical_name, model_graph
from neurosurgeon.utils.errors import (
    BusyError,
    NeurosurgeonError,
    ProtocolError,
    UnknownModelError,
    UsageError,
    WeightsError,
)
from neurosurgeon.utils.load import Load, LoadMeter
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.metrics import Metrics
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0  # a running half of a large network on a small machine
CLIENT_SHARE = 16  # tasks of one edge that may wait: enough to keep a worker busy over any link, a quarter of all
MIN_RETRY_MS = 5.0  # a busy cloud is not asked again at once
# A batch of four lets a CPU do 1.0 to 2.9 times as many tasks (tests/benchmark/batching.py), but its answers differ
# from single ones in the last bits: on a CPU, where both sides make the same bits otherwise, it must be asked for.
MAX_BATCH = {"cpu": 1, "cuda": 8}
MAX_GRAPHS = 64  # of networks that peers ask for, in whatever size; beyond, the oldest is traced anew

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much the engine does at once, and keeps."""

    workers: int = 1
    max_batch: int | None = None  # tasks that run as one; None: what suits the device
    batch_wait_ms: float = 0.0  # how long a task waits for others to run with; 0: only for those that already wait
    max_models: int = 16
    max_queue: int = 64  # tasks that wait, of all edges
    models: tuple[str, ...] | None = None  # that are served; None: every network there is


class CutRequest(Hashable, Protocol):
    """What an edge says of the cut that it wants the cloud half of."""

    @property
    def model(self) -> str:
        """The network's name."""

    @property
    def edge_nodes(self) -> bytes:
        """The bit mask of the nodes on the edge (`graph.cut`)."""

    @property
    def graph_digest(self) -> str:
        """What tells the edge's graph from others."""

    @property
    def weights_digest(self) -> str:
        """What tells the edge's weights from others."""


class CloudResult(NamedTuple):
    """What the engine made of a task, and what it took.

    ``compute_ms`` is the time that the computation really took; tasks of one batch shared it, and each tells all of it.
    """

    tensors: tuple[Tensor, ...]
    compute_ms: float
    queue_ms: float

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum([tensor.nbytes for tensor in self.tensors])

    def copy(self) -> CloudResult:
        """Return the result with tensors in memory of their own."""
        return self._replace(tensors=tuple([tensor.clone() for tensor in self.tensors]))


class _HalfTask(NamedTuple):
    """One cloud half to run; those of one network and cut may run as one batch."""

    cut: Cut  # one object for each network and cut
    tensors: Sequence[Tensor]
    future: Future[CloudResult]
    asked_ms: float


class _Job(NamedTuple):
    """Any other work that needs a worker for itself."""

    run: Callable[[], Any]
    future: Future[Any]


class CloudEngine:
    """Runs cloud halves on few workers, by default one: each half has the whole machine, and its latency is true.

    All computing happens on the workers. OpenMP keeps a team of threads for every thread that computes; with more
    teams than cores it makes them sleep at each barrier, and small networks take twice as long (MobileNetV2 on two
    cores: 20 ms in place of 10). So a network is loaded on a thread that ends, and its team with it, and several
    workers share the CPU threads among them.
    """

    def __init__(
        self,
        device: str,
        threads: int,
        weights: Mapping[str, WeightsSource],
        limits: EngineLimits = EngineLimits(),
        metrics: Metrics | None = None,
    ) -> None:
        check_device(device)
        self.metrics = metrics or Metrics()
        # Traced now: later, tracing interrupts what runs.
        self._graphs = {name: model_graph(name) for name in limits.models or ZOO}
        self._own_graphs = len(self._graphs)  # the others are those that peers ask for, in any size
        self._tracing = threading.Lock()
        self.device = device
        self.threads = max(1, use_threads(threads) // limits.workers)  # of a worker
        self._limits = limits
        self._max_batch = limits.max_batch or MAX_BATCH[device]
        self._networks = _WarmNetworks(device, weights, limits.max_models)
        self._lock = threading.Lock()  # of those below, down to the queue
        self._quiet = threading.Condition(self._lock)  # told when the last task ends for one who traces
        self._is_tracing = False
        self._running = 0  # tasks and jobs
        self._is_batchable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by cloud half
        self._queue: FairQueue[_HalfTask | _Job] = FairQueue(limits.max_queue, min(CLIENT_SHARE, limits.max_queue))
        self._meter = LoadMeter()
        self._closed = False
        self._wake: SimpleQueue[None] = SimpleQueue()  # one for each that was queued; waiting here is C, and quick
        self._workers = [
            threading.Thread(target=self._work, name=f"compute {number}", daemon=True)
            for number in range(limits.workers)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def load(self) -> Load:
        """What tasks waited and took of late."""
        with self._lock:
            return self._meter.load(now_ms())

    def network(self, name: str) -> Network:
        """Return a network, loaded where it is not warm.

        Raises: UnknownModelError, WeightsError.
        """
        name = self._served(name)
        self._graph(name)
        return self._networks.get(name)

    def graph(self, name: str, digest: str) -> LayerGraph:
        """Return the graph of a network, which must be the one that an edge has.

        Raises: UnknownModelError; GraphError: the edge has another one.
        """
        graph = self._graph(self._served(name))
        check_graph_digest(graph, digest)
        return graph

    def _served(self, name: str) -> str:
        """Return the one name of a network that is served here; what a peer names is not built before."""
        models = self._limits.models
        if models is None:
            return canonical_name(name)
        with suppress(UsageError):
            if (known := canonical_name(name)) in models:
                return known
        raise UnknownModelError(f"this cloud does not serve {name[:64]!r}: choose from {', '.join(models)}")

    def _graph(self, name: str) -> LayerGraph:
        """Return a graph; it is traced while no task runs, because tracing patches modules for the whole process."""
        if known := self._graphs.get(name):
            return known
        with self._tracing:
            with self._quiet:
                self._is_tracing = True
                self._quiet.wait_for(lambda: not self._running)
            try:
                graph = model_graph(name)
                if len(self._graphs) >= self._own_graphs + MAX_GRAPHS:
                    del self._graphs[next(islice(self._graphs, self._own_graphs, None))]
                self._graphs[name] = graph
            finally:
                self._is_tracing = False
                for _ in self._workers:
                    self._wake.put(None)
        return graph

    def cut(self, request: CutRequest, given: tuple[WireSpec, ...]) -> Cut:
        """Return the halves that an edge asks for, their network loaded where it is not warm.

        Args:   given: dtype, shape and memory format of the tensors that come with the request.
        Raises: UnknownModelError, GraphError, WeightsError, PartitionError; ProtocolError: other tensors cross there.
        """
        edge_nodes = self._networks.asked(request.model).get((request, given))
        if edge_nodes is not None:
            return self._networks.get(request.model).split(edge_nodes)
        edge_nodes = unpack_nodes(self.graph(request.model, request.graph_digest), request.edge_nodes)
        network = self.network(request.model)
        if request.weights_digest != network.weights_digest:
            raise WeightsError(
                f"{request.model} has the weights {network.weights_digest} here, not {request.weights_digest}"
            )
        cut = network.split(edge_nodes)
        crossing, values = ([(spec.dtype, spec.shape) for spec in specs] for specs in (cut.crossing, cut.values))
        sent = [(dtype, shape) for dtype, shape, _ in given]
        if sent not in (crossing, values):
            raise ProtocolError(f"{crossing} crosses at this point, not {sent}")
        asked = self._networks.asked(request.model)
        if len(asked) >= MAX_CUTS:  # what is forgotten is checked again
            asked.clear()
        asked[request, given] = edge_nodes
        return cut

    def submit(self, client: Hashable, cut: Cut, tensors: Sequence[Tensor]) -> Future[CloudResult]:
        """Queue the cloud half of a cut on the tensors that crossed, and return the future result.

        Its callbacks run on the worker, which they must not block, or on the thread that calls `drop`. The result
        shares no memory with ``tensors``.

        Args:   client: whose turn it takes.
        Raises: BusyError.
        """
        future: Future[CloudResult] = Future()
        self._put(client, _HalfTask(cut, tensors, future, now_ms()))
        return future

    def submit_job(self, job: Callable[[], Answer], client: Hashable = None) -> Future[Answer]:
        """Queue a job that needs a worker for itself, and return its future result.

        Raises: BusyError.
        """
        future: Future[Answer] = Future()
        self._put(client, _Job(job, future))
        return future

    def drop(self, client: Hashable) -> int:
        """Cancel what a client that left has waiting; return how much it was. What runs goes on."""
        with self._lock:
            dropped = self._queue.drop(client)
        for item in dropped:
            item.future.cancel()
        return len(dropped)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Finish what is queued, within ``timeout_s``, and end the workers."""
        with self._lock:
            self._closed = True
        deadline_ms = now_ms() + timeout_s * MS_PER_S
        for _ in self._workers:
            self._wake.put(None)
        for worker in self._workers:
            worker.join(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))

    def _put(self, client: Hashable, item: _HalfTask | _Job) -> None:
        with self._lock:
            if self._closed:
                raise NeurosurgeonError("the cloud is stopping: it takes no more tasks")
            try:
                self._queue.put(client, item)
            except QueueFullError as exc:
                raise BusyError(f"the cloud is busy: {exc}", self._retry_ms()) from exc
        self._wake.put(None)

    def _retry_ms(self) -> float:
        service_ms = self._meter.load(now_ms()).service_ms
        return max(MIN_RETRY_MS, len(self._queue) * service_ms / self._limits.workers)

    # ---------------------------------------------------------------- the workers

    def _work(self) -> None:
        use_threads(self.threads)
        while True:
            with self._lock:
                item = None if self._is_tracing else self._queue.take()
                self._running += item is not None
                is_over = self._closed and not self._is_tracing
            if item is not None:
                try:
                    self._run(item)
                except Exception as exc:
                    internal_error(log, exc, f"{threading.current_thread().name}: the work behind an answer failed")
                self._ended()
            elif is_over:
                return
            else:
                self._wake.get()

    def _ended(self) -> None:
        with self._lock:
            self._running -= 1
            if self._is_tracing and not self._running:
                self._quiet.notify_all()

    def _run(self, item: _HalfTask | _Job) -> None:
        if isinstance(item, _Job):
            try:
                item.future.set_result(item.run())
            except Exception as exc:
                item.future.set_exception(exc)
            return
        batch = [item]
        results: Sequence[CloudResult | Exception]
        try:
            if self._max_batch > 1 and self._batches(item.cut):
                batch += self._companions(item)
            results = self._computed(batch)
        except Exception as exc:  # a defect of the engine: the tasks must not be waited for
            results = [exc] * len(batch)
        for task, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                task.future.set_exception(result)
            else:
                task.future.set_result(result)
        self.metrics.batch(len(batch))

    def _computed(self, batch: Sequence[_HalfTask]) -> list[CloudResult | Exception]:
        """Run a batch, and keep count of what its tasks waited and took."""
        with self._lock:
            self._meter.started(len(batch))
        start_ms = now_ms()
        results = run_batch(batch, self.device, start_ms)
        end_ms = now_ms()
        with self._lock:  # before the answers, which tell the load
            for task in batch:
                self._meter.ended(start_ms - task.asked_ms, end_ms - start_ms, end_ms)
        return results

    def _batches(self, cut: Cut) -> bool:
        """Return whether tasks of a cut may run as one; tried out when the first one comes."""
        known = self._is_batchable.get(cut.cloud)
        if known is None:
            known = self._is_batchable[cut.cloud] = allows_batches(cut.cloud, cut.values, self.device)
        return known

    def _companions(self, first: _HalfTask) -> list[_HalfTask]:
        """Return those that run with a task; wait for them no longer than allowed, nor once another kind has come."""

        def is_alike(item: _HalfTask | _Job) -> bool:
            return isinstance(item, _HalfTask) and item.cut is first.cut and _types_of(item) == _types_of(first)

        room = self._max_batch - 1
        found: list[_HalfTask | _Job] = []
        deadline_ms = now_ms() + self._limits.batch_wait_ms
        while True:
            with self._lock:
                found += self._queue.take_alike(is_alike, room - len(found))
                is_over = len(found) == room or len(self._queue) > 0 or self._closed
            wait_s = (deadline_ms - now_ms()) / MS_PER_S
            if is_over or wait_s <= 0:
                break
            with suppress(Empty):
                self._wake.get(timeout=wait_s)
        self._wake.put(None)  # one that was used up here may have been meant for another worker
        return [task for task in found if isinstance(task, _HalfTask)]


def _types_of(task: _HalfTask) -> list[torch.dtype]:
    """Return the types of a task's tensors: an image comes as pixels or as values."""
    return [tensor.dtype for tensor in task.tensors]


def run_batch(tasks: Sequence[_HalfTask], device: str, start_ms: float) -> list[CloudResult | Exception]:
    """Run halves of one network and cut as one, and return each one's part, or what went wrong.

    A batch that fails is run one by one: it may be too large, and no task pays for another.
    """
    half, waits_ms = tasks[0].cut.cloud, [start_ms - task.asked_ms for task in tasks]
    try:
        if len(tasks) == 1:
            result = run_half(half, tasks[0].tensors, device)
            given = {tensor.untyped_storage().data_ptr() for tensor in tasks[0].tensors}
            tensors = tuple([t.clone() if t.untyped_storage().data_ptr() in given else t for t in result.tensors])
            return [CloudResult(tensors, result.latency_ms, waits_ms[0])]
        inputs = [torch.cat(alike) for alike in zip(*(task.tensors for task in tasks), strict=True)]
        result = run_half(half, inputs, device)
        parts = zip(*(output.chunk(len(tasks)) for output in result.tensors), strict=True)
        return [CloudResult(part, result.latency_ms, wait_ms) for part, wait_ms in zip(parts, waits_ms, strict=True)]
    except Exception as exc:  # belongs to whoever asked, not to the worker
        if len(tasks) == 1:
            return [exc]
        return [single for task in tasks for single in run_batch([task], device, start_ms)]


class _WarmNetworks:
    """Networks ready to run, at most ``max_models``; the one that was not used for longest goes."""

    def __init__(self, device: str, weights: Mapping[str, WeightsSource], max_models: int) -> None:
        self._device = device
        self._weights = weights
        self._max_models = max_models
        self._networks: OrderedDict[str, Network] = OrderedDict()  # the last used is last
        self._asked: dict[str, dict[Hashable, frozenset[int]]] = {}  # by network; the network itself keeps its cuts
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one at a time: loading takes all the memory that it can get

    def get(self, name: str) -> Network:
        """Return a network; one that is running lives on, whatever is loaded meanwhile."""
        network = self._warm(name)
        if network:
            return network
        with self._loading:
            return self._warm(name) or self._load(name)

    def asked(self, name: str) -> dict[Hashable, frozenset[int]]:
        """Return the nodes on the edge by requests that were checked, to look up and add to; kept of a warm network."""
        with self._lock:
            if name not in self._networks:
                return {}
            self._networks.move_to_end(name)
            return self._asked.setdefault(name, {})

    def _warm(self, name: str) -> Network | None:
        with self._lock:
            if name in self._networks:
                self._networks.move_to_end(name)
            return self._networks.get(name)

    def _load(self, name: str) -> Network:
        with ThreadPoolExecutor(1, "load") as loader:
            source = self._weights.get(name, WeightsSource())
            network = loader.submit(build_network, name, source, self._device).result()
        with self._lock:
            self._networks[name] = network
            while len(self._networks) > self._max_models:
                gone, _ = self._networks.popitem(last=False)
                self._asked.pop(gone, None)
        return network
