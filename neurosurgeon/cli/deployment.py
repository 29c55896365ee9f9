"""The deployment phase: per-layer latencies and a link become a split plan, and a reason for it.

python deployment.py -t alex_net -b 10 --rtt 5
python deployment.py -t mobile_net -b 1.25 --plot plan.png --excel plan.xlsx --json
python deployment.py -t googlenet -b 1 --rtt 10 --graph cut.svg --max-edge-memory 8
python deployment.py -t resnet18 --compare -b 0.1,1,10,100 --rtt 10
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from neurosurgeon import latencies
from neurosurgeon.cli.parser import (
    add_model,
    add_objective,
    add_predictor_choice,
    add_strategy,
    base_parser,
    checked,
    forget_if_asked,
    non_negative_float,
    positive_float,
)
from neurosurgeon.cli.process import run_main
from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import Catalogue
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.compare import PlanAt, compare, plans_of_all
from neurosurgeon.planner.plan import SplitPlan, plan_split
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.utils.errors import UsageError
from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s, mb_to_bytes

CURVE_POINTS = 60


def _rates(text: str) -> list[float]:
    return [positive_float(part) for part in text.split(",")]


rates_mb_per_s = checked(_rates, "a number above 0, or several with commas between them")


def main(argv: Sequence[str] | None = None, prog: str = "deployment.py") -> int:
    parser = base_parser(prog, __doc__)
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
    catalogue = Catalogue(args.model_file)
    graph = TorchEngine(catalogue).graph(catalogue.choose(args.type, args.input_size))
    forget_if_asked(args)
    edge = latencies(graph, "edge", predictor=args.predictor, config=args.edge_config)
    cloud = latencies(graph, "cloud", predictor=args.predictor, config=args.cloud_config)
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


def _plan(args: argparse.Namespace, plan_at: PlanAt) -> int:
    from neurosurgeon.reports import text

    rate_mb_per_s = args.bandwidth[0]
    plan = plan_at(mb_per_s_to_bytes_per_s(rate_mb_per_s), Strategy(args.strategy))
    document = plan.to_dict()
    if args.json:
        text.print_json(document)
    else:
        text.print_plan(plan, rate_mb_per_s, args.rtt)
    if args.excel:
        from neurosurgeon.reports.excel import save_tables

        save_tables(args.excel, {"layers": document["layers"], "candidates": document["candidates"]})
    if args.plot:
        from neurosurgeon.reports.plots import plot_plan

        plot_plan(args.plot, plan, rate_mb_per_s, args.rtt)
    if args.graph:
        from neurosurgeon.reports.drawing import draw_cut

        draw_cut(args.graph, plan.graph, plan.edge_nodes(plan.best))
    return 0


def _compare(args: argparse.Namespace, graph: LayerGraph, plan_at: PlanAt) -> int:
    from neurosurgeon.reports import text
    from neurosurgeon.reports.plots import plot_strategies

    if args.graph:
        raise UsageError("--graph draws the cut of one bandwidth: leave --compare out")
    comparison = compare(graph, plan_at, [mb_per_s_to_bytes_per_s(rate) for rate in args.bandwidth])
    document = comparison.to_dict(args.rtt)
    if args.json:
        text.print_json(document)
    else:
        text.print_comparison(comparison, args.rtt)
    if args.excel:
        from neurosurgeon.reports.excel import save_tables

        save_tables(args.excel, {"strategies": document["strategies"], "crossovers": document["crossovers"]})
    low, high = (mb_per_s_to_bytes_per_s(end(args.bandwidth)) for end in (min, max))
    rates_bytes_per_s = np.geomspace(low, high, CURVE_POINTS).tolist()
    curve = replace(comparison, rates_bytes_per_s=rates_bytes_per_s, plans=plans_of_all(plan_at, rates_bytes_per_s))
    plot_strategies(args.plot or Path(f"{graph.model}-strategies.png"), curve, args.rtt)
    return 0
