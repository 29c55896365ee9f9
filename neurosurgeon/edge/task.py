"""One task of the edge: plan it for the current link estimate, run it with the cloud, report it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from neurosurgeon.edge.labels import check_labels
from neurosurgeon.edge.link_thread import RECONNECT_TIMEOUT_S
from neurosurgeon.edge.outcome import Outcome, Run, is_whole, main_output, top_guesses
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
from neurosurgeon.edge.stages import StageKeys, cloud_latencies, edge_latencies, plan_task
from neurosurgeon.engine.base import Engine, Network, NetworkRef, Partition, Side
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array, Arrays, dtype_of, fits
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


def run_task(
    task: TaskSettings,
    engine: Engine,
    session: EdgeSession,
    find_link: FindLink,
    observe: TaskObserver,
    reopen: Callable[[], EdgeSession] | None = None,
    ideal: LinkEstimate | None = None,
) -> Outcome:
    """Plan, run and report one task; after a loss of the connection, go on as its settings demand. May block.

    Args:   find_link: returns the link estimate, or None if the cloud disconnected before it was known. May block.
            reopen: connects to the cloud again.
            ideal: an infinitely fast link; if the task is fastest on the edge alone even with it, no link is needed.
    Raises: NetworkError, WeightsError, PlanningError.
    """
    run = TaskRun(task, engine, observe)
    cloud: LayerLatencies | NetworkError
    try:
        cloud = cloud_latencies(task, session, run.graph)
    except NetworkError as exc:
        cloud = exc
    is_local = ideal and not isinstance(cloud, NetworkError) and run.needs_no_link(session, ideal, cloud)
    link = ideal if is_local else find_link()
    try:
        if isinstance(cloud, NetworkError):
            raise cloud
        if link is None:
            raise ConnectError("before the link was known")
        session.pace_first_task(link)
        return run.with_cloud(session, link, cloud)
    except NetworkError as exc:
        if is_connection_loss(exc) and task.on_cloud_loss is OnCloudLoss.LOCAL:
            log.warning("the cloud disconnected (%s): the task is computed on the edge", exc)
            return run.locally(link)
        if is_connection_loss(exc) and task.on_cloud_loss is OnCloudLoss.RETRY and link and reopen:
            log.warning("the cloud disconnected (%s): reconnecting", exc)
            return run.again(reopen, link)
        raise


class TaskRun:
    """A task on this machine: the latencies of its layers, and its network, which is loaded on another thread.

    Neither depends on the link: both begin before the link is known.
    """

    def __init__(self, task: TaskSettings, engine: Engine, observe: TaskObserver) -> None:
        self._task = task
        self._engine = engine
        self._observe = observe
        self.graph: LayerGraph = engine.graph(task.model)
        check_labels(task.labels, self.graph)
        self._edge = edge_latencies(task, engine, self.graph)  # before the thread starts: it may time layers
        self._open = partial(engine.open, task.model, task.weights)
        loader = ThreadPoolExecutor(1, "load")
        self._loading: Future[Network] | None = loader.submit(self._open)
        loader.shutdown(wait=False)  # the thread ends after loading, and its OpenMP threads with it

    def needs_no_link(self, session: EdgeSession, ideal: LinkEstimate, cloud: LayerLatencies) -> bool:
        """Return, and report, whether the task is fastest on the edge alone even with an infinitely fast link.

        Any other cut takes at least its two partitions and a round trip, so the plan is the same for every rate.
        """
        corrections = self._task.corrections()
        plan, candidate, _ = plan_task(self._task, self.graph, session, ideal, corrections, self._edge, cloud)
        if plan.best.boundary_bytes or candidate.boundary_bytes:
            return False
        self._observe(LinkNotNeeded(plan, ideal.rtt_ms))
        return True

    def with_cloud(self, session: EdgeSession, link: LinkEstimate, cloud: LayerLatencies) -> Outcome:
        """Plan the task for this cloud, and run it. May block.

        Raises: NetworkError, WeightsError, PlanningError.
        """
        task, corrections = self._task, self._task.corrections()
        plan, candidate, keys = plan_task(task, self.graph, session, link, corrections, self._edge, cloud)
        self._observe(Planned(plan, candidate))
        partition = self._prepare(session, plan.edge_nodes(candidate))
        outcome = self._infer(partition, plan, candidate, link, session)
        if task.learns:
            learn(corrections, keys, outcome)
            if task.repeat > 1 and task.predictor != "measured":
                self._engine.check_speed(corrections.factor(keys.edge), self._engine.threads)
        return self._reported(outcome)

    def again(self, reopen: Callable[[], EdgeSession], link: LinkEstimate) -> Outcome:
        """Reconnect, and run the task from its start. May block.

        Raises: NetworkError: the cloud was unreachable for `RECONNECT_TIMEOUT_S`.
        """
        breaker, start_ms = Breaker(), now_ms()
        while True:
            breaker.lost(now_ms())
            time.sleep(breaker.pause_ms(now_ms()) / MS_PER_S)
            try:
                with reopen() as session:
                    return self.with_cloud(session, link, cloud_latencies(self._task, session, self.graph))
            except (NetworkError, AddressError) as exc:  # without a network, names cannot be resolved, either
                is_loss = is_connection_loss(exc) or isinstance(exc, AddressError)
                if not is_loss or now_ms() - start_ms > s_to_ms(RECONNECT_TIMEOUT_S):
                    raise

    def locally(self, link: LinkEstimate | None) -> Outcome:
        """Run the whole network on this machine: the plan has one candidate."""
        stages_ms = np.array([(self._edge.total(), 0.0, 0.0)])
        candidates = Candidates(self.graph, [len(self.graph.layers)], [0], stages_ms, stages_ms, [None])
        cloud = replace(self._edge, source="lost", origin="")
        plan = SplitPlan(self.graph, self._edge, cloud, candidates, candidates[0], 0.0)
        partition = self._partition(plan.edge_nodes(plan.best))
        return self._reported(self._infer(partition, plan, plan.best, link, None))

    def _prepare(self, session: EdgeSession, edge_nodes: frozenset[int]) -> Partition:
        """Return the edge partition; meanwhile the cloud loads its own, unless it has none."""
        is_split = len(edge_nodes) < len(self.graph.nodes)
        if is_split:
            session.ask_to_prepare(Prepare(self._task.model, pack_nodes(self.graph, edge_nodes), self.graph.digest))
        partition = self._partition(edge_nodes)
        if is_split:
            session.wait_until_ready(partition.network.weights_digest)
            self._observe(Prepared())
        return partition

    def _partition(self, edge_nodes: frozenset[int]) -> Partition:
        """Return the edge partition of a cut. The other parameters are dropped: a second call loads them again.

        May block. Raises: WeightsError, PartitionError.
        """
        loading, self._loading = self._loading, None
        return (loading.result() if loading else self._open()).partition(edge_nodes, Side.EDGE)

    def _infer(
        self,
        partition: Partition,
        plan: SplitPlan,
        candidate: Candidate,
        link: LinkEstimate | None,
        session: EdgeSession | None,
    ) -> Outcome:
        """Run the planned cut, once or as often as the settings demand; ``session`` may be None if nothing is sent."""
        task, network = self._task, partition.network
        arrays = self._engine.example(task.model) if task.arrays is None else task.arrays
        runs = [run_once(session, partition, arrays, self._observe)]
        self._observe(Finished())
        if task.repeat > 1:  # the first run was cold: it is reported, and not counted
            runs.clear()
            for number in range(task.repeat):
                runs.append(run_once(session, partition, arrays, lambda event: None))
                self._observe(Progress("repeat", number + 1, task.repeat))
        guesses = top_guesses(main_output(runs[-1].outputs), task.labels or network.labels)
        verdict = None
        if task.verify:
            verdict = self._engine.open(task.model, task.weights).verify(arrays, runs[-1].outputs)
        return Outcome(partition, plan, candidate, link, runs, guesses, verdict)

    def _reported(self, outcome: Outcome) -> Outcome:
        event = Answered(
            outcome.guesses,
            outcome.partition.network.is_seeded,
            outcome.candidate.stages,
            outcome.measured,
            outcome.timings,
            len(outcome.runs),
            outcome.plan.origins,
            outcome.where,
            outcome.verdict,
        )
        self._observe(event)
        return outcome


def run_once(session: EdgeSession | None, partition: Partition, arrays: Sequence[Array], observe: TaskObserver) -> Run:
    """Run one inference, and report its events as they happen. May block.

    Raises: NetworkError, or the error that the cloud replied.
    """
    network, graph, edge_nodes = partition.network, partition.network.graph, partition.edge_nodes
    result = partition.run([array.copy("K") for array in arrays])  # a network may work in place
    assert result is not None  # noqa: S101  # for mypy: without keep_going it always ends
    observe(EdgeComputed(network.name, result.compute_ms))
    sent, made = graph.split(edge_nodes, result.arrays)
    if session is None or is_whole(partition):
        return Run(graph.assemble(edge_nodes, made), stage_times(result.compute_ms, None), 0)
    remote = session.infer(request_of(network, edge_nodes), sent, partial(observe, Sent()))
    check_reply(graph, edge_nodes, remote.arrays)
    times = stage_times(result.compute_ms, remote)
    observe(Replied(network.name, times))
    return Run(graph.assemble(edge_nodes, made, remote.arrays), times, remote.sent_bytes)


def learn(corrections: Corrections, keys: StageKeys, outcome: Outcome) -> None:
    """Correct the predictions of the stages by their measured times; a link that the user gave corrects nothing."""
    predicted, measured = outcome.candidate.stages, outcome.measured
    for stage, key in zip(("edge_ms", "transfer_ms", "cloud_ms"), keys, strict=True):
        if stage != "transfer_ms" or (outcome.link and outcome.link.source is not LinkSource.GIVEN):
            corrections.learn(key, getattr(predicted, stage) / corrections.factor(key), getattr(measured, stage))
    corrections.save()


def request_of(network: NetworkRef, edge_nodes: frozenset[int]) -> Request:
    """Return the message that requests the cloud partition of a cut."""
    graph = network.graph
    return Request(network.name, pack_nodes(graph, edge_nodes), graph.digest, network.weights_digest)


def check_reply(graph: LayerGraph, edge_nodes: frozenset[int], arrays: Arrays) -> None:
    """Compare the arrays of a reply with the outputs that the cloud makes at a cut.

    Raises: ProtocolError: another number, shape or type.
    """
    wanted = [graph.outputs[index].spec for index in graph.outputs_on(edge_nodes, edge=False)]
    if len(arrays) != len(wanted) or not all(map(fits, arrays, wanted)):
        expected = [(spec.dtype, spec.shape) for spec in wanted]
        received = [(dtype_of(array), array.shape) for array in arrays]
        raise ProtocolError(f"the cloud replied {received}, expected {expected}")
