"""The deployment phase: per-layer latencies and a link become a split plan, and a reason for it.

python deployment.py -t alex_net -b 10 --rtt 5
python deployment.py -t mobile_net -b 1.25 --plot plan.png --excel plan.xlsx --json
python deployment.py -t googlenet -b 1 --rtt 10 --graph cut.svg --max-edge-memory 8
python deployment.py -t resnet18 --compare -b 0.1,1,10,100 --rtt 10
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which need packages
    from neurosurgeon.utils.packages import name_missing_packages

    name_missing_packages()

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph, Node
from neurosurgeon.models.sources import chosen_model
from neurosurgeon.models.zoo import model_graph
from neurosurgeon.predictor.chain_search import Objective, best_point, chain_candidates, cost_ms
from neurosurgeon.predictor.crossovers import Crossover, crossovers
from neurosurgeon.predictor.dag_search import DagCosts
from neurosurgeon.predictor.latencies import Interval, LayerLatencies
from neurosurgeon.predictor.memory import EdgeMemory, edge_memory, memory_at_points
from neurosurgeon.predictor.predictor_utils import find_predictor, scaled_to_machine
from neurosurgeon.predictor.strategies import Strategy, inner_cuts, points_of, search_of
from neurosurgeon.predictor.transfer import TENSOR_MS, WARM, Sender, transfer_time_ms
from neurosurgeon.utils.cli import (
    add_model,
    add_objective,
    add_predictor_choice,
    add_strategy,
    base_parser,
    checked,
    forget_if_asked,
    non_negative_float,
    positive_float,
    run_main,
)
from neurosurgeon.utils.errors import PlanningError, UsageError
from neurosurgeon.utils.timing import StageTimes, now_ms
from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s, mb_to_bytes, readable_bytes, s_to_ms

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One cut: what crosses, and what each stage is predicted to take."""

    point: int  # the number of layers on the edge
    layer: str  # the layer it follows, or those whose tensors cross; "None" for point 0
    stages: StageTimes
    busy: StageTimes  # how long it keeps edge, link and cloud from other tasks: no round trip, no waiting
    crossing_bytes: int
    inside: frozenset[int] | None = None  # the nodes on the edge of a cut that is no partition point

    def is_same_cut(self, other: Candidate) -> bool:
        """Return whether both leave the same nodes on the edge."""
        return (self.point, self.inside) == (other.point, other.inside)


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


# ---------------------------------------------------------------- strategies beside each other

PlanAt = Callable[[float, Strategy], SplitPlan]  # a rate in bytes/s, and how to cut
CURVE_POINTS = 60


@dataclass(frozen=True, slots=True)
class Comparison:
    """What every strategy is predicted to take over bandwidth, and where the best cut changes."""

    graph: LayerGraph
    rates_bytes_per_s: Sequence[float]
    plans: Mapping[Strategy, Sequence[SplitPlan | None]]  # one for each rate; None: no cut fits
    crossovers: Sequence[Crossover[SplitPlan]]

    @property
    def origins(self) -> dict[str, str]:
        """Whose data the predictions of each side come from."""
        return next((plan.origins for plans in self.plans.values() for plan in plans if plan), {})


def compare(graph: LayerGraph, plan_at: PlanAt, rates_bytes_per_s: Sequence[float]) -> Comparison:
    """Plan with every strategy at every rate, and find the rates at which the best cut of the graph changes.

    Raises: PlanningError: nothing fits on the edge.
    """
    changes = crossovers(
        lambda rate: plan_at(rate, Strategy.DADS),
        min(rates_bytes_per_s),
        max(rates_bytes_per_s),
        lambda plan: plan.edge_nodes(plan.best),
    )
    return Comparison(graph, rates_bytes_per_s, plans_of_all(plan_at, rates_bytes_per_s), changes)


def plans_of_all(plan_at: PlanAt, rates_bytes_per_s: Sequence[float]) -> dict[Strategy, list[SplitPlan | None]]:
    """Return the plan of every strategy at every rate."""
    return {strategy: [_plan_or_none(plan_at, rate, strategy) for rate in rates_bytes_per_s] for strategy in Strategy}


def _plan_or_none(plan_at: PlanAt, rate_bytes_per_s: float, strategy: Strategy) -> SplitPlan | None:
    try:
        return plan_at(rate_bytes_per_s, strategy)
    except PlanningError:
        return None


# ---------------------------------------------------------------- the command


def _rates(text: str) -> list[float]:
    return [positive_float(part) for part in text.split(",")]


rates_mb_per_s = checked(_rates, "a number above 0, or several with commas between them")


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("deployment.py", __doc__)
    add_model(parser, "plan")
    parser.add_argument(
        "-b",
        "--bandwidth",
        type=rates_mb_per_s,
        required=True,
        help="uplink rate, MB/s (1 MB = 10^6 bytes); for --compare several, as in 0.1,1,10,100",
    )
    parser.add_argument("--rtt", type=non_negative_float, default=0.0, help="round-trip time, ms (default: 0)")
    add_predictor_choice(parser, "forest", "linear")
    add_objective(parser)
    add_strategy(parser)
    parser.add_argument(
        "--compare",
        action="store_true",
        help="show what every strategy takes at each bandwidth, and where the best cut changes (default: off)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw layers and partition points; with --compare, latency over bandwidth "
        "(default: none; with --compare MODEL-strategies.png)",
    )
    parser.add_argument(
        "--graph", type=Path, metavar="FILE.svg", help="draw the network and its cut: .svg, .png, .pdf or .dot"
    )
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save both tables")
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: tables)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    if args.compare != (len(args.bandwidth) > 1):
        raise UsageError("--compare needs two bandwidths or more, as in -b 0.1,1,10,100; a plan is for one")
    graph = model_graph(chosen_model(args.type, args.model_file, args.input_size))
    forget_if_asked(args)
    edge = _latencies("edge", args.predictor, args.edge_config, graph)
    cloud = _latencies("cloud", args.predictor, args.cloud_config, graph)
    max_edge_bytes = mb_to_bytes(args.max_edge_memory) if args.max_edge_memory else math.inf

    def plan_at(rate_bytes_per_s: float, strategy: Strategy) -> SplitPlan:
        return plan_split(
            graph,
            edge,
            cloud,
            rate_bytes_per_s,
            args.rtt,
            objective=Objective(args.objective),
            strategy=strategy,
            max_edge_bytes=max_edge_bytes,
        )

    return _compare(args, graph, plan_at) if args.compare else _plan(args, plan_at)


def _latencies(side: str, name: str, config: Path | None, graph: LayerGraph) -> LayerLatencies:
    """Return what a model's layers take on one side: on this machine, or as the user's data says."""
    predictor = find_predictor(side, name=name, path=config)
    if config is None:
        predictor = scaled_to_machine(predictor, "cpu", min(predictor.threads, os.cpu_count() or 1))
    return predictor.predict(graph)


def _plan(args: argparse.Namespace, plan_at: PlanAt) -> int:
    from neurosurgeon.utils import report

    rate_mb_per_s = args.bandwidth[0]
    plan = plan_at(mb_per_s_to_bytes_per_s(rate_mb_per_s), Strategy(args.strategy))
    document = report.plan_document(plan)
    if args.json:
        report.print_json(document)
    else:
        report.print_plan(plan, rate_mb_per_s, args.rtt)
    if args.excel:
        from neurosurgeon.utils.excel_utils import save_tables

        save_tables(args.excel, {"layers": document["layers"], "candidates": document["candidates"]})
    if args.plot:
        from neurosurgeon.utils.plots import plot_plan

        plot_plan(args.plot, plan, rate_mb_per_s, args.rtt)
    if args.graph:
        from neurosurgeon.utils.graph_drawing import draw_cut

        draw_cut(args.graph, plan.graph, plan.edge_nodes(plan.best))
    return 0


def _compare(args: argparse.Namespace, graph: LayerGraph, plan_at: PlanAt) -> int:
    from neurosurgeon.utils import report
    from neurosurgeon.utils.plots import plot_strategies

    if args.graph:
        raise UsageError("--graph draws the cut of one bandwidth: leave --compare out")
    comparison = compare(graph, plan_at, [mb_per_s_to_bytes_per_s(rate) for rate in args.bandwidth])
    document = report.comparison_document(comparison, args.rtt)
    if args.json:
        report.print_json(document)
    else:
        report.print_comparison(comparison, args.rtt)
    if args.excel:
        from neurosurgeon.utils.excel_utils import save_tables

        save_tables(args.excel, {"strategies": document["strategies"], "crossovers": document["crossovers"]})
    low, high = (mb_per_s_to_bytes_per_s(end(args.bandwidth)) for end in (min, max))
    rates_bytes_per_s = np.geomspace(low, high, CURVE_POINTS).tolist()
    curve = replace(comparison, rates_bytes_per_s=rates_bytes_per_s, plans=plans_of_all(plan_at, rates_bytes_per_s))
    plot_strategies(args.plot or Path(f"{graph.model}-strategies.png"), curve, args.rtt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
