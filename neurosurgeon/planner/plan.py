"""A split plan: every candidate cut of a network on a link, with predicted stage times, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph, Node
from neurosurgeon.planner.chain_search import Objective, best_point, chain_candidates, cost_ms
from neurosurgeon.planner.dag_search import DagCosts
from neurosurgeon.planner.memory import EdgeMemory, edge_memory, memory_at_points
from neurosurgeon.planner.strategies import Strategy, inner_cuts, points_of, search_of
from neurosurgeon.planner.transfer import TENSOR_MS, WARM, Sender, transfer_time_ms
from neurosurgeon.predictor.latencies import Interval, LayerLatencies
from neurosurgeon.utils.errors import PlanningError
from neurosurgeon.utils.timing import StageTimes, now_ms
from neurosurgeon.utils.units import readable_bytes, s_to_ms

if TYPE_CHECKING:  # installed by who wants tables
    import pandas


@dataclass(frozen=True, slots=True)
class Candidate:
    """One cut: what crosses, and what each stage is predicted to take."""

    point: int  # the number of layers on the edge
    layer: str  # the layer it follows, or those whose tensors cross; "None" for point 0
    stages: StageTimes
    busy: StageTimes  # how long it keeps edge, link and cloud from other tasks: no round trip, no waiting
    crossing_bytes: int
    inside: frozenset[int] | None = None  # the nodes on the edge of a cut that is no partition point

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "point": self.point,
            "layer": self.layer,
            **self.stages.as_dict(),
            "crossing_bytes": self.crossing_bytes,
        }


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Every candidate for one model on one link, and the best of them."""

    graph: LayerGraph
    edge: LayerLatencies
    cloud: LayerLatencies
    candidates: Sequence[Candidate]  # by number of layers on the edge
    best: Candidate
    decision_ms: float
    objective: Objective = Objective.LATENCY
    strategy: Strategy = Strategy.DADS

    def edge_nodes(self, candidate: Candidate) -> frozenset[int]:
        """Return the nodes that a candidate leaves on the edge."""
        return self.graph.edge_nodes(candidate.point) if candidate.inside is None else candidate.inside

    def crossing(self, candidate: Candidate) -> tuple[Node, ...]:
        """Return the nodes whose tensors cross; none where the whole network is on the edge."""
        return self.graph.crossing(self.edge_nodes(candidate)) if candidate.crossing_bytes else ()

    def memory(self, candidate: Candidate) -> EdgeMemory:
        """Return what the edge has to hold."""
        return edge_memory(self.graph, self.edge_nodes(candidate))

    def cloud_parameter_bytes(self, candidate: Candidate) -> int:
        """Return the bytes of the parameters that the cloud half needs."""
        edge_nodes = self.edge_nodes(candidate)
        return self.graph.parameter_bytes(node.index for node in self.graph.nodes if node.index not in edge_nodes)

    def cost_ms(self, candidate: Candidate) -> tuple[float, float]:
        """Return what the plan minimises, and what decides among equals."""
        return cost_ms(self.objective, candidate.stages, candidate.busy)

    def interval(self, candidate: Candidate) -> Interval:
        """Return where the total of a candidate lies, nine times in ten; the link's share is taken as certain."""
        total_ms = candidate.stages.total_ms
        on_edge = {self.graph.nodes[index].layer for index in self.edge_nodes(candidate)}
        in_cloud = set(range(len(self.graph.layers))) - on_edge
        halves = (self.edge.of(sorted(on_edge - {-1})), self.cloud.of(sorted(in_cloud)))
        intervals = [(half.total(), half.interval()) for half in halves]
        below_ms = math.hypot(*(total - interval.low_ms for total, interval in intervals))
        above_ms = math.hypot(*(interval.high_ms - total for total, interval in intervals))
        return Interval(total_ms - below_ms, total_ms + above_ms)

    @property
    def origins(self) -> dict[str, str]:
        """Whose data the predictions of each side come from."""
        return {"edge": self.edge.origin, "cloud": self.cloud.origin}

    @property
    def runner_up(self) -> Candidate | None:
        """The best of the other candidates; None where there is no other."""
        others = [candidate for candidate in self.candidates if candidate is not self.best]
        return min(others, key=self.cost_ms, default=None)

    @property
    def is_too_close_to_call(self) -> bool:
        """Whether the runner-up lies inside the interval of the best; the bottleneck stages have the same errors."""
        runner_up = self.runner_up
        if runner_up is None:
            return False
        best_ms, next_ms = self.cost_ms(self.best)[0], self.cost_ms(runner_up)[0]
        return next_ms * self.best.stages.total_ms <= self.interval(self.best).high_ms * best_ms

    def cut_dict(self, candidate: Candidate) -> dict[str, Any]:
        """Return a cut as a JSON object: where it is, the transferred tensors, and the memory that each side needs."""
        memory = self.memory(candidate)
        return {
            "strategy": str(self.strategy),
            "edge_nodes": sorted(self.edge_nodes(candidate)),
            "crossing": tensor_documents(self.crossing(candidate)),
            "edge_parameter_bytes": memory.parameter_bytes,
            "edge_activation_bytes": memory.activation_bytes,
            "cloud_parameter_bytes": self.cloud_parameter_bytes(candidate),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the whole plan as a JSON object: layers, candidates, the best one, and how sure it is."""
        layers = [
            {
                "index": layer.index + 1,
                "name": layer.name,
                "kind": str(layer.kind),
                "output_shape": list(layer.output.shape),
                "output_bytes": layer.output.size_bytes,
                "flops": layer.flops,
                "edge_ms": edge_ms,
                "cloud_ms": cloud_ms,
            }
            for layer, edge_ms, cloud_ms in zip(
                self.graph.layers, self.edge.latency_ms, self.cloud.latency_ms, strict=True
            )
        ]
        return {
            "model": self.graph.model,
            "layers": layers,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "best": self.best.to_dict(),
            **self.cut_dict(self.best),
            "best_interval_ms": list(self.interval(self.best)),
            "runner_up": self.runner_up and self.runner_up.to_dict(),
            "too_close_to_call": self.is_too_close_to_call,
            "extrapolated": {"edge": list(self.edge.extrapolated), "cloud": list(self.cloud.extrapolated)},
            "predictor": {"edge": self.edge.source, "cloud": self.cloud.source},
            "predicted_from": self.origins,
            "decision_ms": self.decision_ms,
        }

    def to_frame(self) -> pandas.DataFrame:
        """Return the candidates as a table. Needs pandas."""
        import pandas

        return pandas.DataFrame([candidate.to_dict() for candidate in self.candidates])


def plan_split(
    graph: LayerGraph,
    edge: LayerLatencies,
    cloud: LayerLatencies,
    rate_bytes_per_s: float,
    rtt_ms: float,
    transfer_factor: float = 1.0,
    *,
    queue_ms: float = 0.0,
    objective: Objective = Objective.LATENCY,
    sender: Sender = WARM,
    strategy: Strategy = Strategy.DADS,
    max_edge_bytes: float = math.inf,
) -> SplitPlan:
    """Return the plan for a model on a link, from the latencies of its layers on both sides.

    Args:   transfer_factor: how much longer than computed transfers were of late.
            queue_ms: how long a task waits in the cloud before it is computed.
            sender: what the edge's end of the connection may send at once.
            max_edge_bytes: no candidate has more than this in parameters and live tensors on the edge.
    Raises: PlanningError: the latencies are not those of the graph's layers, or no cut fits.
    """
    start_ms = now_ms()
    planner = _Planner(graph, edge, cloud, rate_bytes_per_s, rtt_ms, transfer_factor, queue_ms, sender)
    candidates = planner.at_points(points_of(strategy, graph))
    if max_edge_bytes < math.inf:
        memory = memory_at_points(graph)
        candidates = [found for found in candidates if memory[found.point].total_bytes <= max_edge_bytes]
    if strategy is Strategy.DADS and not graph.is_chain:
        candidates += planner.inside_blocks(objective, max_edge_bytes)
        candidates.sort(key=lambda candidate: candidate.point)
    if not candidates:
        limit = readable_bytes(int(max_edge_bytes))
        raise PlanningError(f"no cut of {graph.model} that {strategy} considers fits into {limit} on the edge")
    best = candidates[best_point([c.stages for c in candidates], [c.busy for c in candidates], objective)]
    return SplitPlan(graph, edge, cloud, candidates, best, now_ms() - start_ms, objective, strategy)


@dataclass(frozen=True, slots=True)
class _Planner:
    """Makes candidates of cuts; see `plan_split`."""

    graph: LayerGraph
    edge: LayerLatencies
    cloud: LayerLatencies
    rate_bytes_per_s: float
    rtt_ms: float
    transfer_factor: float
    queue_ms: float
    sender: Sender

    def at_points(self, points: Sequence[int]) -> list[Candidate]:
        """Return the candidates of some partition points: those of a chain whose layers are what lies between."""
        graph, last = self.graph, len(self.graph.layers)
        if not len(self.edge.latency_ms) == len(self.cloud.latency_ms) == last:
            counts = f"{len(self.edge.latency_ms)} and {len(self.cloud.latency_ms)}"
            raise PlanningError(f"{counts} latencies are not those of the {last} layers of {graph.model}")
        ends = sorted({0, *points, last})
        edge_ms, cloud_ms = (
            [sum(side.latency_ms[start:end]) for start, end in pairwise(ends)] for side in (self.edge, self.cloud)
        )
        transfer_ms = [self._transfer_ms(graph.crossing_bytes[end], graph.crossing_counts[end]) for end in ends]
        wanted = frozenset(points)
        return [
            self._candidate(end, graph.point_name(end), times, graph.crossing_bytes[end])
            for end, times in zip(ends, chain_candidates(edge_ms, transfer_ms, cloud_ms), strict=True)
            if end in wanted
        ]

    def inside_blocks(self, objective: Objective, max_edge_bytes: float) -> list[Candidate]:
        """Return the candidates that are no partition points between blocks, but may be better."""
        sizes_bytes = np.array([float(node.sent_bytes) for node in self.graph.nodes])
        edge_ms, cloud_ms = (np.concatenate(([0.0], side.latency_ms)) for side in (self.edge, self.cloud))
        link_ms = sizes_bytes * s_to_ms(1 / self.rate_bytes_per_s)
        costs = DagCosts(edge_ms, link_ms, cloud_ms)
        if objective is Objective.LATENCY:
            tensors = np.array([len(node.outputs) for node in self.graph.nodes])
            fixed_ms = self._transfer_ms(1, tensors=0) + self.queue_ms
            costs = DagCosts(edge_ms, self.transfer_factor * (link_ms + TENSOR_MS * tensors), cloud_ms, fixed_ms)
        cuts = inner_cuts(self.graph, costs, objective, max_edge_bytes)
        return [self._inside(cut, costs) for cut in cuts]

    def _inside(self, edge_nodes: frozenset[int], costs: DagCosts) -> Candidate:
        crossing = [self.graph.nodes[index] for index in search_of(self.graph).crossing(edge_nodes)]
        size_bytes = sum(node.sent_bytes for node in crossing)
        here = list(edge_nodes)
        edge_ms = float(costs.edge_ms[here].sum())
        cloud_ms = float(np.delete(costs.cloud_ms, here).sum())
        tensors = sum(len(node.outputs) for node in crossing)
        times = StageTimes(edge_ms, self._transfer_ms(size_bytes, tensors), cloud_ms)
        name = " + ".join(node.name for node in crossing)
        return self._candidate(len(edge_nodes) - 1, name, times, size_bytes, edge_nodes)

    def _transfer_ms(self, size_bytes: int, tensors: int) -> float:
        if not size_bytes:
            return 0.0
        reply_bytes = self.graph.output.size_bytes
        computed_ms = transfer_time_ms(size_bytes, reply_bytes, self.rate_bytes_per_s, self.rtt_ms, self.sender)
        return self.transfer_factor * (computed_ms + TENSOR_MS * (tensors - 1))

    def _candidate(
        self, point: int, layer: str, times: StageTimes, size_bytes: int, inside: frozenset[int] | None = None
    ) -> Candidate:
        waited_ms = times.cloud_ms + self.queue_ms if size_bytes else 0.0
        stages = StageTimes(times.edge_ms, times.transfer_ms, waited_ms)
        busy = StageTimes(times.edge_ms, s_to_ms(size_bytes / self.rate_bytes_per_s), times.cloud_ms)
        return Candidate(point, layer, stages, busy, size_bytes, inside)


def tensor_documents(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """Return the tensors that nodes make, as the JSON interface has those that cross."""
    return [
        {"name": node.name, "shape": list(sent.shape), "dtype": sent.dtype, "bytes": sent.size_bytes}
        for node in nodes
        for sent in node.sent
    ]


def needless_link(plan: SplitPlan, rtt_ms: float) -> str:
    """Return why no link could change a plan that keeps everything on the edge, made for an infinitely fast one."""
    alone_ms, other = plan.best.stages.total_ms, plan.runner_up
    if other is None:
        return f"edge-only , {alone_ms:.2f} ms , is the only cut"
    return (
        f"edge-only takes {alone_ms:.2f} ms , any other cut at least {other.stages.total_ms:.2f} ms however fast the "
        f"link (round trip {rtt_ms:.2f} ms)"
    )
