"""Split inference between an edge device and a cloud.

    import neurosurgeon as ns

    ns.plan("mobile_net", rate_mb_per_s=1.25, rtt_ms=20).best
    with ns.Cloud() as cloud, ns.Edge(port=cloud.port, monitor_port=cloud.monitor_port) as edge:
        print(edge.run("mobile_net", "photo.jpg").guesses)

A model is a name (`alex_net`, or any classification network of torchvision). To plan only, it may also be a
`torch.nn.Module`, or a `LayerGraph`. To run a module of your own, give it a name on both sides:
`Cloud({"mine": module})` and `Edge(models={"mine": module})`. Errors are those of `neurosurgeon.utils.errors`; an
unknown keyword is a TypeError. Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosurgeon.utils.arguments import check_numbers, one_of, settings_of
from neurosurgeon.utils.errors import NetworkError, UsageError
from neurosurgeon.utils.machine import set_waiting_policy
from neurosurgeon.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from torch import nn

    from neurosurgeon.edge.outcome import Outcome
    from neurosurgeon.edge.records import QueuedTask, TaskDone, TaskEvent
    from neurosurgeon.edge.run import QueueOutcome, StreamOutcome
    from neurosurgeon.engine.base import Engine
    from neurosurgeon.graph.layer_graph import LayerGraph
    from neurosurgeon.graph.spec import Array
    from neurosurgeon.models.names import Catalogue
    from neurosurgeon.net.access import Access
    from neurosurgeon.planner.compare import ComparisonRow
    from neurosurgeon.planner.plan import SplitPlan
    from neurosurgeon.planner.strategies import Strategy
    from neurosurgeon.predictor.latencies import LayerLatencies

    Model = str | nn.Module | LayerGraph

__all__ = ["Cloud", "Edge", "compare", "latencies", "layer_graph", "plan"]

set_waiting_policy()  # before any module of this project imports torch

IMAGE_SHAPE = (1, 3, 224, 224)


def layer_graph(model: Model, *, inputs: Any = None, input_shape: Sequence[int] | None = None) -> LayerGraph:
    """Return a model as a graph of plain numbers: layers, shapes, bytes and FLOPs.

    Args:   model: a name, a module (the graph has the name of its class), or a graph, which is returned unchanged.
            inputs: an example of a module's inputs: a tuple by position, a dict by name, or one tensor.
            input_shape: the shape of a module's input (default: one image, 1 x 3 x 224 x 224). A name or a graph has
            its own; another image size is part of the name, as in "le_net@64".
    Raises: UnknownModelError. InputSizeError: the module cannot take this shape. TraceError: its control flow depends
            on its data. UsageError: it is no model at all.
    """
    from neurosurgeon.graph.layer_graph import LayerGraph

    if isinstance(model, LayerGraph):
        return model
    if isinstance(model, str):
        from neurosurgeon.engine.torch_engine import TorchEngine

        return TorchEngine().graph(model)
    import torch
    from torch import nn

    from neurosurgeon.models.build import trace
    from neurosurgeon.models.program import Example

    if not isinstance(model, nn.Module):
        raise UsageError(f"model: expected a name, a torch.nn.Module or a LayerGraph, got {type(model).__name__}")
    if inputs is None:
        inputs = torch.randn(tuple(input_shape or IMAGE_SHAPE))
    return trace(copy.deepcopy(model).eval(), type(model).__name__, Example.of(inputs))


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
    Raises: PlanningError: no cut fits into that memory, or the latencies are those of another graph. UsageError: a name
            or a number is wrong. UnknownModelError, TraceError.
    """
    from neurosurgeon.planner.chain_search import Objective
    from neurosurgeon.planner.plan import plan_split
    from neurosurgeon.planner.strategies import Strategy
    from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s, mb_to_bytes

    check_numbers(rate_mb_per_s=rate_mb_per_s, rtt_ms=rtt_ms, max_edge_memory_mb=max_edge_memory_mb)
    known = layer_graph(model)
    return plan_split(
        known,
        edge or latencies(known, "edge"),
        cloud or latencies(known, "cloud"),
        mb_per_s_to_bytes_per_s(rate_mb_per_s),
        rtt_ms,
        objective=Objective(one_of(Objective, "objective", objective)),
        strategy=Strategy(one_of(Strategy, "strategy", strategy)),
        max_edge_bytes=float("inf") if max_edge_memory_mb is None else mb_to_bytes(max_edge_memory_mb),
    )


def latencies(
    model: Model, side: str, *, predictor: str = "forest", config: Path | str | None = None
) -> LayerLatencies:
    """Return the predicted latency of each layer of a model on one side, in ms.

    Args:   side: "edge" or "cloud". predictor: "forest" or "linear".
            config: a parameter file, or a directory of data sets, used unscaled (default: the data for this machine,
            scaled to its speed, which may be measured for seconds).
    Raises: DataSetError: the data is missing or malformed. UsageError: there is no such side or predictor.
    """
    import os

    from neurosurgeon.predictor.machine_speed import scaled_to_machine
    from neurosurgeon.predictor.store import find_predictor

    one_of(("edge", "cloud"), "side", side)
    one_of(("forest", "linear"), "predictor", predictor)
    found = find_predictor(side, name=predictor, path=None if config is None else Path(config))
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
    Raises: UsageError: a strategy or a number is wrong. PlanningError, UnknownModelError, TraceError.
    """
    from neurosurgeon.planner.compare import Comparison, plans_of_all
    from neurosurgeon.planner.strategies import Strategy
    from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s

    for rate in rates_mb_per_s:
        check_numbers(rate_mb_per_s=rate, rtt_ms=rtt_ms)
    wanted = [Strategy(one_of(Strategy, "strategy", name)) for name in strategies or Strategy]
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

    It is a child process, or, with models that are modules, threads of this process. These share its interpreter with
    the edge, so that both are slower than in processes of their own.

    Args:   models: the names that it serves (default: all), or modules by name. A module keeps its own weights.
            examples: the inputs of a module by its name, as for `Edge`.
            flags: more flags of `cloud_api.py`, with absolute paths of files.
    Raises: NetworkError, when entered: it did not start. UsageError, when entered: a model or a flag is unknown.
    """

    def __init__(
        self,
        models: str | Iterable[str] | Mapping[str, nn.Module] = (),
        *,
        examples: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self._modules = models if isinstance(models, Mapping) else None
        self._examples = examples
        names = [models] if isinstance(models, str) else list(models)
        self._flags = ["-p", "0", "--monitor-port", "0", *(["--models", *names] if names else []), *flags]
        self.port = 0  # of tasks; known inside the block
        self.monitor_port = 0  # of the bandwidth service
        self._exit = ExitStack()

    def __enter__(self) -> Cloud:
        if self._modules is not None:
            with ExitStack() as opened:  # closes all if the last one does not start
                self._serve_here(self._modules, opened)
                self._exit = opened.pop_all()
            return self
        from neurosurgeon.cli.process import ServiceProcess

        process = ServiceProcess(["-m", "neurosurgeon", "cloud", *self._flags], services=2)
        try:
            self._exit.enter_context(process)
        except NetworkError as exc:
            if process.process.returncode == UsageError.exit_code:
                raise UsageError(str(exc)) from exc
            raise
        self.port, self.monitor_port = process.ports
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def _serve_here(self, modules: Mapping[str, nn.Module], opened: ExitStack) -> None:
        from neurosurgeon.cli.cloud import cloud_parser, make_service, running
        from neurosurgeon.cli.parser import access_of_cloud
        from neurosurgeon.models.names import Catalogue
        from neurosurgeon.net.sockets import bind

        try:
            args = cloud_parser("Cloud").parse_args(self._flags)
        except SystemExit as exc:  # after one line on stderr
            raise UsageError(f"a flag of this cloud is wrong: {' '.join(self._flags)}") from exc
        access = access_of_cloud(args)
        listener = opened.enter_context(bind(args.ip, args.port, access))
        service = make_service(args, Catalogue(args.model_file, modules, self._examples), lambda event, sock: None)
        monitor = opened.enter_context(running(args, service, listener, access))
        self.port, self.monitor_port = listener.getsockname()[1], monitor.ports[0]


class Edge:
    """This machine as the edge of a cloud. It keeps the graphs of its networks; each task loads its network again.

    Each task or queue connects, learns about the link, plans and runs, as `edge_api.py` and `tasks_edge_api.py` do.

    Args:   access: the key or TLS of the cloud (`neurosurgeon.net.access`). device: "cpu" or "cuda".
            threads: CPU threads to compute with (default: those that the data of the edge was measured with).
            models: modules of your own, by the names under which the cloud has them. They keep their own weights.
            examples: their inputs, by these names: a tuple, a dict by name, or a tensor (default: one image of 224).
            model_files: Python files with functions that return modules, which the cloud has as well.
            labels: the names of the classes by their index, or a file of them (default: those of ImageNet for
            torchvision's weights, else none).
    Raises: UsageError: there is no such device, or the labels cannot be read.
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
        examples: Mapping[str, Any] | None = None,
        model_files: Iterable[Path | str] = (),
        labels: Path | str | Sequence[str] | None = None,
    ) -> None:
        from neurosurgeon.edge.labels import labels_of
        from neurosurgeon.edge.run import CloudAddress
        from neurosurgeon.net.access import Access

        self._cloud = CloudAddress(host, port, monitor_port, access or Access(cloud_name=host))
        self._device, self._threads = one_of(("cpu", "cuda"), "device", device), threads
        self._models, self._examples, self._model_files = models, examples, [Path(file) for file in model_files]
        self._labels = labels_of(labels)

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: no connection exists after its task."""

    @cached_property
    def _catalogue(self) -> Catalogue:
        from neurosurgeon.models.names import Catalogue

        return Catalogue(self._model_files, self._models, self._examples)

    @cached_property
    def _engine(self) -> Engine:
        from neurosurgeon.engine.base import find_engine

        return find_engine()(self._catalogue, self._device)

    def run(
        self,
        model: str,
        inputs: object = None,
        *,
        rate_mb_per_s: float | None = None,
        rtt_ms: float | None = None,
        observe: Callable[[TaskEvent], None] = lambda event: None,
        **settings: Any,
    ) -> Outcome:
        """Plan and run one task; return its output, its plan, and its times in ms. May block.

        Args:   inputs: a file, pixels (height, width, 3) uint8 of the network's size, an array or a tensor; for several
                inputs a tuple, or a dict by name (default: the network's example, or a fixed image of noise).
                rate_mb_per_s, rtt_ms: rate of the uplink, 10^6 bytes/s, and round trip (default: measured).
                observe: called with each event of the task as it happens (`neurosurgeon.edge.records`).
                settings: other fields of `neurosurgeon.edge.settings.TaskSettings`, such as point, repeat or verify;
                weights may be the path of a file, which may have another number of classes.
        Raises: InputError: the input has another shape or type. PartitionError: there is no such point.
                UsageError: a setting has a wrong value. NetworkError: the cloud cannot be reached, or was lost.
                UnknownModelError, PlanningError, WeightsError.
        """
        from neurosurgeon.edge.run import LinkChoice, run_one_task
        from neurosurgeon.edge.settings import TaskSettings
        from neurosurgeon.engine.base import SEEDED, WeightsSource
        from neurosurgeon.models.weights_sources import fitted_name

        if isinstance(file := settings.get("weights"), str | Path):
            settings["weights"] = WeightsSource(Path(file))
        check_numbers(rate_mb_per_s=rate_mb_per_s, rtt_ms=rtt_ms)
        name = self._name(model)
        if file := settings.get("weights", SEEDED).file:
            name = fitted_name(self._catalogue, name, file)
        arrays = None if inputs is None else self._arrays(name, inputs)
        defaults: dict[str, Any] = {"weights": SEEDED, **self._defaults}
        chosen = settings_of(TaskSettings, {"model": name, "arrays": arrays, **defaults, **settings})
        return run_one_task(chosen, lambda: self._engine, self._cloud, LinkChoice(rate_mb_per_s, rtt_ms), observe)

    def run_queue(
        self,
        tasks: Iterable[tuple[str, object]],
        *,
        rate_mb_per_s: float | None = None,
        rtt_ms: float | None = None,
        **settings: Any,
    ) -> Generator[TaskDone, None, QueueOutcome]:
        """Run a queue of tasks, many in flight; yield each result, with its output, as soon as it is there.

        Nothing runs, and nothing is raised, before the first result is asked for. A loop that is left early waits for
        the tasks in flight. A task whose file cannot be read, or that fails, has a result with an error and no output.

        Args:   tasks: models, each with its inputs as in `run`, or None.
                settings: fields of `neurosurgeon.edge.settings.QueueSettings`, such as objective or in_flight.
        Raises: InputError: an array has another shape or type. UsageError: a setting has a wrong value.
                NetworkError: the cloud cannot be reached. UnknownModelError, PlanningError, WeightsError.
        """
        from neurosurgeon.edge.run import LinkChoice, results_of, run_queue
        from neurosurgeon.edge.settings import QueueSettings

        check_numbers(rate_mb_per_s=rate_mb_per_s, rtt_ms=rtt_ms)
        queued = [self._task(number, model, inputs) for number, (model, inputs) in enumerate(tasks, start=1)]
        defaults: dict[str, Any] = {"weights": {}, **self._defaults}
        chosen, choice = settings_of(QueueSettings, defaults | settings), LinkChoice(rate_mb_per_s, rtt_ms)
        return (yield from results_of(partial(run_queue, queued, chosen, lambda: self._engine, self._cloud, choice)))

    def run_stream(
        self,
        model: str,
        source: object,
        *,
        keep_all: bool = False,
        rate_mb_per_s: float | None = None,
        rtt_ms: float | None = None,
        **settings: Any,
    ) -> Generator[TaskDone, None, StreamOutcome]:
        """Run a task for each frame, the newest first; yield each result as soon as it is there, in any order.

        Nothing runs before the first result is asked for. Frames that come while all slots (``in_flight``) are busy, or
        the loop is slow, are dropped. A result has its frame as ``result.task.frame``, and ``result.age_ms``.

        Args:   source: a directory of images, a video file, a URL, the number of a camera, or frames (H, W, 3) uint8.
                keep_all: drop no frame. settings: as for `run_queue`.
        Returns: the counts of the frames, as the value of ``yield from``.
        Raises: StreamError: a video ends in the middle, after all its results. InputError: the source cannot be read.
                As `run_queue`.
        """
        from neurosurgeon.edge.frames import open_source
        from neurosurgeon.edge.run import LinkChoice, results_of, run_stream
        from neurosurgeon.edge.settings import QueueSettings

        check_numbers(rate_mb_per_s=rate_mb_per_s, rtt_ms=rtt_ms)
        name, choice = self._name(model), LinkChoice(rate_mb_per_s, rtt_ms)
        defaults: dict[str, Any] = {"weights": {}, **self._defaults}
        chosen = settings_of(QueueSettings, defaults | settings)
        run = partial(
            run_stream, name, open_source(source), chosen, lambda: self._engine, self._cloud, choice, keep_all=keep_all
        )
        outcome = yield from results_of(run, waiting=chosen.in_flight)
        if outcome.error:
            raise outcome.error
        return outcome

    def _task(self, number: int, model: str, inputs: object) -> QueuedTask:
        """Return a task of a queue. An image file is read when its turn comes."""
        from neurosurgeon.edge.records import QueuedTask

        name = self._name(model)
        if isinstance(inputs, str | Path):
            return QueuedTask(number, name, Path(inputs))
        return QueuedTask(number, name, arrays=None if inputs is None else self._arrays(name, inputs))

    @property
    def _defaults(self) -> dict[str, Any]:
        return {"device": self._device, "threads": self._threads, "labels": self._labels}

    def _name(self, model: str) -> str:
        if not isinstance(model, str):
            kind = type(model).__name__
            raise UsageError(f'model: expected a name, got {kind}; to run your own, Edge(models={{"mine": module}})')
        return self._engine.canonical_name(model)

    def _arrays(self, name: str, given: object) -> tuple[Array, ...]:
        from neurosurgeon.edge.inputs import inputs_of

        inputs = inputs_of(self._engine, name)
        return inputs.read(Path(given)) if isinstance(given, str | Path) else inputs.bind(given)
