"""What each strategy's cut takes, predicted and measured, over an emulated link; and the best cut between blocks.

    python -m tests.benchmark.strategies [RATE_MBIT ...]

Every strategy plans as `edge_api.py` does: with the shipped predictors, the cloud's own word, and a measured link. Then
all cuts run in turn, in rounds; a latency is the median of its rounds. The edge computes with one thread. This machine
is no small device, so every figure is given for a slower edge, too: of the same runs, the part of the edge counts as
often as that edge is slower.

The best cut is searched among all points at which a single tensor crosses. Left out are those that cannot win: their
halves, run on this machine without a link (the fastest of some runs, less a tenth), and their bytes at the full rate
of the link already take longer than the fastest of the strategies' cuts did. All others are measured over the link.

Figures of other rates, from earlier runs, are kept in results/strategies.json and shown along.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deployment import SplitPlan, plan_split
from edge_task import Task, cloud_latencies, edge_latencies, request_of
from models.graph import LayerGraph
from models.zoo import Network, WeightsSource, load_network
from net.monitor_client import estimate_link
from net.session import EdgeSession
from predictor.strategies import Strategy
from tests.benchmark.common import RESULTS, save
from tests.benchmark.links import CLOUD_IP, emulated_link, on_cloud_side, on_edge_side, why_not
from utils.inference_utils import random_input, run_half, use_threads
from utils.timing import now_ms

MODELS = ("resnet18", "googlenet", "densenet121", "inception_v3")
RATES_MBIT = (1.0, 5.0, 20.0, 100.0)
RTT_MS = 10.0
HALF_RUNS = 4
SAFETY = 0.9  # halves may run this much faster than they ever did when they ran alone
MIN_ROUNDS, MAX_ROUNDS, BUDGET_MS = 3, 7, 1500.0  # of every cut
SLOWDOWNS = (1.0, 8.0)  # of the edge: this machine, and about a small board

Cut = frozenset[int]
Json = dict[str, Any]


# ---------------------------------------------------------------- on the edge's side of the link


class Taken(NamedTuple):
    """What one task took, ms."""

    edge_ms: float
    rest_ms: float

    def on(self, slowdown: float) -> float:
        """Return what it would take with a slower edge, ms."""
        return slowdown * self.edge_ms + self.rest_ms


class Runner:
    """Runs cuts of one network with the cloud, and tells how long each took."""

    def __init__(self, network: Network, session: EdgeSession) -> None:
        self.network, self.session = network, session
        self.tensor = random_input(network.graph.input.shape)

    def run(self, cut: Cut) -> Taken:
        """Run one task."""
        half = run_half(self.network.split(cut).edge, [self.tensor])
        start_ms = now_ms()
        if len(cut) < len(self.network.graph.nodes):
            self.session.infer(request_of(self.network, cut), half.tensors)
        return Taken(half.latency_ms, now_ms() - start_ms)

    def warm_up(self, cut: Cut) -> Taken:
        """Let both sides get ready; return what a task took then."""
        if len(cut) < len(self.network.graph.nodes):
            self.session.ask_to_prepare(request_of(self.network, cut).preparation)
            self.session.wait_until_ready(self.network.weights_digest)
        self.run(cut)
        return self.run(cut)

    def run_all(self, cuts: Mapping[Cut, Taken]) -> dict[Cut, list[Taken]]:
        """Run cuts in turn, in rounds, those that take long less often; return what each run took."""
        rounds = {cut: max(MIN_ROUNDS, min(MAX_ROUNDS, int(BUDGET_MS / sum(about)))) for cut, about in cuts.items()}
        taken: dict[Cut, list[Taken]] = {cut: [] for cut in cuts}
        for number in range(MAX_ROUNDS):
            for cut in random.sample(list(cuts), len(cuts)):  # each is as often the first after a long wait
                if number < rounds[cut]:
                    taken[cut].append(self.run(cut))
        return taken


def least_taken(network: Network, rate_mbit: float, cloud_threads: int) -> dict[Cut, Taken]:
    """Return what every cut between blocks takes at least: its halves without a link, and its bytes on the link."""
    graph = network.graph
    tensor = random_input(graph.input.shape)
    cuts = [graph.edge_nodes(point) for point in graph.block_points]
    inputs = [run_half(network.split(cut).edge, [tensor]).tensors for cut in cuts]
    edge_ms = [fastest_ms(network, "edge", cut, (tensor,)) for cut in cuts]
    use_threads(cloud_threads)
    cloud_ms = [fastest_ms(network, "cloud", cut, crossing) for cut, crossing in zip(cuts, inputs, strict=True)]
    use_threads(1)
    link_ms = [least_link_ms(graph, cut, rate_mbit) for cut in cuts]
    return {
        cut: Taken(SAFETY * edge, SAFETY * cloud + link)
        for cut, edge, cloud, link in zip(cuts, edge_ms, cloud_ms, link_ms, strict=True)
    }


def fastest_ms(network: Network, side: str, cut: Cut, tensors: Sequence[Any]) -> float:
    """Return the least time that one half of a cut took, ms; an empty half takes none."""
    if len(cut) == (1 if side == "edge" else len(network.graph.nodes)):
        return 0.0
    half = getattr(network.split(cut), side)
    return min(run_half(half, [tensor.clone() for tensor in tensors]).latency_ms for _ in range(HALF_RUNS))


def least_link_ms(graph: LayerGraph, cut: Cut, rate_mbit: float) -> float:
    """Return what no link of this rate can go below."""
    if len(cut) == len(graph.nodes):
        return 0.0
    crossing_bytes = sum(node.output_bytes for node in graph.crossing(cut))
    return RTT_MS + crossing_bytes * 8 / (rate_mbit * 1e6) * 1e3


def measure_model(model: str, rate_mbit: float, ports: Sequence[int]) -> list[Json]:
    """Return the figures of one network on the link of the moment, for every edge."""
    network = load_network(model)
    graph = network.graph
    with EdgeSession.open(CLOUD_IP, ports[0]) as session:
        plans = make_plans(model, graph, session, ports)
        runner = Runner(network, session)
        chosen = dict.fromkeys(plan.edge_nodes(plan.best) for of_edge in plans.values() for plan in of_edge.values())
        about = {cut: runner.warm_up(cut) for cut in chosen}
        least = least_taken(network, rate_mbit, session.cloud["threads"])
        for slowdown in SLOWDOWNS:
            limit_ms = min(taken.on(slowdown) for taken in about.values())
            contenders = [cut for cut, taken in least.items() if taken.on(slowdown) < limit_ms and cut not in about]
            about |= {cut: runner.warm_up(cut) for cut in contenders}
        taken = runner.run_all(about)
    times = [{**describe(graph, cut), "edge_ms_rest_ms": runs} for cut, runs in taken.items()]
    head = {"model": model, "rate_mbit": rate_mbit, "boundaries": len(least), "runs": times}
    return [
        {**head, "slowdown": slowdown, **figures(graph, plans[slowdown], taken, set(least), slowdown)}
        for slowdown in SLOWDOWNS
    ]


def figures(
    graph: LayerGraph,
    plans: Mapping[Strategy, SplitPlan],
    taken: Mapping[Cut, Sequence[Taken]],
    boundaries: set[Cut],
    slowdown: float,
) -> Json:
    """Return what the strategies' cuts took with one edge, beside the best cut between blocks."""
    medians = {cut: statistics.median(run.on(slowdown) for run in runs) for cut, runs in taken.items()}
    best = min(boundaries & medians.keys(), key=medians.__getitem__)
    return {
        "strategies": {
            str(strategy): {
                **describe(graph, plan.edge_nodes(plan.best)),
                "predicted_ms": plan.best.stages.total_ms,
                "measured_ms": medians[plan.edge_nodes(plan.best)],
                "beyond_best": medians[plan.edge_nodes(plan.best)] / medians[best] - 1,
            }
            for strategy, plan in plans.items()
        },
        "best": {**describe(graph, best), "measured_ms": medians[best]},
        "boundaries_measured": len(boundaries & medians.keys()),
    }


def make_plans(
    model: str, graph: LayerGraph, session: EdgeSession, ports: Sequence[int]
) -> dict[float, dict[Strategy, SplitPlan]]:
    """Return the plan of every strategy, for every edge."""
    task = Task(model, WeightsSource(), threads=1)
    link = estimate_link(CLOUD_IP, ports[1])
    edge, cloud = edge_latencies(task, graph), cloud_latencies(task, session, graph)
    return {
        slowdown: {
            strategy: plan_split(
                graph, edge.scaled(slowdown), cloud, link.rate_bytes_per_s, link.exchange_ms, strategy=strategy
            )
            for strategy in Strategy
        }
        for slowdown in SLOWDOWNS
    }


def describe(graph: LayerGraph, cut: Cut) -> Json:
    """Return what tells a cut from others."""
    crossing = graph.crossing(cut) if len(cut) < len(graph.nodes) else ()
    return {
        "edge_nodes": len(cut),
        "nodes": len(graph.nodes),
        "crossing": [node.name for node in crossing],
        "crossing_bytes": sum(node.output_bytes for node in crossing),
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


def measure_rate(rate_mbit: float) -> list[Json]:
    """Return the figures of all networks at one rate."""
    with (
        emulated_link(rate_mbit, RTT_MS),
        on_cloud_side(["cloud_api.py", "-p", "0", "--monitor-port", "0"]) as cloud,
    ):
        done = on_edge_side(["-m", "tests.benchmark.strategies", "edge", str(rate_mbit), *map(str, cloud.ports)])
    if done.returncode:
        raise SystemExit(done.stderr)
    rows: list[Json] = json.loads(done.stdout)
    return rows


def kept_rows() -> list[Json]:
    """Return the figures of earlier runs."""
    path = RESULTS / "strategies.json"
    rows: list[Json] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def main() -> None:
    if sys.argv[1:2] == ["edge"]:
        rate_mbit, *ports = (float(text) for text in sys.argv[2:])
        use_threads(1)
        measured = [measure_model(model, rate_mbit, [int(port) for port in ports]) for model in MODELS]
        print(json.dumps([row for rows in measured for row in rows]))
        return
    if reason := why_not():
        raise SystemExit(reason)
    for rate_mbit in [float(text) for text in sys.argv[1:]] or RATES_MBIT:
        others = [row for row in kept_rows() if row["rate_mbit"] != rate_mbit]
        rows = [*others, *measure_rate(rate_mbit)]
        rows.sort(key=lambda row: (row["slowdown"], MODELS.index(row["model"]), row["rate_mbit"]))
        save("strategies", {"rows": rows})
    print_table(kept_rows())
    plot(kept_rows())


if __name__ == "__main__":
    main()
