"""One task of the edge: plan it for the current link estimate, run it with the cloud, report it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from neurosurgeon.edge.link_thread import PATIENCE_S
from neurosurgeon.edge.outcome import Outcome, Run, is_whole, max_difference, top_guesses
from neurosurgeon.edge.records import (
    Answered,
    EdgeComputed,
    Finished,
    LinkNotNeeded,
    Planned,
    Prepared,
    Progress,
    Replied,
    Sent,
    TaskObserver,
)
from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.edge.stages import StageKeys, cloud_latencies, edge_latencies, plan_task, stages_of
from neurosurgeon.engine.base import Engine, Network, NetworkRef, Partition, Side
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array, TensorSpec, dtype_of, synthetic_input
from neurosurgeon.net.breaker import Breaker
from neurosurgeon.net.messages import Prepare, Request
from neurosurgeon.net.session import EdgeSession, OnCloudLoss, stage_times
from neurosurgeon.planner.plan import Candidate, Candidates, SplitPlan
from neurosurgeon.predictor.correction import Corrections
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.utils.errors import AddressError, ConnectError, NetworkError, ProtocolError, is_connection_loss
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S, s_to_ms

log = logging.getLogger(__name__)

FindLink = Callable[[], LinkEstimate | None]


class EdgeSide:
    """This machine's side of a task: the latencies of its layers, and its network, which loads in a thread."""

    def __init__(self, task: TaskSettings, engine: Engine) -> None:
        self.engine = engine
        self.graph: LayerGraph = engine.graph(task.model)
        self.latencies = edge_latencies(task, engine, self.graph)  # before the thread starts: it may time layers
        self._open = partial(engine.open, task.model, task.weights)
        loader = ThreadPoolExecutor(1, "load")
        self._loading: Future[Network] | None = loader.submit(self._open)
        loader.shutdown(wait=False)  # the thread ends when it has loaded, and its team of OpenMP threads with it

    def partition(self, edge_nodes: frozenset[int]) -> Partition:
        """Return the edge partition of a cut. The other parameters are dropped: a second call loads them again.

        May block. Raises: WeightsError, PartitionError.
        """
        loading, self._loading = self._loading, None
        return (loading.result() if loading else self._open()).partition(edge_nodes, Side.EDGE)


def run_task(
    task: TaskSettings,
    engine: Engine,
    session: EdgeSession,
    find_link: FindLink,
    observe: TaskObserver,
    reopen: Callable[[], EdgeSession] | None = None,
    ideal: LinkEstimate | None = None,
) -> Outcome:
    """Plan, run and report one task; if the cloud is lost on the way, go on as the task says.

    Predicting and loading the network do not depend on the link: they begin before it is asked for.

    Args:   find_link: may wait for a measurement; returns None if the cloud was lost before the link was known.
            reopen: connects to the cloud again.
            ideal: an infinitely fast link; if even over it the task is fastest on the edge alone, none is asked for.
    Raises: NetworkError, WeightsError, PlanningError.
    """
    link: LinkEstimate | None = None
    cloud: LayerLatencies | NetworkError
    here = EdgeSide(task, engine)
    try:
        cloud = cloud_latencies(task, session, here.graph)
    except NetworkError as exc:
        cloud = exc
    else:
        if ideal and stays_here(task, session, ideal, here, cloud, observe):
            link = ideal
    link = link or find_link()
    try:
        if isinstance(cloud, NetworkError):
            raise cloud
        if link is None:
            raise ConnectError("it was gone before the link was known")
        session.pace_first_task(link)
        return run_with_cloud(task, session, link, here, cloud, observe)
    except NetworkError as exc:
        is_loss = is_connection_loss(exc)
        if is_loss and task.on_cloud_loss is OnCloudLoss.LOCAL:
            log.warning("the cloud is lost (%s): the task is computed here", exc)
            return run_here(task, link, here, observe)
        if is_loss and task.on_cloud_loss is OnCloudLoss.RETRY and link and reopen:
            log.warning("the cloud is lost (%s): looking for it", exc)
            return run_again(task, reopen, link, here, observe)
        raise


def stays_here(
    task: TaskSettings,
    session: EdgeSession,
    ideal: LinkEstimate,
    here: EdgeSide,
    cloud: LayerLatencies,
    observe: TaskObserver,
) -> bool:
    """Return, and report, whether a task is fastest on the edge alone even over an infinitely fast link.

    Any other cut then takes its two parts and a round trip: the plan would be the same for every rate.
    """
    corrections = Corrections.load() if task.learns else Corrections()
    stages = stages_of(task, session, ideal, here.latencies, cloud, is_warm=task.repeat > 1)
    plan, candidate = plan_task(task, here.graph, session, ideal, corrections, stages)
    if plan.best.boundary_bytes or candidate.boundary_bytes:
        return False
    observe(LinkNotNeeded(plan, ideal.rtt_ms))
    return True


def run_with_cloud(
    task: TaskSettings,
    session: EdgeSession,
    link: LinkEstimate,
    here: EdgeSide,
    cloud: LayerLatencies,
    observe: TaskObserver,
) -> Outcome:
    """Plan one task for this cloud, and run it.

    Raises: NetworkError, WeightsError, PlanningError.
    """
    corrections = Corrections.load() if task.learns else Corrections()
    stages = stages_of(task, session, link, here.latencies, cloud, is_warm=task.repeat > 1)
    plan, candidate = plan_task(task, here.graph, session, link, corrections, stages)
    observe(Planned(plan, candidate))
    partition = prepare(task, session, plan.edge_nodes(candidate), here, observe)
    outcome = infer(task, here.engine, partition, plan, candidate, link, session, observe)
    if task.learns:
        learn(corrections, stages.keys, outcome)
        if task.repeat > 1 and task.predictor != "measured":
            here.engine.check_speed(corrections.factor(stages.keys.edge), here.engine.threads)
    observe(answered(outcome))
    return outcome


def run_again(
    task: TaskSettings, reopen: Callable[[], EdgeSession], link: LinkEstimate, here: EdgeSide, observe: TaskObserver
) -> Outcome:
    """Connect to the cloud again, and run the task from its start.

    Raises: NetworkError: the cloud stayed unreachable for `PATIENCE_S`.
    """
    breaker, start_ms = Breaker(), now_ms()
    while True:
        breaker.lost(now_ms())
        time.sleep(breaker.pause_ms(now_ms()) / MS_PER_S)
        try:
            with reopen() as session:
                cloud = cloud_latencies(task, session, here.graph)
                return run_with_cloud(task, session, link, here, cloud, observe)
        except (NetworkError, AddressError) as exc:  # names are not known, either, while there is no network
            is_loss = is_connection_loss(exc) or isinstance(exc, AddressError)
            if not is_loss or now_ms() - start_ms > s_to_ms(PATIENCE_S):
                raise


def run_here(task: TaskSettings, link: LinkEstimate | None, here: EdgeSide, observe: TaskObserver) -> Outcome:
    """Run the whole network on this machine."""
    plan = plan_alone(here.graph, here.latencies)
    partition = here.partition(plan.edge_nodes(plan.best))
    outcome = infer(task, here.engine, partition, plan, plan.best, link, None, observe)
    observe(answered(outcome))
    return outcome


def plan_alone(graph: LayerGraph, edge: LayerLatencies) -> SplitPlan:
    """Return the plan of an edge that has no cloud: there is one candidate."""
    stages_ms = np.array([(edge.total(), 0.0, 0.0)])
    candidates = Candidates(graph, [len(graph.layers)], [0], stages_ms, stages_ms, [None])
    return SplitPlan(graph, edge, replace(edge, source="lost", origin=""), candidates, candidates[0], 0.0)


def infer(
    task: TaskSettings,
    engine: Engine,
    partition: Partition,
    plan: SplitPlan,
    candidate: Candidate,
    link: LinkEstimate | None,
    session: EdgeSession | None,
    observe: TaskObserver,
) -> Outcome:
    """Run a task as planned, as often as it says; ``session`` may be None if nothing is sent."""
    network = partition.network
    array = synthetic_input(network.graph.input) if task.array is None else task.array
    runs = [run_once(session, partition, array.copy("K"), observe)]  # a network may work in place
    observe(Finished())
    if task.repeat > 1:  # the first run was cold: it is shown, and does not count
        runs.clear()
        for number in range(task.repeat):
            runs.append(run_once(session, partition, array.copy("K"), lambda event: None))
            observe(Progress("repeat", number + 1, task.repeat))
    guesses = top_guesses(runs[-1].output, network.labels)
    difference = None
    if task.verify:
        whole = engine.open(task.model, task.weights).run_whole(array.copy("K"))
        difference = max_difference(runs[-1].output, whole)
    return Outcome(partition, plan, candidate, link, runs, guesses, difference)


def run_once(session: EdgeSession | None, partition: Partition, array: Array, observe: TaskObserver) -> Run:
    """Run one inference, and report its events as they happen.

    Raises: NetworkError, or the error that the cloud replied.
    """
    network = partition.network
    result = partition.run([array])
    assert result is not None  # noqa: S101  # for mypy: it was not told to stop
    observe(EdgeComputed(network.name, result.compute_ms))
    if session is None or is_whole(partition):
        return Run(result.arrays[0], stage_times(result.compute_ms, None), 0)
    remote = session.infer(request_of(network, partition.edge_nodes), result.arrays, partial(observe, Sent()))
    check_reply([network.graph.output], remote.arrays)
    times = stage_times(result.compute_ms, remote)
    observe(Replied(network.name, times))
    return Run(remote.arrays[0], times, remote.sent_bytes)


def learn(corrections: Corrections, keys: StageKeys, outcome: Outcome) -> None:
    """Correct the predictions of the stages by their measured times; a link that the user gave corrects nothing."""
    predicted, measured = outcome.candidate.stages, outcome.measured
    for stage, key in zip(("edge_ms", "transfer_ms", "cloud_ms"), keys, strict=True):
        if stage != "transfer_ms" or (outcome.link and outcome.link.source is not LinkSource.GIVEN):
            corrections.learn(key, getattr(predicted, stage) / corrections.factor(key), getattr(measured, stage))
    corrections.save()


def prepare(
    task: TaskSettings, session: EdgeSession, edge_nodes: frozenset[int], here: EdgeSide, observe: TaskObserver
) -> Partition:
    """Return the edge partition; meanwhile the cloud loads its own, unless it has none."""
    graph = here.graph
    is_split = len(edge_nodes) < len(graph.nodes)
    if is_split:
        session.ask_to_prepare(Prepare(task.model, pack_nodes(graph, edge_nodes), graph.digest))
    partition = here.partition(edge_nodes)
    if is_split:
        session.wait_until_ready(partition.network.weights_digest)
        observe(Prepared())
    return partition


def request_of(network: NetworkRef, edge_nodes: frozenset[int]) -> Request:
    """Return the message that asks the cloud for its partition of a cut."""
    graph = network.graph
    return Request(network.name, pack_nodes(graph, edge_nodes), graph.digest, network.weights_digest)


def check_reply(expected: list[TensorSpec], arrays: tuple[Array, ...]) -> None:
    """Compare the arrays of a reply with the outputs of the network.

    Raises: ProtocolError: another number, shape or type.
    """
    wanted = [(spec.dtype, spec.shape) for spec in expected]
    came = [(dtype_of(array), array.shape) for array in arrays]
    if came != wanted:
        raise ProtocolError(f"the cloud replied {came}, expected {wanted}")


def answered(outcome: Outcome) -> Answered:
    """Return the last event of a task."""
    return Answered(
        outcome.guesses,
        outcome.partition.network.weights.seeded,
        outcome.candidate.stages,
        outcome.measured,
        outcome.timings,
        len(outcome.runs),
        outcome.plan.origins,
        outcome.where,
        outcome.max_abs_diff,
    )
