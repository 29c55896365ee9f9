"""The deployment phase: plan the split of a network from the latencies of its layers and a link. Runs no network.

python deployment.py -t alex_net -b 10 --rtt 5
python deployment.py -t mobile_net -b 1.25 --plot plan.png --excel plan.xlsx --json
python deployment.py -t googlenet -b 1 --rtt 10 --graph cut.svg --max-edge-memory 8
python deployment.py -t resnet18 --compare -b 0.1,1,10,100 --rtt 10
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from neurosurgeon.cli.parser import (
    SCALED_DATA,
    add_model,
    add_objective,
    add_predictor_choice,
    add_strategy,
    base_parser,
    free_threads,
    non_negative_float,
    positive_float,
    positive_int,
)
from neurosurgeon.cli.process import run_main
from neurosurgeon.engine.torch_engine import TorchEngine, use_threads
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import Catalogue
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.compare import PlanAt, compare, plans_of_all
from neurosurgeon.planner.plan import SplitPlan, plan_split
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.reports import text
from neurosurgeon.utils.errors import UsageError
from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s, mb_to_bytes

CURVE_POINTS = 60


def rates_mb_per_s(text: str) -> list[float]:
    """Return the numbers of a text such as ``10`` or ``0.1,1,10`` (an argparse type)."""
    return [positive_float(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None, prog: str = "deployment.py") -> int:
    """Run this command; return its exit code."""
    parser = base_parser(prog, __doc__)
    add_model(parser, "plan")
    parser.add_argument(
        "-b",
        "--bandwidth",
        type=rates_mb_per_s,
        required=True,
        help="uplink rate, MB/s (1 MB is 10^6 bytes); with --compare several rates, as in 0.1,1,10,100",
    )
    parser.add_number("--rtt", type=non_negative_float, default=0.0, meaning="round-trip time, ms")
    add_predictor_choice(parser, "forest", "linear", sides={"edge": SCALED_DATA, "cloud": SCALED_DATA})
    parser.add_argument(
        "--threads",
        type=positive_int,
        help="CPU threads of the edge, without --edge-config (default: those of its data)",
    )
    parser.add_argument(
        "--cloud-threads",
        type=positive_int,
        help="CPU threads of the cloud, without --cloud-config (default: 2, as its data; 1 if other programs leave "
        "fewer cores of this machine)",
    )
    add_objective(parser)
    add_strategy(parser)
    parser.add_switch("--compare", "show each strategy's latency at each bandwidth, and where the best cut changes")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw the layers and the partition points; with --compare, the latency over bandwidth "
        "(default: none; with --compare MODEL-strategies.png)",
    )
    parser.add_argument(
        "--graph", type=Path, metavar="FILE.svg", help="draw the network and its best cut: .svg, .png, .pdf or .dot"
    )
    parser.add_argument("--excel", type=Path, metavar="FILE.xlsx", help="save the tables")
    parser.add_switch("--json", "print one JSON object, rather than tables")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    if args.compare != (len(args.bandwidth) > 1):
        raise UsageError("--compare needs two bandwidths or more, as in -b 0.1,1,10,100; a plan is for one")
    catalogue = Catalogue(args.model_file)
    graph = TorchEngine(catalogue).graph(catalogue.choose(args.type, args.input_size, args.classes))
    edge = _latencies(graph, "edge", args.predictor, args.edge_config, args.threads)
    cloud = _latencies(graph, "cloud", args.predictor, args.cloud_config, args.cloud_threads)
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


def _latencies(graph: LayerGraph, side: str, name: str, config: Path | None, threads: int | None) -> LayerLatencies:
    """Return the predicted latency of each layer on one side, ms. Without ``config``, scaled to this machine."""
    predictor = find_predictor(side, name=name, path=config)
    if config is None:
        from neurosurgeon.predictor.machine_speed import scaled_to_machine

        default_threads = free_threads(predictor.threads) if side == "cloud" else predictor.threads
        predictor = scaled_to_machine(predictor, "cpu", use_threads(threads or default_threads))
    return predictor.predict(graph)


def _plan(args: argparse.Namespace, plan_at: PlanAt) -> int:
    rate_mb_per_s = args.bandwidth[0]
    plan = plan_at(mb_per_s_to_bytes_per_s(rate_mb_per_s), Strategy(args.strategy))
    _show(args, plan.to_dict(), ("layers", "candidates"), lambda: text.print_plan(plan, rate_mb_per_s, args.rtt))
    if args.plot:
        from neurosurgeon.reports.plots import plot_plan

        plot_plan(args.plot, plan, rate_mb_per_s, args.rtt)
    if args.graph:
        from neurosurgeon.reports.drawing import draw_cut

        draw_cut(args.graph, plan.graph, plan.edge_nodes(plan.best))
    return 0


def _compare(args: argparse.Namespace, graph: LayerGraph, plan_at: PlanAt) -> int:
    from neurosurgeon.reports.plots import plot_strategies

    if args.graph:
        raise UsageError("--graph draws the cut of one bandwidth: leave --compare out")
    comparison = compare(graph, plan_at, [mb_per_s_to_bytes_per_s(rate) for rate in args.bandwidth])
    tables = ("strategies", "crossovers")
    _show(args, comparison.to_dict(args.rtt), tables, lambda: text.print_comparison(comparison, args.rtt))
    low, high = (mb_per_s_to_bytes_per_s(end(args.bandwidth)) for end in (min, max))
    rates_bytes_per_s = np.geomspace(low, high, CURVE_POINTS).tolist()
    curve = replace(comparison, rates_bytes_per_s=rates_bytes_per_s, plans=plans_of_all(plan_at, rates_bytes_per_s))
    plot_strategies(args.plot or Path(f"{graph.model}-strategies.png"), curve, args.rtt)
    return 0


def _show(
    args: argparse.Namespace, document: dict[str, Any], tables: Sequence[str], print_text: Callable[[], None]
) -> None:
    """Print a document as JSON or as text, and save some of its tables with --excel."""
    if args.json:
        text.print_json(document)
    else:
        print_text()
    if args.excel:
        from neurosurgeon.reports.excel import save_tables

        save_tables(args.excel, {name: document[name] for name in tables})
