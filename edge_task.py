"""One task of the edge: plan it for the link of the moment, run it with the cloud, report it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from deployment import Candidate, load_predictors, plan_split
from models.zoo import Network, WeightsSource, imagenet_labels, load_network, model_graph
from net.bandwidth import LinkEstimate
from net.session import EdgeSession, stage_times
from predictor.predictor_utils import LatencyPredictor
from utils.inference_utils import (
    Guess,
    check_crossing,
    image_input,
    random_input,
    run_half,
    run_whole,
    top_guesses,
    use_threads,
)
from utils.report import EdgeReport, stage_timings
from utils.timing import StageTimes, Timing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """What to run, and how."""

    model: str
    weights: WeightsSource
    device: str = "cpu"
    threads: int | None = None  # None: as many as the edge's predictors were measured with
    pixels: NDArray[np.float32] | None = None  # (224, 224, 3), normalised; None: the fixed random input
    point: int | None = None  # None: the best one
    edge_config: Path | None = None
    cloud_config: Path | None = None
    repeat: int = 1
    verify: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One inference: its answer, and what it took."""

    output: Tensor
    times: StageTimes
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished task: the plan, every run of it, and the answer."""

    network: Network
    candidate: Candidate
    runs: Sequence[Run]
    guesses: Sequence[Guess]
    max_abs_diff: float | None

    @property
    def measured(self) -> StageTimes:
        """The stages of the run with the median total."""
        return sorted((run.times for run in self.runs), key=lambda times: times.total_ms)[len(self.runs) // 2]

    @property
    def timings(self) -> dict[str, Timing]:
        """Median and spread of every stage."""
        return stage_timings([run.times for run in self.runs])


def run_task(task: Task, session: EdgeSession, link: LinkEstimate, show: EdgeReport) -> Outcome:
    """Plan, run and report one task.

    Raises: NetworkError, WeightsError, PlanningError.
    """
    candidate = plan_task(task, session, link, show)
    network = prepare(task, session, candidate.point, show)
    tensor = random_input() if task.pixels is None else image_input(task.pixels)
    runs = [run_once(session, network, candidate.point, tensor, show)]
    show.finished()
    if task.repeat > 1:  # the first run was cold: it is shown, and does not count
        turns = tqdm(range(task.repeat), desc="repeat", unit="run", disable=None)
        runs = [run_once(session, network, candidate.point, tensor, None) for _ in turns]
    labels = imagenet_labels() if network.knows_imagenet else None
    guesses = top_guesses(runs[-1].output, labels)
    difference = None
    if task.verify:
        difference = (runs[-1].output - run_whole(network, tensor)).abs().max().item()
    outcome = Outcome(network, candidate, runs, guesses, difference)
    show_outcome(outcome, show)
    return outcome


def plan_task(task: Task, session: EdgeSession, link: LinkEstimate, show: EdgeReport) -> Candidate:
    """Return the partition point to take: the best on this link, or the one that the user forces."""
    cloud_device = str(session.cloud.get("device"))
    edge, cloud = load_predictors(task.edge_config, task.cloud_config, task.device, cloud_device)
    threads = use_threads(task.threads or edge.threads)
    warn_of_other_machines(edge, {"device": task.device, "threads": threads}, "edge")
    warn_of_other_machines(cloud, session.cloud, "cloud")
    plan = plan_split(model_graph(task.model), edge, cloud, link.rate_bytes_per_s, link.rtt_ms)
    candidate = plan.best if task.point is None else plan.candidates[task.point]
    show.plan(plan.best, candidate)
    return candidate


def warn_of_other_machines(predictor: LatencyPredictor, machine: Mapping[str, Any], side: str) -> None:
    """Say that predictions are for another device or number of threads than the one that computes."""
    measured = {"device": predictor.device, "threads": predictor.threads}
    actual = {name: machine.get(name) for name in measured}
    if actual["device"] == "cuda":
        del measured["threads"], actual["threads"]
    if measured != actual:
        log.warning(
            "the %s computes with %s, but its predictors were measured with %s: collect its own with "
            "python -m predictor.collect --side %s, and pass --%s-config",
            side,
            actual,
            measured,
            side,
            side,
        )


def prepare(task: Task, session: EdgeSession, point: int, show: EdgeReport) -> Network:
    """Return the network; where anything crosses, the cloud gets its half ready in the same time."""
    crosses = point < len(model_graph(task.model).layers)
    if crosses:
        session.ask_to_prepare(task.model, point)
    network = load_network(task.model, task.weights, task.device)
    network.cut(point)
    if crosses:
        session.wait_until_ready(network.weights_digest)
        show.prepared()
    return network


def run_once(session: EdgeSession, network: Network, point: int, tensor: Tensor, show: EdgeReport | None) -> Run:
    """Run one inference; ``show`` gets its lines as they become true."""
    half = run_half(network.cut(point).edge, [tensor], network.device)
    if show:
        show.edge_done(network.name, half.latency_ms)
    if point == len(network.graph.layers):
        return Run(half.tensors[0], stage_times(half.latency_ms, None), 0)
    on_sent = show.sent if show else lambda: None
    remote = session.infer(network.name, point, network.weights_digest, half.tensors, on_sent)
    check_crossing([network.graph.output], remote.tensors)
    times = stage_times(half.latency_ms, remote)
    if show:
        show.cloud_done(network.name, times)
    return Run(remote.tensors[0], times, remote.sent_bytes)


def show_outcome(outcome: Outcome, show: EdgeReport) -> None:
    """Print the answer and the figures behind the contract's lines."""
    show.answer(outcome.guesses, outcome.network.source.seeded)
    show.comparison(outcome.candidate.stages, outcome.measured, len(outcome.runs))
    if len(outcome.runs) > 1:
        show.repeats(outcome.timings)
    if outcome.max_abs_diff is not None:
        show.verified(outcome.max_abs_diff)
