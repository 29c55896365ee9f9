"""The deployment phase: per-layer latencies and a link become a split plan, and a reason for it.

python deployment.py -t alex_net -b 10 --rtt 5
python deployment.py -t mobile_net -b 1.25 --plot plan.png --excel plan.xlsx --json
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.graph import LayerGraph
from models.sources import chosen_model
from models.zoo import model_graph
from predictor.chain_search import Objective, best_point, chain_candidates, cost_ms
from predictor.latencies import Interval, LayerLatencies
from predictor.predictor_utils import find_predictor
from predictor.transfer import WARM, Sender, transfer_time_ms
from utils.cli import (
    add_model,
    add_objective,
    add_predictor_choice,
    base_parser,
    non_negative_float,
    positive_float,
    run_main,
)
from utils.timing import StageTimes, now_ms
from utils.units import mb_per_s_to_bytes_per_s, s_to_ms

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One partition point: what crosses, and what each stage is predicted to take."""

    point: int
    layer: str  # the layer it follows; "None" for point 0
    stages: StageTimes
    busy: StageTimes  # how long it keeps edge, link and cloud from other tasks: no round trip, no waiting
    crossing_bytes: int


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Every candidate for one model on one link, and the best of them."""

    graph: LayerGraph
    edge: LayerLatencies
    cloud: LayerLatencies
    candidates: Sequence[Candidate]  # (L + 1,)
    best: Candidate
    decision_ms: float
    objective: Objective = Objective.LATENCY

    def edge_nodes(self, candidate: Candidate) -> frozenset[int]:
        """Return the nodes that a candidate leaves on the edge."""
        return self.graph.edge_nodes(candidate.point)

    def cost_ms(self, candidate: Candidate) -> tuple[float, float]:
        """Return what the plan minimises, and what decides among equals."""
        return cost_ms(self.objective, candidate.stages, candidate.busy)

    def interval(self, candidate: Candidate) -> Interval:
        """Return where the total of a candidate lies, nine times in ten; the link's share is taken as certain."""
        total_ms, point = candidate.stages.total_ms, candidate.point
        halves = ((self.edge, slice(0, point)), (self.cloud, slice(point, None)))
        intervals = [(side.total(layers), side.interval(layers)) for side, layers in halves]
        below_ms = math.hypot(*(total - interval.low_ms for total, interval in intervals))
        above_ms = math.hypot(*(interval.high_ms - total for total, interval in intervals))
        return Interval(total_ms - below_ms, total_ms + above_ms)

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
) -> SplitPlan:
    """Return the plan for a model on a link, from the latencies of its layers on both sides.

    Args:   transfer_factor: how much longer than computed transfers were of late.
            queue_ms: how long a task waits in the cloud before it is computed.
            sender: what the edge's end of the connection may send at once.
    Raises: PlanningError: the latencies are not those of the graph's layers.
    """
    start_ms = now_ms()
    reply_bytes = graph.output.size_bytes
    transfer_ms = [
        transfer_factor * transfer_time_ms(crossing, reply_bytes, rate_bytes_per_s, rtt_ms, sender)
        for crossing in graph.crossing_bytes
    ]
    chain = chain_candidates(edge.latency_ms, transfer_ms, cloud.latency_ms)
    candidates = []
    for point, (times, size_bytes) in enumerate(zip(chain, graph.crossing_bytes, strict=True)):
        waited_ms = times.cloud_ms + queue_ms if size_bytes else 0.0
        stages = StageTimes(times.edge_ms, times.transfer_ms, waited_ms)
        busy = StageTimes(times.edge_ms, s_to_ms(size_bytes / rate_bytes_per_s), times.cloud_ms)
        candidates.append(Candidate(point, graph.point_name(point), stages, busy, size_bytes))
    best = candidates[best_point([c.stages for c in candidates], [c.busy for c in candidates], objective)]
    return SplitPlan(graph, edge, cloud, candidates, best, now_ms() - start_ms, objective)


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("deployment.py", __doc__)
    add_model(parser, "plan")
    parser.add_argument(
        "-b", "--bandwidth", type=positive_float, required=True, help="uplink rate, MB/s (1 MB = 10^6 bytes)"
    )
    parser.add_argument("--rtt", type=non_negative_float, default=0.0, help="round-trip time, ms (default: 0)")
    add_predictor_choice(parser, "forest", "linear")
    add_objective(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw layers and partition points")
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save both tables")
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: tables)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    from utils import report

    graph = model_graph(chosen_model(args.type, args.model_file, args.input_size))
    edge = find_predictor("edge", name=args.predictor, path=args.edge_config).predict(graph)
    cloud = find_predictor("cloud", name=args.predictor, path=args.cloud_config).predict(graph)
    rate_bytes_per_s, objective = mb_per_s_to_bytes_per_s(args.bandwidth), Objective(args.objective)
    plan = plan_split(graph, edge, cloud, rate_bytes_per_s, args.rtt, objective=objective)
    document = report.plan_document(plan)
    if args.json:
        report.print_json(document)
    else:
        report.print_plan(plan, args.bandwidth, args.rtt)
    if args.excel:
        from utils.excel_utils import save_tables

        save_tables(args.excel, {"layers": document["layers"], "candidates": document["candidates"]})
    if args.plot:
        from utils.plots import plot_plan

        plot_plan(args.plot, plan, args.bandwidth, args.rtt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
