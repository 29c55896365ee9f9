"""One task of the edge: plan it for the link of the moment, run it with the cloud, report it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from neurosurgeon.edge.link_thread import PATIENCE_S
from neurosurgeon.edge.records import (
    Answered,
    EdgeComputed,
    Finished,
    Guess,
    LinkNotNeeded,
    Planned,
    Prepared,
    Replied,
    Sent,
    TaskObserver,
)
from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.edge.summary import printable
from neurosurgeon.engine.torch_engine import (
    as_network_input,
    check_crossing,
    image_input,
    output_digest,
    random_input,
    run_half,
    run_whole,
    stand_in,
    top_guesses,
    use_threads,
)
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.halves import EdgeHalf, edge_half
from neurosurgeon.models.zoo import Network, build_network, imagenet_labels, load_network, model_graph
from neurosurgeon.net.breaker import Breaker
from neurosurgeon.net.messages import Prepare, Request
from neurosurgeon.net.session import EdgeSession, OnCloudLoss, stage_times
from neurosurgeon.planner.plan import Candidate, SplitPlan, needless_link, plan_split
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.planner.transfer import IDLE, WARM, Sender
from neurosurgeon.predictor.correction import Corrections
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.machine_speed import DISAGREEMENT, doubt_machine_speed, scaled_to_machine
from neurosurgeon.predictor.predictor_utils import dataset_threads, find_predictor
from neurosurgeon.predictor.profile import measured_latencies
from neurosurgeon.utils.errors import AddressError, ConnectError, NetworkError, is_connection_loss
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import StageTimes, Timing, now_ms, stage_timings
from neurosurgeon.utils.units import MS_PER_S, bytes_per_s_to_mb_per_s, s_to_ms

log = logging.getLogger(__name__)

MAX_ORIGIN = 400  # characters of what a cloud says of its data


@dataclass(frozen=True, slots=True)
class Run:
    """One inference: its answer, and what it took."""

    output: Tensor
    times: StageTimes
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished task: the plan, every run of it, and the answer."""

    half: EdgeHalf
    plan: SplitPlan
    candidate: Candidate
    link: LinkEstimate | None  # infinitely fast where it was not asked for; None where the cloud was lost before
    runs: Sequence[Run]
    guesses: Sequence[Guess]
    max_abs_diff: float | None

    @property
    def where(self) -> str:
        """Where its layers ran: "edge", "cloud" or "split"."""
        if self.half.is_whole:
            return "edge"
        return "split" if len(self.half.edge_nodes) > 1 else "cloud"

    @property
    def measured(self) -> StageTimes:
        """The stages of the run with the median total."""
        return sorted((run.times for run in self.runs), key=lambda times: times.total_ms)[len(self.runs) // 2]

    @property
    def output(self) -> NDArray[np.generic]:
        """What the network returned in the last run."""
        array: NDArray[np.generic] = self.runs[-1].output.numpy()
        return array

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        half, candidate, link = self.half, self.candidate, self.link
        is_known = link is not None and math.isfinite(link.rate_bytes_per_s)
        document = {
            "model": half.name,
            "layers": len(half.graph.layers),
            "partition_point": candidate.point,
            "partition_layer": candidate.layer,
            **self.plan.cut_dict(candidate),
            "edge_parameter_bytes": half.parameter_bytes,  # those that it really has
            "device": half.device,
            "where": self.where,
            "bandwidth_mb_per_s": bytes_per_s_to_mb_per_s(link.rate_bytes_per_s) if link and is_known else None,
            "rtt_ms": link and link.rtt_ms,
            "predicted": candidate.stages.as_dict(),
            "interval_ms": list(self.plan.interval(candidate)),
            "too_close_to_call": self.plan.is_too_close_to_call,
            "predictor": {"edge": self.plan.edge.source, "cloud": self.plan.cloud.source},
            "predicted_from": self.plan.origins,
            "measured": self.measured.as_dict(),
            "sent_bytes": self.runs[-1].sent_bytes,
            "weights_digest": half.weights_digest,
            "output": output_document(self.runs[-1].output, self.guesses),
        }
        if link and not is_known:
            document["link_not_measured"] = needless_link(self.plan, link.rtt_ms)
        elif link and link.source is LinkSource.LAST:
            document["link_age_s"] = link.age_s
        if self.max_abs_diff is not None:
            document["max_abs_diff"] = self.max_abs_diff
        if len(self.runs) > 1:
            document["repeat"] = {stage: asdict(timing) for stage, timing in self.timings.items()}
        return document

    @property
    def timings(self) -> dict[str, Timing]:
        """Median and spread of every stage."""
        return stage_timings([run.times for run in self.runs])


def _build(task: TaskSettings) -> Network:
    """Return a new network for a task. Raises: WeightsError."""
    return build_network(task.model, task.weights, task.device)


FindLink = Callable[[], LinkEstimate | None]


class EdgeSide:
    """This machine's side of a task: what its layers take here, and its network, which loads in a thread."""

    def __init__(self, task: TaskSettings) -> None:
        self._task = task
        self.graph = model_graph(task.model)
        self.latencies = edge_latencies(task, self.graph)  # before the thread starts: it may time layers
        loader = ThreadPoolExecutor(1, "load")
        self._loading: Future[Network] | None = loader.submit(_build, task)
        loader.shutdown(wait=False)  # the thread ends when it has loaded, and its team of OpenMP threads with it

    def half(self, edge_nodes: frozenset[int]) -> EdgeHalf:
        """Return the edge's half of a cut. No other parameters are kept: a second call loads them again. May block.

        Raises: WeightsError, PartitionError.
        """
        loading, self._loading = self._loading, None
        return edge_half(loading.result() if loading else _build(self._task), edge_nodes)


def run_task(
    task: TaskSettings,
    session: EdgeSession,
    find_link: FindLink,
    observe: TaskObserver,
    reopen: Callable[[], EdgeSession] | None = None,
    ideal: LinkEstimate | None = None,
) -> Outcome:
    """Plan, run and report one task; where the cloud is lost on the way, go on as the task says.

    What does not depend on the link begins before the link is asked for: predicting, and loading the network.

    Args:   find_link: may wait for a measurement; returns None where the cloud was lost before the link was known.
            reopen: how to reach the cloud again.
            ideal: an infinitely fast link; if even over it the task is fastest on the edge alone, none is asked for.
    Raises: NetworkError, WeightsError, PlanningError.
    """
    link: LinkEstimate | None = None
    cloud: LayerLatencies | NetworkError
    here = EdgeSide(task)
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

    A cut then takes its two parts and a round trip: whatever rate was measured, the plan would be the same.
    """
    corrections = Corrections.load() if task.learns else Corrections()
    stages = stages_of(task, session, ideal, here.latencies, cloud, is_warm=task.repeat > 1)
    plan, candidate = plan_task(task, session, ideal, corrections, stages)
    if plan.best.crossing_bytes or candidate.crossing_bytes:
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
    plan, candidate = plan_task(task, session, link, corrections, stages)
    observe(Planned(plan, candidate))
    half = prepare(task, session, plan.edge_nodes(candidate), here, observe)
    outcome = infer(task, half, plan, candidate, link, session, observe)
    if task.learns:
        learn(corrections, stages.keys, outcome)
        if task.repeat > 1:
            doubt_speed(task, corrections.factor(stages.keys.edge))
    observe(answered(outcome))
    return outcome


def run_again(
    task: TaskSettings, reopen: Callable[[], EdgeSession], link: LinkEstimate, here: EdgeSide, observe: TaskObserver
) -> Outcome:
    """Look for the cloud again, and run the task from its start; what it has computed already, it only tells.

    Raises: NetworkError: it stayed away.
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
    half = here.half(plan.edge_nodes(plan.best))
    outcome = infer(task, half, plan, plan.best, link, None, observe)
    observe(answered(outcome))
    return outcome


def plan_alone(graph: LayerGraph, edge: LayerLatencies) -> SplitPlan:
    """Return the plan of an edge that has no cloud: there is one candidate."""
    point, stages = len(graph.layers), StageTimes(edge.total(), 0.0, 0.0)
    alone = Candidate(point, graph.point_name(point), stages, stages, 0)
    return SplitPlan(graph, edge, replace(edge, source="lost", origin=""), [alone], alone, 0.0)


def infer(
    task: TaskSettings,
    half: EdgeHalf,
    plan: SplitPlan,
    candidate: Candidate,
    link: LinkEstimate | None,
    session: EdgeSession | None,
    observe: TaskObserver,
) -> Outcome:
    """Run a task as planned, as often as it says; ``session`` may be None where nothing crosses."""
    tensor = stand_in(half.graph.input.shape) if task.pixels is None else image_input(task.pixels)
    runs = [run_once(session, half, tensor, observe)]
    observe(Finished())
    if task.repeat > 1:  # the first run was cold: it is shown, and does not count
        turns = tqdm(range(task.repeat), desc="repeat", unit="run", disable=None)
        runs = [run_once(session, half, tensor, None) for _ in turns]
    labels = imagenet_labels() if half.knows_imagenet else None
    guesses = top_guesses(runs[-1].output, labels)
    difference = None
    if task.verify:
        whole = load_network(task.model, task.weights, task.device)
        difference = (runs[-1].output - run_whole(whole, tensor)).abs().max().item()
    return Outcome(half, plan, candidate, link, runs, guesses, difference)


def plan_task(
    task: TaskSettings, session: EdgeSession, link: LinkEstimate, corrections: Corrections, stages: PredictedStages
) -> tuple[SplitPlan, Candidate]:
    """Return the plan for this edge, this cloud, and the link of the moment, and the cut to take."""
    keys = stages.keys
    edge, cloud = stages.edge.scaled(corrections.factor(keys.edge)), stages.cloud.scaled(corrections.factor(keys.cloud))
    state = session.send_state()
    never_waits = task.repeat > 1 or math.isinf(link.rate_bytes_per_s)
    sender = WARM if never_waits else Sender(*state) if state else IDLE
    plan_with = partial(
        plan_split,
        model_graph(task.model),
        edge,
        cloud,
        link.rate_bytes_per_s,
        link.exchange_ms,
        corrections.factor(keys.transfer),
        sender=sender,
    )
    plan = plan_with(strategy=task.strategy, max_edge_bytes=task.max_edge_bytes)
    if task.point is None:
        return plan, plan.best
    forced = plan_with(strategy=Strategy.NEUROSURGEON).candidates[task.point]  # which has every point
    return plan, plan.best if plan.edge_nodes(forced) == plan.edge_nodes(plan.best) else forced


class StageKeys(NamedTuple):
    """The names under which corrections of the three stages are kept."""

    edge: str
    transfer: str
    cloud: str


class PredictedStages(NamedTuple):
    """What a model's layers take on both sides by prediction, before any correction, and what corrects it."""

    edge: LayerLatencies
    cloud: LayerLatencies
    keys: StageKeys


def predicted_stages(task: TaskSettings, session: EdgeSession, link: LinkEstimate, *, is_warm: bool) -> PredictedStages:
    """Return what is predicted for a model on both sides."""
    graph = model_graph(task.model)
    edge, cloud = edge_latencies(task, graph), cloud_latencies(task, session, graph)
    return stages_of(task, session, link, edge, cloud, is_warm=is_warm)


def stages_of(
    task: TaskSettings,
    session: EdgeSession,
    link: LinkEstimate,
    edge: LayerLatencies,
    cloud: LayerLatencies,
    *,
    is_warm: bool,
) -> PredictedStages:
    """Return what is predicted for a model on both sides, and what corrects it.

    The first inference of a process also builds its kernels, so it has corrections of its own. So has every other
    prediction: who has collected new data learns anew what it misses.
    """
    phase = "warm" if is_warm else "first"
    where = f"{session.host} {session.cloud.get('device')} {session.cloud.get('threads')} {task.cloud_config}"
    this_edge = f"{task.device} {task.threads} {task.predictor} {task.edge_config}"
    keys = StageKeys(
        edge=f"{phase} edge {task.model} {this_edge} {edge.total():.4g} ms",
        transfer=f"{phase} transfer {task.model} {where} {link.source.name}",
        cloud=f"{phase} cloud {task.model} {where} {cloud.total():.4g} ms",
    )
    return PredictedStages(edge, cloud, keys)


def learn(corrections: Corrections, keys: StageKeys, outcome: Outcome) -> None:
    """Take in what the stages took; a link that the user made up teaches nothing."""
    predicted, measured = outcome.candidate.stages, outcome.measured
    for stage, key in zip(("edge_ms", "transfer_ms", "cloud_ms"), keys, strict=True):
        if stage != "transfer_ms" or (outcome.link and outcome.link.source is not LinkSource.GIVEN):
            corrections.learn(key, getattr(predicted, stage) / corrections.factor(key), getattr(measured, stage))
    corrections.save()


def doubt_speed(task: TaskSettings, edge_factor: float) -> None:
    """Have this machine's speed measured again at the next start, where warm tasks contradict it.

    Args: edge_factor: how much longer the edge partitions of a model take than predicted, noise left out.
    """
    if task.predictor != "measured" and not 1 / DISAGREEMENT <= edge_factor <= DISAGREEMENT:
        doubt_machine_speed(task.device, torch.get_num_threads())


def edge_latencies(task: TaskSettings, graph: LayerGraph) -> LayerLatencies:
    """Return what the model's layers take on this machine, predicted or measured."""
    if task.predictor == "measured":
        use_threads(task.threads or dataset_threads("edge", task.device))
        network = build_network(task.model, task.weights, task.device)  # and not kept: most of it may not be needed
        return measured_latencies(network, as_network_input(random_input(graph.input.shape), task.device))
    predictor = find_predictor("edge", task.device, task.predictor, task.edge_config)
    threads = use_threads(task.threads or predictor.threads)
    if task.edge_config is None:
        predictor = scaled_to_machine(predictor, task.device, threads)
    return predictor.predict(graph)


def cloud_latencies(task: TaskSettings, session: EdgeSession, graph: LayerGraph) -> LayerLatencies:
    """Return what the model's layers take in the cloud: as it says itself, or as the user's data says."""
    if task.cloud_config is None:
        told = session.ask_latencies(task.model, graph.digest)
        columns = (told.latency_ms, told.low_ms, told.high_ms)
        return LayerLatencies(*columns, told.source, told.extrapolated, printable(told.origin[:MAX_ORIGIN]))
    name = "linear" if task.predictor == "linear" else "forest"
    return find_predictor("cloud", str(session.cloud.get("device")), name, task.cloud_config).predict(graph)


def prepare(
    task: TaskSettings, session: EdgeSession, edge_nodes: frozenset[int], here: EdgeSide, observe: TaskObserver
) -> EdgeHalf:
    """Return the edge's half; where anything crosses, the cloud gets its own ready in the same time."""
    graph = here.graph
    crosses = len(edge_nodes) < len(graph.nodes)
    if crosses:
        session.ask_to_prepare(Prepare(task.model, pack_nodes(graph, edge_nodes), graph.digest))
    half = here.half(edge_nodes)
    if crosses:
        session.wait_until_ready(half.weights_digest)
        observe(Prepared())
    return half


def request_of(network: Network | EdgeHalf, edge_nodes: frozenset[int]) -> Request:
    """Return the message that asks the cloud for its half of a cut."""
    graph = network.graph
    return Request(network.name, pack_nodes(graph, edge_nodes), graph.digest, network.weights_digest)


def run_once(session: EdgeSession | None, half: EdgeHalf, tensor: Tensor, observe: TaskObserver | None) -> Run:
    """Run one inference; ``observe`` gets its events as they happen."""
    result = run_half(half.module, [tensor], half.device)
    if observe:
        observe(EdgeComputed(half.name, result.latency_ms))
    if session is None or half.is_whole:
        return Run(result.tensors[0], stage_times(result.latency_ms, None), 0)
    on_sent = partial(observe, Sent()) if observe else lambda: None
    remote = session.infer(request_of(half, half.edge_nodes), result.tensors, on_sent)
    check_crossing([half.graph.output], remote.specs)
    times = stage_times(result.latency_ms, remote)
    if observe:
        observe(Replied(half.name, times))
    return Run(remote.tensors[0], times, remote.sent_bytes)


def answered(outcome: Outcome) -> Answered:
    """Return the last event of a task."""
    return Answered(
        outcome.guesses,
        outcome.half.source.seeded,
        outcome.candidate.stages,
        outcome.measured,
        outcome.timings,
        len(outcome.runs),
        outcome.plan.origins,
        outcome.where,
        outcome.max_abs_diff,
    )


def output_document(output: Tensor, guesses: Sequence[Guess]) -> dict[str, Any]:
    """Return what the JSON interface says of an answer."""
    return {
        "shape": list(output.shape),
        "dtype": str(output.dtype).removeprefix("torch."),
        "digest": output_digest(output),
        "top5": [{"index": guess.index, "label": guess.label, "probability": guess.probability} for guess in guesses],
    }
