"""A split plan: the candidate cuts of a network on a link, with their predicted stage times, and the best of them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph, Node
from neurosurgeon.planner.chain_search import Floats, Objective, chain_stages, rank_cuts
from neurosurgeon.planner.dag_search import DagCosts
from neurosurgeon.planner.heavy_load import busy_times
from neurosurgeon.planner.memory import EdgeMemory, edge_memory
from neurosurgeon.planner.strategies import Strategy, inner_cuts, points_of, search_of
from neurosurgeon.planner.transfer import TENSOR_MS, WARM, Sender, transfer_time_ms
from neurosurgeon.predictor.latencies import Interval, LayerLatencies
from neurosurgeon.utils.errors import PlanningError
from neurosurgeon.utils.timing import StageTimes, now_ms
from neurosurgeon.utils.units import readable_bytes, s_to_ms

if TYPE_CHECKING:  # an optional dependency
    import pandas


@dataclass(frozen=True, slots=True)
class Candidate:
    """One cut, with its predicted stage times and the bytes to send."""

    point: int  # the number of layers on the edge
    layer: str  # the layer before the cut, or the nodes whose tensors are sent; "None" for point 0
    stages: StageTimes
    busy: StageTimes  # how long a task keeps edge, link and cloud from other tasks: no round trip, no waits
    boundary_bytes: int
    inside: frozenset[int] | None = None  # the nodes on the edge, if the cut is not at a partition point

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "point": self.point,
            "layer": self.layer,
            **self.stages.as_dict(),
            "crossing_bytes": self.boundary_bytes,
        }


@dataclass(frozen=True, eq=False)
class Candidates(Sequence[Candidate]):
    """The cuts that a plan considers, as columns; a `Candidate` is built when it is first read."""

    graph: LayerGraph
    points: Sequence[int]  # (n,), in order
    boundary_bytes: Sequence[int]  # (n,)
    stages_ms: Floats  # (n, 3)
    busy_ms: Floats  # (n, 3)
    inside: Sequence[frozenset[int] | None]  # (n,)
    _built: dict[int, Candidate] = field(init=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> list[Candidate]: ...

    def __getitem__(self, index: int | slice) -> Candidate | list[Candidate]:
        """Return the candidate with this index, always the same object, or a list of them for a slice."""
        row = range(len(self.points))[index]
        if isinstance(row, range):
            return [self[each] for each in row]
        if row not in self._built:
            inside = self.inside[row]
            name = self.graph.point_name(self.points[row])
            if inside is not None:
                name = " + ".join(node.name for node in self.graph.boundary(inside))
            stages, busy = (StageTimes(*times_ms[row].tolist()) for times_ms in (self.stages_ms, self.busy_ms))
            self._built[row] = Candidate(self.points[row], name, stages, busy, self.boundary_bytes[row], inside)
        return self._built[row]


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """The candidates for one model on one link, and the best of them."""

    graph: LayerGraph
    edge: LayerLatencies
    cloud: LayerLatencies
    candidates: Candidates  # by number of layers on the edge
    best: Candidate
    decision_ms: float
    objective: Objective = Objective.LATENCY
    strategy: Strategy = Strategy.DADS
    runner_up: Candidate | None = None  # the best of the other candidates; None: there is no other

    def edge_nodes(self, candidate: Candidate) -> frozenset[int]:
        """Return the nodes of a candidate's edge partition."""
        return self.graph.edge_nodes(candidate.point) if candidate.inside is None else candidate.inside

    def boundary(self, candidate: Candidate) -> tuple[Node, ...]:
        """Return the nodes whose tensors are sent; none if the whole network is on the edge."""
        return self.graph.boundary(self.edge_nodes(candidate)) if candidate.boundary_bytes else ()

    def memory(self, candidate: Candidate) -> EdgeMemory:
        """Return the memory that the edge partition needs."""
        return edge_memory(self.graph, self.edge_nodes(candidate))

    def interval(self, candidate: Candidate) -> Interval:
        """Return the 90 % interval of a candidate's total, ms; the time on the link is taken as certain."""
        total_ms = candidate.stages.total_ms
        widths_ms = [
            _error_widths_ms(side, layers)
            for side, layers in zip(
                (self.edge, self.cloud), self._costly_layers(candidate, Objective.LATENCY), strict=True
            )
        ]
        below_ms, above_ms = (math.hypot(*widths) for widths in zip(*widths_ms, strict=True))
        return Interval(total_ms - below_ms, total_ms + above_ms)

    @property
    def origins(self) -> dict[str, str]:
        """The source of the predictions of each side."""
        return {"edge": self.edge.origin, "cloud": self.cloud.origin}

    @property
    def is_too_close_to_call(self) -> bool:
        """Whether the errors of the predictions may have swapped the best candidate and the runner-up.

        A layer that costs the same with both cuts has the same error in both, so only the other layers count. The time
        on the link is taken as certain. Nine times in ten, errors are inside the intervals of the latencies.
        """
        if self.runner_up is None:
            return False
        widths_ms: list[float] = []
        layers = (self._costly_layers(candidate, self.objective) for candidate in (self.best, self.runner_up))
        for side, of_best, of_other in zip((self.edge, self.cloud), *layers, strict=True):
            widths_ms += [_error_widths_ms(side, of_best - of_other)[1], _error_widths_ms(side, of_other - of_best)[0]]
        return self._cost_ms(self.runner_up) - self._cost_ms(self.best) <= math.hypot(*widths_ms)

    def _cost_ms(self, candidate: Candidate) -> float:
        return candidate.stages.total_ms if self.objective is Objective.LATENCY else candidate.busy.longest_ms

    def _costly_layers(self, candidate: Candidate, objective: Objective) -> tuple[set[int], set[int]]:
        """Return the layers on the edge, and those in the cloud, whose latency is part of the candidate's cost."""
        on_edge = {self.graph.nodes[index].layer for index in self.edge_nodes(candidate)} - {-1}
        in_cloud = set(range(len(self.graph.layers))) - on_edge
        if objective is Objective.THROUGHPUT:
            busy, longest_ms = candidate.busy, candidate.busy.longest_ms
            on_edge = on_edge if busy.edge_ms == longest_ms else set()
            in_cloud = in_cloud if busy.cloud_ms == longest_ms else set()
        return on_edge, in_cloud

    def cut_dict(self, candidate: Candidate) -> dict[str, Any]:
        """Return a cut as a JSON object: its edge nodes, the transferred tensors, and the memory of each side."""
        memory, edge_nodes = self.memory(candidate), self.edge_nodes(candidate)
        cloud_nodes = frozenset(range(len(self.graph.nodes))) - edge_nodes
        return {
            "strategy": str(self.strategy),
            "edge_nodes": sorted(edge_nodes),
            "crossing": tensor_documents(self.boundary(candidate)),
            "edge_parameter_bytes": memory.parameter_bytes,
            "edge_activation_bytes": memory.activation_bytes,
            "cloud_parameter_bytes": self.graph.parameter_bytes(cloud_nodes),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON object: layers, candidates, the best one, and its interval."""
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

    Args:   transfer_factor: measured / computed time of recent transfers.
            queue_ms: time for which a task waits in the cloud before it is computed.
            sender: how much the edge may send without acknowledgements.
            max_edge_bytes: limit of parameters and live tensors on the edge, for every candidate.
    Raises: PlanningError: the latencies are not those of the graph's layers, or no cut fits.
    """
    start_ms = now_ms()
    if not len(edge.latency_ms) == len(cloud.latency_ms) == len(graph.layers):
        counts = f"{len(edge.latency_ms)} and {len(cloud.latency_ms)}"
        raise PlanningError(f"{counts} latencies are not those of the {len(graph.layers)} layers of {graph.model}")
    reply_bytes = graph.outputs_bytes
    planner = _Planner(graph, edge, cloud, reply_bytes, rate_bytes_per_s, rtt_ms, transfer_factor, queue_ms, sender)
    candidates = planner.candidates(objective, strategy, max_edge_bytes)
    if not candidates:
        limit = readable_bytes(int(max_edge_bytes))
        raise PlanningError(f"no cut of {graph.model} that {strategy} considers fits into {limit} on the edge")
    ranked = rank_cuts(candidates.stages_ms, candidates.busy_ms, objective)
    best, *others = (candidates[row] for row in ranked[:2].tolist())
    return SplitPlan(graph, edge, cloud, candidates, best, now_ms() - start_ms, objective, strategy, *others)


class _Planner(NamedTuple):
    """Makes the candidates of one plan; see `plan_split`."""

    graph: LayerGraph
    edge: LayerLatencies
    cloud: LayerLatencies
    reply_bytes: int
    rate_bytes_per_s: float
    rtt_ms: float
    transfer_factor: float
    queue_ms: float
    sender: Sender

    def candidates(self, objective: Objective, strategy: Strategy, max_edge_bytes: float) -> Candidates:
        """Return the candidates at partition points, and those inside blocks that may be better."""
        graph = self.graph
        points = points_of(strategy, graph, max_edge_bytes)
        boundaries = list(zip(graph.boundary_bytes, graph.boundary_counts, strict=True))
        transfer_ms = {boundary: self._transfer_ms(*boundary) for boundary in set(boundaries)}  # many are the same
        transfers_ms = [transfer_ms[boundary] for boundary in boundaries]
        times_ms = chain_stages(self.edge.latency_ms, transfers_ms, self.cloud.latency_ms)[points]
        sizes_bytes = [graph.boundary_bytes[point] for point in points]
        inside: list[frozenset[int] | None] = [None] * len(points)
        if strategy is Strategy.DADS and not graph.is_chain:
            costs = self._dag_costs(objective)
            for cut in inner_cuts(graph, costs, objective, max_edge_bytes):
                cut_ms, cut_bytes = self._times_of_nodes(cut, costs)
                row = bisect_right(points, len(cut) - 1)
                points.insert(row, len(cut) - 1)
                sizes_bytes.insert(row, cut_bytes)
                inside.insert(row, cut)
                times_ms = np.insert(times_ms, row, cut_ms, axis=0)
        stages_ms, busy_ms = times_ms.copy(), times_ms.copy()
        stages_ms[:, 2] += np.where(sizes_bytes, self.queue_ms, 0.0)
        busy_ms[:, 1] = np.array(sizes_bytes) * s_to_ms(1 / self.rate_bytes_per_s)
        return Candidates(graph, points, sizes_bytes, stages_ms, busy_ms, inside)

    def _transfer_ms(self, size_bytes: int, tensors: int) -> float:
        """Return the time to send tensors with this total size and to receive the reply, ms; 0 without bytes."""
        if not size_bytes:
            return 0.0
        computed_ms = transfer_time_ms(size_bytes, self.reply_bytes, self.rate_bytes_per_s, self.rtt_ms, self.sender)
        return self.transfer_factor * (computed_ms + TENSOR_MS * (tensors - 1))

    def _dag_costs(self, objective: Objective) -> DagCosts:
        """Return the costs of all nodes and tensors for an objective, ms."""
        edge_ms, cloud_ms = (np.concatenate(([0.0], side.latency_ms)) for side in (self.edge, self.cloud))
        send_ms = np.array(self.graph.sent_bytes) * s_to_ms(1 / self.rate_bytes_per_s)
        if objective is Objective.THROUGHPUT:
            return DagCosts(edge_ms, send_ms, cloud_ms)
        send_ms = self.transfer_factor * (send_ms + TENSOR_MS * np.array(self.graph.tensor_counts))
        return DagCosts(edge_ms, send_ms, cloud_ms, fixed_ms=self._transfer_ms(1, tensors=0) + self.queue_ms)

    def _times_of_nodes(self, edge_nodes: frozenset[int], costs: DagCosts) -> tuple[StageTimes, int]:
        """Return the times of edge, link and cloud, ms, with these nodes on the edge, and the bytes to send."""
        boundary = self.graph.boundary(edge_nodes)
        size_bytes = sum(node.sent_bytes for node in boundary)
        transfer_ms = self._transfer_ms(size_bytes, sum(len(node.outputs) for node in boundary))
        edge_ms, _, cloud_ms = busy_times(search_of(self.graph), costs, edge_nodes)
        return StageTimes(edge_ms, transfer_ms, cloud_ms), size_bytes


def _error_widths_ms(side: LayerLatencies, layers: Iterable[int]) -> tuple[float, float]:
    """Return how far the latency of some layers may lie below and above its prediction, ms (90 % interval)."""
    some = side.of(sorted(layers))
    total_ms, interval = some.total(), some.interval()
    return total_ms - interval.low_ms, interval.high_ms - total_ms


def tensor_documents(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    """Return the tensors that nodes make as JSON objects, in the form in which they are sent."""
    return [
        {"name": node.name, "shape": list(sent.shape), "dtype": sent.dtype, "bytes": sent.size_bytes}
        for node in nodes
        for sent in node.sent
    ]


def needless_link(plan: SplitPlan, rtt_ms: float) -> str:
    """Return why no link would change a plan with everything on the edge; the plan is for an infinitely fast link."""
    alone_ms, other = plan.best.stages.total_ms, plan.runner_up
    if other is None:
        return f"edge-only , {alone_ms:.2f} ms , is the only cut"
    return (
        f"edge-only takes {alone_ms:.2f} ms , any other cut at least {other.stages.total_ms:.2f} ms however fast the "
        f"link (round trip {rtt_ms:.2f} ms)"
    )
