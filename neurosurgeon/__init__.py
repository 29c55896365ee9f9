"""Split inference between an edge device and a cloud.

    import neurosurgeon as ns

    ns.plan("mobile_net", rate_mb_per_s=1.25, rtt_ms=20).best
    with ns.Cloud() as cloud, ns.Edge(port=cloud.port, monitor_port=cloud.monitor_port) as edge:
        print(edge.run("mobile_net", "photo.jpg").guesses)

A model is a name (`alex_net`, or any classification network of torchvision). To plan only, it may also be a
`torch.nn.Module`, or a `LayerGraph`. Errors are those of `neurosurgeon.utils.errors`. Importing this package imports
neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

from neurosurgeon.utils.machine import set_waiting_policy
from neurosurgeon.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn

    from neurosurgeon.edge.outcome import Outcome
    from neurosurgeon.edge.records import QueuedTask, QueueEvent, TaskDone, TaskEvent
    from neurosurgeon.engine.base import Engine
    from neurosurgeon.graph.layer_graph import LayerGraph
    from neurosurgeon.net.access import Access
    from neurosurgeon.planner.compare import ComparisonRow
    from neurosurgeon.planner.plan import SplitPlan
    from neurosurgeon.planner.strategies import Strategy
    from neurosurgeon.predictor.latencies import LayerLatencies

    Model = str | nn.Module | LayerGraph

__all__ = ["Cloud", "Edge", "compare", "latencies", "layer_graph", "plan"]

set_waiting_policy()  # before any module of this project imports torch

IMAGE_SHAPE = (1, 3, 224, 224)


def layer_graph(model: Model, *, input_shape: Sequence[int] | None = None) -> LayerGraph:
    """Return a model as a graph of plain numbers: layers, shapes, bytes and FLOPs.

    Args:   model: a name, a module (the graph has the name of its class), or a graph, which is returned unchanged.
            input_shape: the shape of a module's input (default: one image, 1 x 3 x 224 x 224). A name has its own.
    Raises: UnknownModelError. TraceError: the control flow of the module depends on its data.
    """
    from neurosurgeon.graph.layer_graph import LayerGraph

    if isinstance(model, LayerGraph):
        return model
    if isinstance(model, str):
        from neurosurgeon.engine.torch_engine import TorchEngine

        return TorchEngine().graph(model)
    from neurosurgeon.models.build import trace

    return trace(model, type(model).__name__, tuple(input_shape or IMAGE_SHAPE))


def plan(
    model: Model,
    *,
    rate_mb_per_s: float,
    rtt_ms: float = 0.0,
    edge: LayerLatencies | None = None,
    cloud: LayerLatencies | None = None,
    objective: str = "latency",
    strategy: str = "dads",
    max_edge_memory_mb: float | None = None,
) -> SplitPlan:
    """Return every candidate cut of a model on a link, with predicted stages in ms, and the best of them.

    Without `edge` and `cloud`, it may block for seconds: the shipped data is scaled to this machine, whose speed is
    measured once a week.

    Args:   rate_mb_per_s: the rate of the uplink, 10^6 bytes/s. rtt_ms: the round trip.
            edge, cloud: latencies of the layers on each side, ms (default: `latencies` of this machine).
            objective: "latency" of one task, or "throughput".
            strategy: "dads", "neurosurgeon", "chain-of-blocks", "edge-only" or "cloud-only".
            max_edge_memory_mb: memory limit of the edge partition, 10^6 bytes (default: none).
    Raises: PlanningError: no cut fits into that memory. UnknownModelError, TraceError.
    """
    from neurosurgeon.planner.chain_search import Objective
    from neurosurgeon.planner.plan import plan_split
    from neurosurgeon.planner.strategies import Strategy
    from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s, mb_to_bytes

    known = layer_graph(model)
    return plan_split(
        known,
        edge or latencies(known, "edge"),
        cloud or latencies(known, "cloud"),
        mb_per_s_to_bytes_per_s(rate_mb_per_s),
        rtt_ms,
        objective=Objective(objective),
        strategy=Strategy(strategy),
        max_edge_bytes=mb_to_bytes(max_edge_memory_mb) if max_edge_memory_mb else float("inf"),
    )


def latencies(model: Model, side: str, *, predictor: str = "forest", config: Path | None = None) -> LayerLatencies:
    """Return the predicted latency of each layer of a model on one side, in ms.

    Args:   side: "edge" or "cloud". predictor: "forest" or "linear".
            config: a parameter file, or a directory of data sets, used unscaled (default: the data for this machine,
            scaled to its speed, which may be measured for seconds).
    Raises: DataSetError: the data is missing or malformed.
    """
    import os

    from neurosurgeon.predictor.machine_speed import scaled_to_machine
    from neurosurgeon.predictor.store import find_predictor

    found = find_predictor(side, name=predictor, path=config)
    if config is None:
        found = scaled_to_machine(found, "cpu", min(found.threads, os.cpu_count() or 1))
    return found.predict(layer_graph(model))


def compare(
    models: Iterable[Model],
    rates_mb_per_s: Sequence[float],
    *,
    rtt_ms: float = 0.0,
    strategies: Iterable[str] | None = None,
) -> list[ComparisonRow]:
    """Return the best cut of every strategy for every model at every rate: one row each, if a cut fits.

    Args:   rates_mb_per_s: rates of the uplink, 10^6 bytes/s. rtt_ms: the round trip.
            strategies: names, as for `plan` (default: all).
    Raises: PlanningError, UnknownModelError, TraceError.
    """
    from functools import partial

    from neurosurgeon.planner.compare import Comparison, plans_of_all
    from neurosurgeon.planner.strategies import Strategy
    from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s

    wanted = [Strategy(name) for name in strategies or Strategy]
    rates = [mb_per_s_to_bytes_per_s(rate) for rate in rates_mb_per_s]
    rows: list[ComparisonRow] = []
    for model in models:
        known = layer_graph(model)
        plan_at = partial(_plan_at, known, latencies(known, "edge"), latencies(known, "cloud"), rtt_ms)
        rows += Comparison(known, rates, plans_of_all(plan_at, rates, wanted), ()).rows()
    return rows


def _plan_at(
    known: LayerGraph,
    edge: LayerLatencies,
    cloud: LayerLatencies,
    rtt_ms: float,
    rate_bytes_per_s: float,
    strategy: Strategy,
) -> SplitPlan:
    from neurosurgeon.planner.plan import plan_split

    return plan_split(known, edge, cloud, rate_bytes_per_s, rtt_ms, strategy=strategy)


class Cloud:
    """A cloud on this machine that ends with the `with` block.

    It is a child process, or, with models that are modules, threads of this process.

    Args:   models: the names that it serves (default: all), or modules by name. flags: more flags of `cloud_api.py`.
    Raises: NetworkError, when entered: it did not start.
    """

    def __init__(self, models: Iterable[str] | Mapping[str, nn.Module] = (), *, flags: Sequence[str] = ()) -> None:
        self._modules = models if isinstance(models, Mapping) else None
        names = list(models)
        self._flags = ["-p", "0", "--monitor-port", "0", *(["--models", *names] if names else []), *flags]
        self.port = 0  # of tasks; known inside the block
        self.monitor_port = 0  # of the bandwidth service
        self._exit = ExitStack()

    def __enter__(self) -> Cloud:
        if self._modules is not None:
            self._serve_here(self._modules)
            return self
        from neurosurgeon.cli.process import ServiceProcess

        command = ["-m", "neurosurgeon", "cloud", *self._flags]
        process = self._exit.enter_context(ServiceProcess(command, services=2))
        self.port, self.monitor_port = process.ports
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def _serve_here(self, modules: Mapping[str, nn.Module]) -> None:
        from neurosurgeon.cli.cloud import cloud_parser, make_service, running
        from neurosurgeon.cli.parser import access_of_cloud
        from neurosurgeon.models.names import Catalogue
        from neurosurgeon.net.sockets import bind

        args = cloud_parser("Cloud").parse_args(self._flags)
        access = access_of_cloud(args)
        listener = self._exit.enter_context(bind(args.ip, args.port, access))
        service = make_service(args, Catalogue(args.model_file, modules), lambda event, sock: None)
        monitor = self._exit.enter_context(running(args, service, listener, access))
        self.port, self.monitor_port = listener.getsockname()[1], monitor.ports[0]


class Edge:
    """This machine as the edge of a cloud. It keeps the graphs of its networks; each task loads its network anew.

    Each task or queue connects, learns about the link, plans and runs, as `edge_api.py` and `tasks_edge_api.py` do.

    Args: access: the key or TLS of the cloud (`neurosurgeon.net.access`). device: "cpu" or "cuda".
          threads: CPU threads to compute with (default: those that the data of the edge was measured with).
          models: modules of your own, by the names under which the cloud has them.
          model_files: Python files with functions that return modules, which the cloud has as well.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 9999,
        monitor_port: int = 9922,
        *,
        access: Access | None = None,
        device: str = "cpu",
        threads: int | None = None,
        models: Mapping[str, nn.Module] | None = None,
        model_files: Iterable[Path] = (),
    ) -> None:
        from neurosurgeon.edge.run import CloudAddress
        from neurosurgeon.net.access import Access

        self._cloud = CloudAddress(host, port, monitor_port, access or Access(cloud_name=host))
        self._device, self._threads = device, threads
        self._models, self._model_files = models, model_files

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: no connection exists after its task."""

    @cached_property
    def _engine(self) -> Engine:
        from neurosurgeon.engine.base import find_engine
        from neurosurgeon.models.names import Catalogue

        return find_engine()(Catalogue(self._model_files, self._models), self._device)

    def run(
        self,
        model: str,
        image: object = None,
        *,
        rate_mb_per_s: float | None = None,
        rtt_ms: float | None = None,
        observe: Callable[[TaskEvent], None] = lambda event: None,
        **settings: Any,
    ) -> Outcome:
        """Plan and run one task; return its output, its plan, and its times in ms. May block.

        Args:   image: a file, pixels (height, width, 3) uint8 of the network's size, or an array or tensor of its
                input's shape (default: a fixed image of noise).
                rate_mb_per_s, rtt_ms: rate of the uplink, 10^6 bytes/s, and round trip (default: measured).
                observe: called with each event of the task as it happens (`neurosurgeon.edge.records`).
                settings: other fields of `neurosurgeon.edge.settings.TaskSettings`, such as point, repeat or verify.
        Raises: NetworkError, UsageError, PlanningError, WeightsError.
        """
        from neurosurgeon.edge.run import LinkChoice, run_one_task
        from neurosurgeon.edge.settings import TaskSettings
        from neurosurgeon.engine.base import SEEDED

        task = self._task(1, model, image)
        defaults: dict[str, Any] = {"weights": SEEDED, "device": self._device, "threads": self._threads}
        chosen = TaskSettings(task.model, array=task.array, **(defaults | settings))
        return run_one_task(chosen, lambda: self._engine, self._cloud, LinkChoice(rate_mb_per_s, rtt_ms), observe)

    def run_queue(
        self,
        tasks: Iterable[tuple[str, object]],
        *,
        rate_mb_per_s: float | None = None,
        rtt_ms: float | None = None,
        **settings: Any,
    ) -> Iterator[TaskDone]:
        """Run a queue of tasks, many in flight; yield each result, with its output, as soon as it is there.

        Args:   tasks: models, each with its input as in `run`; None: a fixed image of noise.
                settings: fields of `neurosurgeon.edge.settings.QueueSettings`, such as objective or in_flight.
        Raises: NetworkError: the cloud cannot be reached. UsageError, PlanningError, WeightsError.
        """
        from neurosurgeon.edge.records import TaskDone
        from neurosurgeon.edge.run import LinkChoice, run_queue
        from neurosurgeon.edge.settings import QueueSettings

        queued = [self._task(number, model, image) for number, (model, image) in enumerate(tasks, start=1)]
        defaults: dict[str, Any] = {"weights": {}, "device": self._device, "threads": self._threads}
        chosen, choice = QueueSettings(**(defaults | settings)), LinkChoice(rate_mb_per_s, rtt_ms)
        events: SimpleQueue[QueueEvent | None] = SimpleQueue()
        is_left = Event()
        with ThreadPoolExecutor(1, "queue") as runner:
            running = runner.submit(
                run_queue, queued, chosen, lambda: self._engine, self._cloud, choice, events.put, is_left.is_set
            )
            running.add_done_callback(lambda _: events.put(None))
            try:
                while event := events.get():
                    if isinstance(event, TaskDone):
                        yield event
            finally:  # also if the caller wants no more results
                is_left.set()
            running.result()

    def _task(self, number: int, model: str, image: object) -> QueuedTask:
        from neurosurgeon.edge.inputs import network_input
        from neurosurgeon.edge.records import QueuedTask

        name = self._engine.canonical_name(model)
        return QueuedTask(
            number, name, array=None if image is None else network_input(image, self._engine.graph(name).input)
        )
