"""Runs of a network's cuts over an emulated link, planned as `edge_api.py` plans.

A run is a task of `edge_api.py` on a connection of its own, so that none finds the window that another one left:
connect, let the cloud prepare, run the edge partition, send the boundary tensors, wait for the reply. The last three
count.
The edge computes with one thread. This machine is no small device, so latencies are given for a slower edge, too: of
the same runs, the part of the edge counts as often as that edge is slower, and the planner is told so.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.edge.stages import cloud_latencies, edge_latencies, plan_task, stage_keys
from neurosurgeon.edge.task import request_of
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.planner.plan import SplitPlan
from neurosurgeon.predictor.correction import MIN_SAMPLES, Corrections, Residuals
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import mbit_per_s_to_bytes_per_s, s_to_ms
from tests.benchmark.links import CLOUD_IP
from tests.networks import ENGINE, Network, pixels, run, split

SLOWDOWNS = (1.0, 8.0)  # of the edge: this machine, and about a small board
MIN_ROUNDS = 4  # of every cut: two that find the best one, and two that measure it
MAX_ROUNDS, BUDGET_MS = 16, 3000.0  # of every cut that is near the best one
NEAR = 1.2  # times the best latency

Cut = frozenset[int]
Json = dict[str, Any]


class Link(NamedTuple):
    """A link to emulate."""

    rate_mbit: float
    rtt_ms: float

    def least_ms(self, size_bytes: int) -> float:
        """Return the least latency of a task that sends these bytes, ms: at the full rate, with a round trip."""
        return s_to_ms(size_bytes / mbit_per_s_to_bytes_per_s(self.rate_mbit)) + self.rtt_ms if size_bytes else 0.0


class Taken(NamedTuple):
    """The time of one task, ms."""

    edge_ms: float
    rest_ms: float

    def on(self, slowdown: float) -> float:
        """Return the time with a slower edge, ms."""
        return slowdown * self.edge_ms + self.rest_ms


Runs = Mapping[Cut, Sequence[Taken]]

# ---------------------------------------------------------------- plans


def plan_for(task: TaskSettings, port: int, link: LinkEstimate, slowdown: float) -> SplitPlan:
    """Return the plan for a task, of an edge that knows from use that it takes so many times as long as predicted."""
    graph = ENGINE.graph(task.model)
    with EdgeSession.open(CLOUD_IP, port) as session:
        edge, cloud = edge_latencies(task, ENGINE, graph), cloud_latencies(task, session, graph)
        keys = stage_keys(task, session, link, edge, cloud, is_warm=False)
        residual = math.log(slowdown)
        known = Corrections({keys.edge: Residuals(residual, residual * residual, MIN_SAMPLES)})
        plan, *_ = plan_task(task, graph, session, link, known, edge, cloud)
    return plan


def describe(graph: LayerGraph, cut: Cut) -> Json:
    """Return a cut's nodes and boundary tensors, by which it differs from others."""
    boundary = graph.boundary(cut)
    return {
        "edge_nodes": len(cut),
        "nodes": len(graph.nodes),
        "crossing": [node.name for node in boundary],
        "crossing_bytes": crossing_bytes(graph, cut),
    }


def crossing_bytes(graph: LayerGraph, cut: Cut) -> int:
    """Return the bytes of the boundary tensors; none where the whole network is on the edge."""
    return sum(node.sent_bytes for node in graph.boundary(cut))


# ---------------------------------------------------------------- runs


class Runner:
    """Runs cuts of one network with the cloud, and times each."""

    def __init__(self, network: Network, port: int) -> None:
        self.network, self.port = network, port
        self.image = pixels(network.graph.inputs[0].shape)

    def run(self, cut: Cut) -> Taken:
        """Run one task."""
        edge = split(self.network, cut).edge
        if len(cut) == len(self.network.graph.nodes):
            return Taken(run(edge, [self.image]).compute_ms, 0.0)
        request = request_of(self.network.ref, cut)
        with EdgeSession.open(CLOUD_IP, self.port) as session:
            session.ask_to_prepare(request.preparation)
            session.wait_until_ready(self.network.ref.weights_digest)
            result = run(edge, [self.image])
            start_ms = now_ms()
            session.infer(request, result.arrays)
            return Taken(result.compute_ms, now_ms() - start_ms)

    def run_chosen_and_rivals(
        self, chosen: Iterable[Cut], link: Link, *, every: bool = False
    ) -> dict[Cut, list[Taken]]:
        """Run what was chosen, and all cuts with a single boundary tensor, again and again.

        Cuts that cannot win are left out: their bytes and a round trip take longer than the fastest run of a chosen cut
        in total.

        Args: every: run the cuts that are left out, too, once.
        """
        graph = self.network.graph
        first = {cut: [self.run(cut) for _ in range(2)] for cut in dict.fromkeys(chosen)}  # builds kernels, too
        fastest_ms = [min(run.on(slowdown) for runs in first.values() for run in runs) for slowdown in SLOWDOWNS]
        rivals = [cut for cut in map(graph.edge_nodes, graph.block_points) if cut not in first]
        contenders = [cut for cut in rivals if link.least_ms(crossing_bytes(graph, cut)) < max(fastest_ms)]
        for cut in contenders:
            self.run(cut)
        taken = self.run_in_rounds([*first, *contenders])
        return taken | {cut: [self.run(cut)] for cut in rivals if every and cut not in taken}

    def run_in_rounds(self, cuts: Collection[Cut]) -> dict[Cut, list[Taken]]:
        """Run cuts in rounds, in random order in each; those that are near the best one more often."""
        taken: dict[Cut, list[Taken]] = {cut: [] for cut in cuts}
        self._add_rounds(taken, dict.fromkeys(cuts, MIN_ROUNDS))
        about_ms = {cut: statistics.median(map(sum, runs)) for cut, runs in taken.items()}
        rounds = {cut: min(MAX_ROUNDS, int(BUDGET_MS / about_ms[cut])) for cut in near_best(taken)}
        self._add_rounds(taken, {cut: number - MIN_ROUNDS for cut, number in rounds.items()})
        return taken

    def _add_rounds(self, taken: dict[Cut, list[Taken]], rounds: Mapping[Cut, int]) -> None:
        turns: list[Cut] = []
        for number in range(max(rounds.values())):
            due = [cut for cut, wanted in rounds.items() if number < wanted]
            turns += random.sample(due, len(due))  # each is as often the first after a long wait
        for cut in tqdm(turns, desc=self.network.ref.name, unit="run", leave=False, disable=None):
            taken[cut].append(self.run(cut))


# ---------------------------------------------------------------- statistics of runs


def medians_ms(taken: Runs, slowdown: float) -> dict[Cut, float]:
    """Return the median time of each cut with an edge, ms."""
    return {cut: statistics.median(run.on(slowdown) for run in runs) for cut, runs in taken.items()}


def near_best(taken: Runs) -> list[Cut]:
    """Return the cuts that are about as fast as the best one, with one of the edges."""
    medians = [medians_ms(taken, slowdown) for slowdown in SLOWDOWNS]
    return [cut for cut in taken if any(of_edge[cut] <= NEAR * min(of_edge.values()) for of_edge in medians)]


def score(taken: Runs, slowdown: float) -> tuple[Cut, dict[Cut, float]]:
    """Return the best cut, by every second round, and the time of each cut in the other rounds, ms.

    The fastest of many is in part the luckiest. In rounds that did not choose it, it has no more luck than any other.
    """
    choosing = medians_ms({cut: runs[::2] for cut, runs in taken.items()}, slowdown)
    scoring = medians_ms({cut: runs[1::2] or runs for cut, runs in taken.items()}, slowdown)
    return min(choosing, key=choosing.__getitem__), scoring
