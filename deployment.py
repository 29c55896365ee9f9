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
from models.zoo import canonical_name, model_graph
from predictor.chain_search import best_point, chain_candidates
from predictor.latencies import Interval, LayerLatencies
from predictor.predictor_utils import find_predictor
from predictor.transfer import transfer_time_ms
from utils.cli import add_predictor_choice, base_parser, non_negative_float, positive_float, run_main, typed
from utils.timing import StageTimes, now_ms
from utils.units import mb_per_s_to_bytes_per_s

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One partition point: what crosses, and what each stage is predicted to take."""

    point: int
    layer: str  # the layer it follows; "None" for point 0
    stages: StageTimes
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
        return min(others, key=lambda candidate: candidate.stages.total_ms, default=None)

    @property
    def is_too_close_to_call(self) -> bool:
        """Whether the runner-up lies inside the interval of the best."""
        runner_up = self.runner_up
        return runner_up is not None and runner_up.stages.total_ms <= self.interval(self.best).high_ms


def plan_split(
    graph: LayerGraph,
    edge: LayerLatencies,
    cloud: LayerLatencies,
    rate_bytes_per_s: float,
    rtt_ms: float,
    transfer_factor: float = 1.0,
) -> SplitPlan:
    """Return the plan for a model on a link, from the latencies of its layers on both sides.

    Args:   transfer_factor: how much longer than computed transfers were of late.
    Raises: PlanningError: the latencies are not those of the graph's layers.
    """
    start_ms = now_ms()
    reply_bytes = graph.output.size_bytes
    transfer_ms = [
        transfer_factor * transfer_time_ms(crossing, reply_bytes, rate_bytes_per_s, rtt_ms)
        for crossing in graph.crossing_bytes
    ]
    stages = chain_candidates(edge.latency_ms, transfer_ms, cloud.latency_ms)
    candidates = [
        Candidate(point, graph.point_name(point), times, graph.crossing_bytes[point])
        for point, times in enumerate(stages)
    ]
    best = candidates[best_point(stages)]
    return SplitPlan(graph, edge, cloud, candidates, best, now_ms() - start_ms)


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("deployment.py", __doc__)
    parser.add_argument(
        "-t", "--type", type=typed(canonical_name), required=True, metavar="MODEL", help="model to plan"
    )
    parser.add_argument(
        "-b", "--bandwidth", type=positive_float, required=True, help="uplink rate, MB/s (1 MB = 10^6 bytes)"
    )
    parser.add_argument("--rtt", type=non_negative_float, default=0.0, help="round-trip time, ms (default: 0)")
    add_predictor_choice(parser, "forest", "linear")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw layers and partition points")
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save both tables")
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: tables)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    from utils import report

    graph = model_graph(args.type)
    edge = find_predictor("edge", name=args.predictor, path=args.edge_config).predict(graph)
    cloud = find_predictor("cloud", name=args.predictor, path=args.cloud_config).predict(graph)
    plan = plan_split(graph, edge, cloud, mb_per_s_to_bytes_per_s(args.bandwidth), args.rtt)
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
