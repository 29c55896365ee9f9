"""Run one task with a cloud: connect, find out about the link, then plan and run it (`edge.task`).

Nothing here imports torch, which takes a second: `edge.task` is imported when the cloud has answered.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from neurosurgeon.edge.records import LinkKnown, LinkReused, TaskObserver
from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.monitor_client import LinkMeasurement, estimate_link, given_or_measured, measure_link, young_link
from neurosurgeon.net.session import EdgeSession, OnCloudLoss, new_edge_id
from neurosurgeon.utils.errors import NetworkError
from neurosurgeon.utils.link import LinkEstimate

if TYPE_CHECKING:
    from neurosurgeon.edge.task import Outcome


@dataclass(frozen=True, slots=True)
class CloudAddress:
    """Where a cloud is, and how it is reached."""

    host: str
    port: int
    monitor_port: int  # of its bandwidth service
    access: Access = OPEN
    is_temporary: bool = False  # started for this task: no estimate of its link is kept, or was kept before
    is_relayed: bool = False  # an emulated network is in between, of which the kernel knows nothing


@dataclass(frozen=True, slots=True)
class LinkChoice:
    """How a task learns about its link."""

    rate_mb_per_s: float | None = None  # None: measured
    rtt_ms: float | None = None  # None: measured
    measures_always: bool = True  # else only if that can change the plan, and no recent estimate is kept


def run_one_task(
    settings: TaskSettings, cloud: CloudAddress, choice: LinkChoice, observe: TaskObserver = lambda event: None
) -> Outcome:
    """Plan and run one task. May block for as long as the cloud computes.

    Raises: NetworkError: the cloud cannot be reached, or was lost. UsageError, PlanningError, WeightsError.
    """
    is_open = not choice.measures_always and choice.rate_mb_per_s is None
    kept = young_link(cloud.host, cloud.monitor_port) if is_open and not cloud.is_temporary else None
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
            """Return the link: given, kept or measured. None if the whole cloud is gone, and the task may run here."""
            if kept:
                observe(LinkReused(kept.age_s))
            measured = (lambda: kept) if kept else measurement.result
            try:
                link = given_or_measured(choice.rate_mb_per_s, choice.rtt_ms, session.rtt_ms, measured)
            except NetworkError:
                if settings.on_cloud_loss is not OnCloudLoss.LOCAL or session.is_alive():
                    raise
                return None
            observe(LinkKnown(link))
            return link

        ideal = _ideal_link(cloud, choice, session) if is_open and not kept else None
        from neurosurgeon.edge.task import run_task

        return run_task(settings, session, find_link, observe, reopen, ideal)


def _ideal_link(cloud: CloudAddress, choice: LinkChoice, session: EdgeSession) -> LinkEstimate:
    """Return the best that the link to this cloud can be: infinitely fast, with the least round trip."""
    if choice.rtt_ms is not None:
        return LinkEstimate(math.inf, choice.rtt_ms)
    return LinkEstimate(math.inf, session.rtt_ms if cloud.is_relayed else session.least_rtt_ms())
