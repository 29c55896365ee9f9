"""The deployment phase: per-layer latencies and a link become a split plan, and a reason for it.

python deployment.py -t alex_net -b 10 --rtt 5
python deployment.py -t mobile_net -b 1.25 --plot plan.png --excel plan.xlsx --json
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.graph import LayerGraph
from models.zoo import canonical_name, model_graph
from predictor.chain_search import best_point, chain_candidates
from predictor.predictor_utils import LatencyPredictor, config_path, graph_features, load_predictor
from predictor.transfer import transfer_time_ms
from utils.cli import add_predictor_files, base_parser, non_negative_float, positive_float, run_main, typed
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
    edge_ms: Sequence[float]  # (L,)
    cloud_ms: Sequence[float]  # (L,)
    candidates: Sequence[Candidate]  # (L + 1,)
    best: Candidate
    decision_ms: float


def plan_split(
    graph: LayerGraph, edge: LatencyPredictor, cloud: LatencyPredictor, rate_bytes_per_s: float, rtt_ms: float
) -> SplitPlan:
    """Return the plan for a model on a link, without running the model.

    Raises: MissingPredictorError: a layer's kind cannot be predicted.
    """
    graph_features(graph)  # belong to the graph, and are kept with it
    start_ms = now_ms()
    edge_ms, cloud_ms = edge.layer_latencies_ms(graph), cloud.layer_latencies_ms(graph)
    reply_bytes = graph.output.size_bytes
    transfer_ms = [
        transfer_time_ms(crossing, reply_bytes, rate_bytes_per_s, rtt_ms) for crossing in graph.crossing_bytes
    ]
    stages = chain_candidates(edge_ms, transfer_ms, cloud_ms)
    candidates = [
        Candidate(point, graph.point_name(point), times, graph.crossing_bytes[point])
        for point, times in enumerate(stages)
    ]
    best = candidates[best_point(stages)]
    return SplitPlan(graph, edge_ms, cloud_ms, candidates, best, now_ms() - start_ms)


def load_predictors(
    edge_config: Path | None, cloud_config: Path | None, edge_device: str = "cpu", cloud_device: str = "cpu"
) -> tuple[LatencyPredictor, LatencyPredictor]:
    """Return the predictors of the two sides; the installed ones for their devices where no file is named.

    Raises: DataSetError: a file is missing or malformed.
    """
    return (
        load_predictor(edge_config or config_path("edge", edge_device)),
        load_predictor(cloud_config or config_path("cloud", cloud_device)),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("deployment.py", __doc__)
    parser.add_argument(
        "-t", "--type", type=typed(canonical_name), required=True, metavar="MODEL", help="model to plan"
    )
    parser.add_argument(
        "-b", "--bandwidth", type=positive_float, required=True, help="uplink rate, MB/s (1 MB = 10^6 bytes)"
    )
    parser.add_argument("--rtt", type=non_negative_float, default=0.0, help="round-trip time, ms (default: 0)")
    add_predictor_files(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw layers and partition points")
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save both tables")
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: tables)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    from utils import report

    edge, cloud = load_predictors(args.edge_config, args.cloud_config)
    graph = model_graph(args.type)
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
