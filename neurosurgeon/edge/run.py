"""Run one task, or a queue of tasks, with a cloud: connect, learn about the link, then plan and run.

The engine is opened after the cloud's hello, because importing its library takes a second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from queue import SimpleQueue
from threading import Event, Semaphore
from typing import NamedTuple, TypeVar

from neurosurgeon.edge.cuts import Forecast, QueueModel, prepare_models, share_cores
from neurosurgeon.edge.frames import FrameReader, FrameSource
from neurosurgeon.edge.inputs import inputs_of_frames
from neurosurgeon.edge.link_thread import RECONNECT_TIMEOUT_S, TaskStream
from neurosurgeon.edge.outcome import Outcome
from neurosurgeon.edge.queue import QueueRun
from neurosurgeon.edge.records import (
    LinkKnown,
    LinkReused,
    QueuedTask,
    QueueEvent,
    QueueObserver,
    StreamStarted,
    TaskDone,
    TaskObserver,
    TaskResult,
)
from neurosurgeon.edge.settings import QueueSettings, TaskSettings
from neurosurgeon.edge.task import run_task
from neurosurgeon.engine.base import Engine
from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.link_watch import LinkWatch
from neurosurgeon.net.monitor_client import LinkMeasurement, estimate_link, given_or_measured, measure_link, recent_link
from neurosurgeon.net.session import EdgeSession, OnCloudLoss, new_edge_id
from neurosurgeon.utils.errors import NetworkError, UsageError
from neurosurgeon.utils.link import LinkEstimate

OpenEngine = Callable[[], Engine]
QueueEnd = TypeVar("QueueEnd")

UNLIMITED = 2**40  # results that wait for a loop


@dataclass(frozen=True, slots=True)
class CloudAddress:
    """The addresses of a cloud's services, and how to authenticate."""

    host: str
    port: int
    monitor_port: int  # of its bandwidth service
    access: Access = OPEN
    is_temporary: bool = False  # started for this task: no estimate of its link is kept between runs
    is_relayed: bool = False  # by an emulated network, whose round trip the kernel does not see


@dataclass(frozen=True, slots=True)
class LinkChoice:
    """The source of a link estimate: given values, or measurements."""

    rate_mb_per_s: float | None = None  # None: measured
    rtt_ms: float | None = None  # None: measured
    measures_always: bool = True  # False: only if the link can change the plan, and no recent estimate is kept
    interval_s: float = 1.0  # between two measurements of a queue

    def link(self, hello_rtt_ms: float, measured: Callable[[], LinkEstimate]) -> LinkEstimate:
        """Return the link estimate. May block for a measurement. Raises: NetworkError."""
        return given_or_measured(self.rate_mb_per_s, self.rtt_ms, hello_rtt_ms, measured)


def run_one_task(
    settings: TaskSettings,
    open_engine: OpenEngine,
    cloud: CloudAddress,
    choice: LinkChoice,
    observe: TaskObserver = lambda event: None,
) -> Outcome:
    """Plan and run one task. May block for as long as the cloud computes.

    Raises: NetworkError: the cloud is unreachable, or disconnected. UsageError, PlanningError, WeightsError.
    """
    is_open = not choice.measures_always and choice.rate_mb_per_s is None
    kept = recent_link(cloud.host, cloud.monitor_port) if is_open and not cloud.is_temporary else None
    measure = measure_link if cloud.is_temporary else estimate_link
    with ExitStack() as stack:
        measurement = stack.enter_context(
            LinkMeasurement(partial(measure, cloud.host, cloud.monitor_port, cloud.access))
        )
        if choice.measures_always and choice.rate_mb_per_s is None:
            measurement.start()
        edge_id = new_edge_id() if settings.repeat == 1 else None
        reopen = partial(EdgeSession.open, cloud.host, cloud.port, edge_id, cloud.access)
        session = stack.enter_context(reopen())

        def find_link() -> LinkEstimate | None:
            """Return the link: given, kept or measured. None if the cloud disconnected and the task may run locally."""
            if kept:
                observe(LinkReused(kept.age_s))
            try:
                link = choice.link(session.rtt_ms, (lambda: kept) if kept else measurement.result)
            except NetworkError:
                if settings.on_cloud_loss is not OnCloudLoss.LOCAL or session.responds():
                    raise
                return None
            observe(LinkKnown(link))
            return link

        ideal = _ideal_link(cloud, choice, session) if is_open and not kept else None
        return run_task(settings, open_engine(), session, find_link, observe, reopen, ideal)


def _ideal_link(cloud: CloudAddress, choice: LinkChoice, session: EdgeSession) -> LinkEstimate:
    """Return the best possible link to this cloud: infinitely fast, with the least round trip."""
    if choice.rtt_ms is not None:
        return LinkEstimate(math.inf, choice.rtt_ms)
    return LinkEstimate(math.inf, session.rtt_ms if cloud.is_relayed else session.least_rtt_ms())


class QueueOutcome(NamedTuple):
    """The results of a queue, in the order of their ends, and its measured and predicted makespans, ms."""

    results: Sequence[TaskResult]
    makespan_ms: float
    predicted_makespan_ms: dict[str, float]  # of each schedule
    origins: dict[str, str]  # side -> the machine whose data its predictions use


def run_queue(
    tasks: Sequence[QueuedTask],
    settings: QueueSettings,
    open_engine: OpenEngine,
    cloud: CloudAddress,
    choice: LinkChoice,
    observe: QueueObserver = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> QueueOutcome:
    """Run a queue of tasks. May block for as long as all of them take.

    Args:   observe: called with each event; with results on a thread of their own.
            should_stop: called before each task begins; if true, none begins, and those in flight are finished.
    Raises: NetworkError: the cloud is unreachable. UsageError, PlanningError, WeightsError.
    """
    opened = _open_queue({task.model for task in tasks}, settings, open_engine, cloud, choice, observe)
    forecast = Forecast(tasks, opened.models, opened.link, opened.settings)
    with _running(opened, cloud, choice, observe) as run:
        results = run.run(forecast.in_order(settings.schedule), should_stop)
    if len(results) == len(tasks) and all(result.is_finished for result in results):
        forecast.learn(run.results.makespan_ms)
    origins = next(iter(opened.models.values())).origins if opened.models else {}
    return QueueOutcome(results, run.results.makespan_ms, forecast.makespans_ms, origins)


class StreamOutcome(NamedTuple):
    """The counts of a stream's frames, and how it ended."""

    answered: int  # frames with a result
    failed: int  # of these, with an error in place of an output
    dropped: int  # frames for which there was no time
    elapsed_ms: float  # from its start to the last result
    error: Exception | None  # why the source ended before its end


def run_stream(
    model: str,
    source: FrameSource,
    settings: QueueSettings,
    open_engine: OpenEngine,
    cloud: CloudAddress,
    choice: LinkChoice,
    observe: QueueObserver = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    keep_all: bool = False,
) -> StreamOutcome:
    """Run a task for each frame of a source, the newest first. Blocks until the source ends, or `should_stop`.

    Args:   source: closed at the end. observe, should_stop: as for `run_queue`.
            keep_all: drop no frame: the source waits for the tasks.
    Raises: as `run_queue`. An error of the source is in the outcome, as all results before it are good.
    """
    with source:
        if keep_all and source.is_live:
            raise UsageError("a camera waits for no task, so that not all its frames can be kept: leave keep-all out")
        opened = _open_queue({model}, settings, open_engine, cloud, choice, observe)
        known = opened.models[model]
        with _running(opened, cloud, choice, observe, keeps_results=False) as run:
            observe(StreamStarted(known.network.ref))
            with FrameReader(source, run.wake, keep_all=keep_all) as reader:
                run.run_all(inputs_of_frames(reader, model, known.inputs), itertools.repeat(model), should_stop)
    results = run.results
    return StreamOutcome(results.count, results.failed_count, reader.dropped, results.makespan_ms, reader.error)


class _OpenedQueue(NamedTuple):
    """A connection to the cloud, and the models of a queue, ready on both sides."""

    settings: QueueSettings
    engine: Engine
    reopen: Callable[[], EdgeSession]
    session: EdgeSession
    models: dict[str, QueueModel]
    link: LinkEstimate


def _open_queue(
    names: Iterable[str],
    settings: QueueSettings,
    open_engine: OpenEngine,
    cloud: CloudAddress,
    choice: LinkChoice,
    observe: QueueObserver,
) -> _OpenedQueue:
    reopen = partial(EdgeSession.open, cloud.host, cloud.port, new_edge_id(), cloud.access)
    with (
        LinkMeasurement(partial(estimate_link, cloud.host, cloud.monitor_port, cloud.access)) as measurement,
        ExitStack() as on_error,
    ):
        if choice.rate_mb_per_s is None:
            measurement.start()
        session = on_error.enter_context(reopen())
        find_link = cache(partial(choice.link, session.rtt_ms, measurement.result))
        host = cloud.access.cloud_name or cloud.host
        settings = replace(settings, shares_cores=share_cores(host, session.cloud, settings))
        engine = open_engine()
        models = prepare_models(names, settings, engine, session, find_link, observe)
        opened = _OpenedQueue(settings, engine, reopen, session, models, find_link())
        on_error.pop_all()
        return opened


@contextmanager
def _running(
    opened: _OpenedQueue, cloud: CloudAddress, choice: LinkChoice, observe: QueueObserver, *, keeps_results: bool = True
) -> Iterator[QueueRun]:
    settings = opened.settings
    timeout_s = RECONNECT_TIMEOUT_S if settings.on_cloud_loss is OnCloudLoss.RETRY else None
    with (
        TaskStream(opened.session, opened.reopen, timeout_s) as stream,
        _watch_link(cloud, choice, opened.link, stream) as watch,
    ):
        run = QueueRun(settings, opened.models, stream, watch, observe, keeps_results=keeps_results)
        yield run
    run.planner.check_speed(opened.engine)


def _watch_link(cloud: CloudAddress, choice: LinkChoice, link: LinkEstimate, stream: TaskStream) -> LinkWatch:
    return LinkWatch(
        cloud.host,
        cloud.monitor_port,
        link,
        access=cloud.access,
        interval_s=choice.interval_s,
        sending_bytes=lambda: stream.sending_bytes,
    )


def results_of(
    run: Callable[[QueueObserver, Callable[[], bool]], QueueEnd], *, waiting: int | None = None
) -> Generator[TaskDone, None, QueueEnd]:
    """Run a queue on a thread of its own; yield each result as soon as it is there, and return what the queue returns.

    A loop that is left early waits for the tasks in flight.

    Args:   run: called with an observer, and a function that returns whether no more results are wanted.
            waiting: results that may wait for the loop; None: any number.
    """
    results: SimpleQueue[TaskDone | None] = SimpleQueue()
    room = Semaphore(waiting or UNLIMITED)
    is_left = Event()

    def observe(event: QueueEvent) -> None:
        if isinstance(event, TaskDone):
            if not is_left.is_set():
                room.acquire()
            results.put(event)

    with ThreadPoolExecutor(1, "queue") as runner:
        running = runner.submit(run, observe, is_left.is_set)
        running.add_done_callback(lambda _: results.put(None))
        try:
            while done := results.get():
                room.release()
                yield done
        finally:  # also if the caller wants no more results
            is_left.set()
            room.release()  # the one result that may wait for it
        return running.result()
