"""The plan of a single task: the latencies of its layers on both sides, the keys of its corrections, and its cut."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.engine.base import Engine
from neurosurgeon.graph.cut import check_point
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.planner.plan import Candidate, SplitPlan, plan_split
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.planner.transfer import IDLE, WARM, Sender
from neurosurgeon.predictor.correction import Corrections
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.store import dataset_threads, find_predictor
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.logs import printable

MAX_ORIGIN_CHARS = 400  # of the text with which a cloud names its data


class StageKeys(NamedTuple):
    """The keys of the corrections of the three stages."""

    edge: str
    transfer: str
    cloud: str


def edge_latencies(task: TaskSettings, engine: Engine, graph: LayerGraph) -> LayerLatencies:
    """Return the latencies of the model's layers on this machine, predicted or measured, ms. May block for seconds.

    Lets the calling thread compute with the settings' number of threads. Raises: WeightsError, PlanningError.
    """
    if task.predictor == "measured":
        engine.use_threads(task.threads or dataset_threads("edge", task.device))
        return LayerLatencies.measured(*engine.open(task.model, task.weights).measure())
    predictor = find_predictor("edge", task.device, task.predictor, task.edge_config)
    threads = engine.use_threads(task.threads or predictor.threads)
    if task.edge_config is None:
        predictor = engine.scale(predictor, threads)
    return predictor.predict(graph)


def cloud_latencies(task: TaskSettings, session: EdgeSession, graph: LayerGraph) -> LayerLatencies:
    """Return the latencies of the model's layers in the cloud, ms: its own predictions, or those from the user's data.

    May block. Raises: NetworkError, PlanningError, GraphError.
    """
    if task.cloud_config is None:
        reply = session.ask_latencies(task.model, graph.digest)
        columns = (reply.latency_ms, reply.low_ms, reply.high_ms)
        return LayerLatencies(*columns, reply.source, reply.extrapolated, printable(reply.origin[:MAX_ORIGIN_CHARS]))
    name = "linear" if task.predictor == "linear" else "forest"
    return find_predictor("cloud", str(session.cloud.get("device")), name, task.cloud_config).predict(graph)


def stage_keys(
    task: TaskSettings,
    session: EdgeSession,
    link: LinkEstimate,
    edge: LayerLatencies,
    cloud: LayerLatencies,
    *,
    is_warm: bool,
) -> StageKeys:
    """Return the keys of the corrections of these latencies.

    The first inference of a process also builds its kernels, so it has its own corrections. So has every other
    prediction: after new data is collected, online correction starts from the beginning.
    """
    phase = "warm" if is_warm else "first"
    where = f"{session.host} {session.cloud.get('device')} {session.cloud.get('threads')} {task.cloud_config}"
    this_edge = f"{task.device} {task.threads} {task.predictor} {task.edge_config}"
    return StageKeys(
        edge=f"{phase} edge {task.model} {this_edge} {edge.total():.4g} ms",
        transfer=f"{phase} transfer {task.model} {where} {link.source.name}",
        cloud=f"{phase} cloud {task.model} {where} {cloud.total():.4g} ms",
    )


def plan_task(
    task: TaskSettings,
    graph: LayerGraph,
    session: EdgeSession,
    link: LinkEstimate,
    corrections: Corrections,
    edge: LayerLatencies,
    cloud: LayerLatencies,
) -> tuple[SplitPlan, Candidate, StageKeys]:
    """Return the plan for this edge, this cloud and the current link estimate, the cut to take, and its stages' keys.

    Args:   edge, cloud: the latencies before any correction.
    Raises: PartitionError: the network does not have the task's partition point.
    """
    if task.point is not None:
        check_point(task.model, task.point, len(graph.layers))
    keys = stage_keys(task, session, link, edge, cloud, is_warm=task.repeat > 1)
    state = session.send_state()
    never_waits = task.repeat > 1 or math.isinf(link.rate_bytes_per_s)
    plan_with = partial(
        plan_split,
        graph,
        edge.scaled(corrections.factor(keys.edge)),
        cloud.scaled(corrections.factor(keys.cloud)),
        link.rate_bytes_per_s,
        link.exchange_ms,
        corrections.factor(keys.transfer),
        sender=WARM if never_waits else Sender(*state) if state else IDLE,
    )
    plan = plan_with(strategy=task.strategy, max_edge_bytes=task.max_edge_bytes)
    if task.point is None:
        return plan, plan.best, keys
    forced = plan_with(strategy=Strategy.NEUROSURGEON).candidates[task.point]  # which has every point
    return plan, plan.best if plan.edge_nodes(forced) == plan.edge_nodes(plan.best) else forced, keys
