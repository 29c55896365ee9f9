"""The latency of each strategy's cut, predicted and measured, over an emulated link; and the best end of a block.

    python -m tests.benchmark.strategies [--all] [RATE_MBIT ...]

Every strategy plans as `edge_api.py` does: with the shipped predictors, the latencies of the cloud, and a measured
link. Then cuts run in rounds (`tests.benchmark.cut_runs`): those of the strategies, and every one at which a single
tensor is transferred. Cuts that cannot win are left out: their bytes at the full rate of the link, and a round trip,
take longer than one of the strategies' cuts in total. With --all these run, too, but once.

Every second round picks the best cut, and the other rounds give the latencies: medians. Figures of other rates, from
earlier runs, are kept in results/strategies.json and shown, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from neurosurgeon.cli.parser import positive_float
from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.net.monitor_client import estimate_link
from neurosurgeon.planner.plan import SplitPlan
from neurosurgeon.planner.strategies import Strategy
from tests.benchmark.common import RESULTS, kept_rows, save
from tests.benchmark.cut_runs import SLOWDOWNS, Json, Link, Runner, Runs, describe, plan_for, score
from tests.benchmark.links import CLOUD_IP, emulated_link, on_cloud_side, on_edge_side, why_not
from tests.networks import load_network

MODELS = ("resnet18", "googlenet", "densenet121", "inception_v3")
RATES_MBIT = (1.0, 5.0, 20.0, 100.0)
RTT_MS = 10.0


# ---------------------------------------------------------------- on the edge's side of the link


def measure_model(model: str, rate_mbit: float, ports: Sequence[int], *, every: bool) -> list[Json]:
    """Return the figures of one network on the link of the moment, for every edge."""
    network = load_network(model)
    graph = network.graph
    plans = make_plans(model, ports)
    chosen = [plan.edge_nodes(plan.best) for of_edge in plans.values() for plan in of_edge.values()]
    runner = Runner(network, ports[0])
    taken = runner.run_chosen_and_rivals(chosen, Link(rate_mbit, RTT_MS), every=every)
    times = [{**describe(graph, cut), "edge_ms_rest_ms": runs} for cut, runs in taken.items()]
    head = {"model": model, "rate_mbit": rate_mbit, "boundaries": len(graph.block_points), "runs": times}
    return [
        {**head, "slowdown": slowdown, **figures(graph, plans[slowdown], taken, slowdown)} for slowdown in SLOWDOWNS
    ]


def figures(graph: LayerGraph, plans: Mapping[Strategy, SplitPlan], taken: Runs, slowdown: float) -> Json:
    """Return the times of the strategies' cuts with one edge, and of the best end of a block."""
    boundaries = {graph.edge_nodes(point) for point in graph.block_points} & taken.keys()
    best, _ = score({cut: taken[cut] for cut in boundaries}, slowdown)
    _, latency_ms = score(taken, slowdown)
    return {
        "strategies": {
            str(strategy): {
                **describe(graph, plan.edge_nodes(plan.best)),
                "predicted_ms": plan.best.stages.total_ms,
                "measured_ms": latency_ms[plan.edge_nodes(plan.best)],
                "beyond_best": latency_ms[plan.edge_nodes(plan.best)] / latency_ms[best] - 1,
            }
            for strategy, plan in plans.items()
        },
        "best": {**describe(graph, best), "measured_ms": latency_ms[best]},
        "boundaries_measured": len(boundaries),
    }


def make_plans(model: str, ports: Sequence[int]) -> dict[float, dict[Strategy, SplitPlan]]:
    """Return the plan of every strategy, for every edge."""
    link = estimate_link(CLOUD_IP, ports[1])
    tasks = {strategy: TaskSettings(model, WeightsSource(), threads=1, strategy=strategy) for strategy in Strategy}
    return {
        slowdown: {strategy: plan_for(task, ports[0], link, slowdown) for strategy, task in tasks.items()}
        for slowdown in SLOWDOWNS
    }


# ---------------------------------------------------------------- the table and the plot


def print_table(rows: Sequence[Json]) -> None:
    """Print a line for every edge, network, rate and strategy."""
    print(f"latency over links of RTT {RTT_MS:g} ms, medians; beyond: of the best cut between blocks, as measured")
    print(f"{'model':<13}{'Mbit/s':>7}{'edge':>6}  {'strategy':<17}{'edge nodes':>11}", end="")
    print(f"{'predicted':>11}{'measured':>10}{'beyond':>10}")
    for row in rows:
        share = f"1/{row['slowdown']:g}"
        name = f"{row['model']:<13}{row['rate_mbit']:>7g}{share:>6}"
        for strategy, of_cut in row["strategies"].items():
            print(f"{name}  {strategy:<17}{of_cut['edge_nodes']:>5} of {of_cut['nodes']:<3}", end="")
            print(f"{of_cut['predicted_ms']:>11.1f}{of_cut['measured_ms']:>10.1f}", end="")
            print(f"{of_cut['beyond_best']:>10.1%}  {' + '.join(of_cut['crossing'])}")
        best = row["best"]
        print(
            f"{'':<28}best of {row['boundaries']} boundaries, {row['boundaries_measured']} of them measured: "
            f"{best['edge_nodes']} nodes, {best['measured_ms']:.1f} ms"
        )


def plot(rows: Sequence[Json]) -> None:
    """Draw measured (bars) and predicted (marks) latencies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 4, figsize=(22, 9), layout="constrained")
    shown = [(model, slowdown) for slowdown in SLOWDOWNS for model in MODELS]
    for axes, (model, slowdown) in zip(panels.flat, shown, strict=True):
        of_model = [row for row in rows if row["model"] == model and row["slowdown"] == slowdown]
        names = list(of_model[0]["strategies"])
        for position, name in enumerate(names):
            places = [index + (position - len(names) / 2) * 0.16 for index in range(len(of_model))]
            of_cuts = [row["strategies"][name] for row in of_model]
            axes.bar(places, [of_cut["measured_ms"] for of_cut in of_cuts], 0.14, label=name)
            axes.plot(places, [of_cut["predicted_ms"] for of_cut in of_cuts], "k_", markersize=9)
        axes.set_xticks(range(len(of_model)), [f"{row['rate_mbit']:g}" for row in of_model])
        axes.set_yscale("log")
        axes.set_xlabel("uplink, Mbit/s")
        axes.set_ylabel("latency, ms (bars measured, marks predicted)")
        axes.set_title(f"{model}, RTT {RTT_MS:g} ms" + (f", edge {slowdown:g} times slower" if slowdown > 1 else ""))
    panels[0][0].legend(fontsize=8)
    figure.savefig(RESULTS / "strategies.png", dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------- both sides


def measure_rate(rate_mbit: float, *, every: bool) -> list[Json]:
    """Return the figures of all networks at one rate."""
    with (
        emulated_link(rate_mbit, RTT_MS),
        on_cloud_side(["cloud_api.py", "-p", "0", "--monitor-port", "0"]) as cloud,
    ):
        arguments = [str(rate_mbit), *map(str, cloud.ports), *["all"] * every]
        done = on_edge_side(["-m", "tests.benchmark.strategies", "edge", *arguments], stderr=None)
    if done.returncode:
        raise SystemExit(done.returncode)
    rows: list[Json] = json.loads(done.stdout)
    return rows


def run_edge(rate_mbit: float, ports: Sequence[int], *, every: bool) -> None:
    """Measure all networks, and print the rows as JSON."""
    use_threads(1)
    turns = tqdm(MODELS, desc=f"{rate_mbit:g} Mbit/s", unit="network", disable=None)
    measured = [measure_model(model, rate_mbit, ports, every=every) for model in turns]
    print(json.dumps([row for rows in measured for row in rows]))


def main() -> None:
    if sys.argv[1:2] == ["edge"]:
        rate, port, monitor_port, *every = sys.argv[2:]
        run_edge(float(rate), [int(port), int(monitor_port)], every=bool(every))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("rates", nargs="*", type=positive_float, metavar="RATE_MBIT", help="(default: 1 5 20 100)")
    parser.add_argument("--all", action="store_true", help="run cuts that cannot win, too, once (default: off)")
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    rates_mbit: Sequence[float] = args.rates or RATES_MBIT
    for rate_mbit in rates_mbit:
        others = [row for row in kept_rows("strategies") if row["rate_mbit"] != rate_mbit]
        rows = [*others, *measure_rate(rate_mbit, every=args.all)]
        rows.sort(key=lambda row: (row["slowdown"], MODELS.index(row["model"]), row["rate_mbit"]))
        save("strategies", {"rows": rows})
    print_table(kept_rows("strategies"))
    plot(kept_rows("strategies"))


if __name__ == "__main__":
    main()
