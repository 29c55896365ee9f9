"""Run one task, or a queue of tasks, with a cloud: connect, learn about the link, then plan and run.

The engine is opened after the cloud's hello, because importing its library takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

from neurosurgeon.edge.cuts import Forecast, prepare_models, share_cores
from neurosurgeon.edge.link_thread import RECONNECT_TIMEOUT_S, TaskStream
from neurosurgeon.edge.outcome import Outcome
from neurosurgeon.edge.queue import QueueRun
from neurosurgeon.edge.records import LinkKnown, LinkReused, QueuedTask, QueueObserver, TaskObserver, TaskResult
from neurosurgeon.edge.settings import QueueSettings, TaskSettings
from neurosurgeon.edge.task import run_task
from neurosurgeon.engine.base import Engine
from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.link_watch import LinkWatch
from neurosurgeon.net.monitor_client import LinkMeasurement, estimate_link, given_or_measured, measure_link, recent_link
from neurosurgeon.net.session import EdgeSession, OnCloudLoss, new_edge_id
from neurosurgeon.utils.errors import NetworkError
from neurosurgeon.utils.link import LinkEstimate

OpenEngine = Callable[[], Engine]


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
    reopen = partial(EdgeSession.open, cloud.host, cloud.port, new_edge_id(), cloud.access)
    with LinkMeasurement(partial(estimate_link, cloud.host, cloud.monitor_port, cloud.access)) as measurement:
        if choice.rate_mb_per_s is None:
            measurement.start()
        session = reopen()
        find_link = cache(partial(choice.link, session.rtt_ms, measurement.result))
        host = cloud.access.cloud_name or cloud.host
        settings = replace(settings, shares_cores=share_cores(host, session.cloud, settings))
        engine = open_engine()
        models = prepare_models(tasks, settings, engine, session, find_link, observe)
        link = find_link()
    forecast = Forecast(tasks, models, link, settings)
    timeout_s = RECONNECT_TIMEOUT_S if settings.on_cloud_loss is OnCloudLoss.RETRY else None
    with TaskStream(session, reopen, timeout_s) as stream, _watch_link(cloud, choice, link, stream) as watch:
        run = QueueRun(settings, models, stream, watch, observe)
        results = run.run(forecast.in_order(settings.schedule), should_stop)
    run.planner.check_speed(engine)
    if len(results) == len(tasks) and all(result.is_finished for result in results):
        forecast.learn(run.makespan_ms)
    origins = next(iter(models.values())).origins if models else {}
    return QueueOutcome(results, run.makespan_ms, forecast.makespans_ms, origins)


def _watch_link(cloud: CloudAddress, choice: LinkChoice, link: LinkEstimate, stream: TaskStream) -> LinkWatch:
    return LinkWatch(
        cloud.host,
        cloud.monitor_port,
        link,
        access=cloud.access,
        interval_s=choice.interval_s,
        sending_bytes=lambda: stream.sending_bytes,
    )
