"""The cost of the chosen cut over that of the best one, all run over emulated links: six networks, six links.

    python -m tests.benchmark.regret [--link 3G ...] [-t alex_net ...]

A cloud_api.py with two threads runs in one network namespace, an edge with one thread in another. Every cut at which a
single tensor is transferred is run (`tests.benchmark.cut_runs`): every partition point of the four chains, every end of
a block of ResNet-18 and GoogLeNet, and the cuts that DADS chooses inside of blocks. A cut is left out only if it cannot
win: its bytes at the full rate of the link, and a round trip, take longer than another cut in total.

Compared are the choices of

    forest       edge_api.py: shipped predictors, the latencies of the cloud, the measured link, the transfer model
    measured     edge_api.py --predictor measured, and a cloud started with the same
    edge-only    no cut
    cloud-only   no edge
    reference    bytes / bandwidth, its features (`tests.benchmark.reference`)

The best of many measured cuts is in part the luckiest. So every second round, of rounds in random order, picks the best
cut, and the other rounds give the time of that cut and of the chosen ones. Regret is chosen / best - 1; if two cuts are
equally good, noise may make it negative. Cuts near the best one get more rounds.

Links: up to Wi-Fi the rates of the literature (JointDNN, IEEE TMC'19), with typical round trips of such networks, up to
the 50 ms that the monitor is made for; then 5G, a wire to a data centre nearby, and one to the next room. So there are
links on which each of edge-only, a cut and cloud-only should win.

Results in results/regret.json are not measured again unless --link or -t name them, so an interrupted run continues
after the last whole network. Tables go to results/regret.xlsx, a plot to results/regret.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence

from tqdm import tqdm

from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.net.monitor_client import estimate_link
from neurosurgeon.reports.excel import save_tables
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.units import bytes_per_s_to_mbit_per_s
from tests.benchmark.common import RESULTS, kept_rows, save
from tests.benchmark.cut_runs import SLOWDOWNS, Cut, Json, Link, Runner, Taken, describe, plan_for, score
from tests.benchmark.links import CLOUD_IP, emulated_link, on_cloud_side, on_edge_side, why_not
from tests.benchmark.reference import reference_point
from tests.networks import load_network

MODELS = ("alex_net", "vgg_net", "le_net", "mobile_net", "resnet18", "googlenet")
LINKS = {
    "3G": Link(1.1, 50.0),
    "LTE": Link(5.85, 40.0),
    "Wi-Fi": Link(18.88, 10.0),
    "5G": Link(50.0, 20.0),
    "100M": Link(100.0, 5.0),
    "500M": Link(500.0, 1.0),
}
OURS = ("forest", "measured")  # each is the name of predictors, on both sides
RIVALS = ("edge-only", "cloud-only", "reference")
GOOD = 0.05


# ---------------------------------------------------------------- on the edge's side of the link


def measure_model(model: str, link: Link, ports: Sequence[int]) -> Json:
    """Return the choices for a network on the current link, and the time of every run of every cut.

    Args: ports: of the cloud, its bandwidth service, and the cloud that measures its layers.
    """
    port, monitor_port, measured_port = ports
    network = load_network(model)
    found = estimate_link(CLOUD_IP, monitor_port)
    of_source = dict(zip(OURS, (port, measured_port), strict=True))
    chosen = {slowdown: choices(model, found, of_source, slowdown) for slowdown in SLOWDOWNS}
    runner = Runner(network, port)
    taken = runner.run_chosen_and_rivals([cut for cuts in chosen.values() for cut, _ in cuts.values()], link)
    places = {cut: place for place, cut in enumerate(taken)}
    return {
        "model": model,
        "measured_mbit": bytes_per_s_to_mbit_per_s(found.rate_bytes_per_s),
        "measured_rtt_ms": found.exchange_ms,
        "boundaries": len(network.graph.block_points),
        "cuts": [{**describe(network.graph, cut), "edge_ms_rest_ms": runs} for cut, runs in taken.items()],
        "choices": [
            {"slowdown": slowdown, "name": name, "cut": places[cut], "predicted_ms": predicted_ms}
            for slowdown, cuts in chosen.items()
            for name, (cut, predicted_ms) in cuts.items()
        ],
    }


def choices(
    model: str, link: LinkEstimate, ports: dict[str, int], slowdown: float
) -> dict[str, tuple[Cut, float | None]]:
    """Return the choice of each contender for an edge, and its predicted time, ms."""
    plans = {
        name: plan_for(TaskSettings(model, WeightsSource(), threads=1, predictor=name), port, link, slowdown)
        for name, port in ports.items()
    }
    graph = next(iter(plans.values())).graph
    ours = {name: (plan.edge_nodes(plan.best), plan.best.stages.total_ms) for name, plan in plans.items()}
    points = {
        "edge-only": len(graph.layers),
        "cloud-only": 0,
        "reference": reference_point(graph, link.rate_bytes_per_s, slowdown),
    }
    return {**ours, **{name: (graph.edge_nodes(point), None) for name, point in points.items()}}


# ---------------------------------------------------------------- results


def regrets(measured: Json, slowdown: float) -> Json:
    """Return the regret of every contender for one network, link and edge."""
    cuts = measured["cuts"]
    taken = {frozenset([place]): [Taken(*run) for run in cut["edge_ms_rest_ms"]] for place, cut in enumerate(cuts)}
    best, latency_ms = score(taken, slowdown)
    row = {"link": measured["link"], "model": measured["model"], "slowdown": slowdown}
    row |= {"cuts_run": len(cuts), "boundaries": measured["boundaries"]}
    row |= {"best": name_of(cuts[min(best)]), "best_ms": latency_ms[best]}
    for choice in measured["choices"]:
        if choice["slowdown"] == slowdown:
            name, cut = choice["name"], frozenset([choice["cut"]])
            row |= {name: name_of(cuts[choice["cut"]]), f"{name}_ms": latency_ms[cut]}
            row |= {
                f"{name}_predicted_ms": choice["predicted_ms"],
                f"{name}_regret": latency_ms[cut] / latency_ms[best] - 1,
            }
    return row


def cut_rows(measured: Json) -> list[Json]:
    """Return the medians of every cut that was run."""
    rows = []
    for cut in measured["cuts"]:
        medians = [statistics.median(part) for part in zip(*cut["edge_ms_rest_ms"], strict=True)]
        row = {"link": measured["link"], "model": measured["model"], "cut": name_of(cut)}
        row |= {name: cut[name] for name in ("edge_nodes", "nodes", "crossing_bytes")}
        rows.append({**row, "runs": len(cut["edge_ms_rest_ms"]), "edge_ms": medians[0], "rest_ms": medians[1]})
    return rows


def name_of(cut: Json) -> str:
    """Return the label of a cut."""
    if cut["edge_nodes"] == cut["nodes"]:
        return "edge"
    return "cloud" if cut["edge_nodes"] == 1 else " + ".join(cut["crossing"])


def summary(rows: Sequence[Json]) -> list[Json]:
    """Return, for every contender, its regret over all networks and links, and the speedup of `forest` over it."""
    found = []
    for name in (*OURS, *RIVALS):
        regret = [row[f"{name}_regret"] for row in rows]
        ratios = [row[f"{name}_ms"] / row[f"{OURS[0]}_ms"] for row in rows]
        found.append(
            {
                "choice of": name,
                "mean_regret": statistics.fmean(regret),
                "worst_regret": max(regret),
                "within_5_percent": sum(value <= GOOD for value in regret),
                "of": len(regret),
                "speed_up_of_forest": statistics.geometric_mean(ratios),
                "largest_speed_up": max(ratios),
            }
        )
    return found


def print_tables(rows: Sequence[Json], slowdown: float) -> None:
    """Print the regret of every contender on every link, and its summary."""
    names = (*OURS, *RIVALS)
    share = "one thread" if slowdown == 1 else f"{slowdown:g} times slower than one thread here"
    print(f"\nregret of the chosen cut, an edge of {share}")
    print(
        f"{'link':<8}{'model':<12}{'cuts run':>10}{'best, ms':>10}" + "".join(f"{name:>12}" for name in names), end=""
    )
    print("  best cut, and that of forest if it differs")
    for row in rows:
        print(f"{row['link']:<8}{row['model']:<12}{row['cuts_run']:>4} of {row['boundaries']:<2}", end="")
        print(f"{row['best_ms']:>10.1f}" + "".join(f"{row[f'{name}_regret']:>12.1%}" for name in names), end="")
        others = {row[name] for name in OURS} - {row["best"]}
        print("  " + ", ".join([row["best"], *sorted(others)]))
    print(f"{'choice of':<12}{'mean':>9}{'worst':>9}{'within 5 %':>12}{'forest is faster by':>21}{'at most':>9}")
    for row in summary(rows):
        print(f"{row['choice of']:<12}{row['mean_regret']:>9.2%}{row['worst_regret']:>9.1%}", end="")
        print(f"{row['within_5_percent']:>6} of {row['of']:<3}", end="")
        print(f"{row['speed_up_of_forest']:>20.2f}x{row['largest_speed_up']:>8.1f}x")


def plot(rows: Sequence[Json]) -> None:
    """Draw the time of each choice over that of the best cut: a panel for every network and edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"forest": "o-", "measured": "x--", "reference": "s:", "edge-only": "^:", "cloud-only": "v:"}
    figure, panels = pyplot.subplots(
        len(SLOWDOWNS), len(MODELS), figsize=(22, 8), layout="constrained", sharex=True, sharey=True
    )
    for of_edge, slowdown in zip(panels, SLOWDOWNS, strict=True):
        for axes, model in zip(of_edge, MODELS, strict=True):
            shown = [row for row in rows if (row["model"], row["slowdown"]) == (model, slowdown)]
            places = [list(LINKS).index(row["link"]) for row in shown]
            for name, style in styles.items():
                axes.plot(places, [1 + row[f"{name}_regret"] for row in shown], style, label=name)
            axes.set_xticks(range(len(LINKS)), LINKS)
            axes.set_yscale("log")
            axes.set_title(model + (f", edge {slowdown:g} times slower" if slowdown > 1 else ""))
            axes.grid(alpha=0.3)
        of_edge[0].set_ylabel("latency / that of the best cut")
    panels[0][0].legend(fontsize=8)
    figure.savefig(RESULTS / "regret.png", dpi=110)
    pyplot.close(figure)


def report(measured: Sequence[Json]) -> None:
    """Print the tables, and write them."""
    rows = [regrets(entry, slowdown) for slowdown in SLOWDOWNS for entry in measured]
    sheets: dict[str, list[Json]] = {}
    for slowdown in SLOWDOWNS:
        of_edge = [row for row in rows if row["slowdown"] == slowdown]
        print_tables(of_edge, slowdown)
        sheets |= {f"edge 1_{slowdown:g}": of_edge, f"edge 1_{slowdown:g}, together": summary(of_edge)}
    save_tables(RESULTS / "regret.xlsx", sheets | {"every cut": [row for entry in measured for row in cut_rows(entry)]})
    plot(rows)


# ---------------------------------------------------------------- both sides


def measure_link(name: str, models: Sequence[str]) -> list[Json]:
    """Return the measurements of some networks on one link; fewer if it was interrupted."""
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0"]
    with (
        emulated_link(*LINKS[name]),
        on_cloud_side(command) as cloud,
        on_cloud_side([*command, "--predictor", "measured"]) as measuring_cloud,
    ):
        ports = [*cloud.ports, measuring_cloud.ports[0]]
        arguments = ["-m", "tests.benchmark.regret", "edge", name, *map(str, ports), *models]
        done = on_edge_side(arguments, stderr=None)  # which has the progress bar
    return [{"link": name, **LINKS[name]._asdict(), **json.loads(line)} for line in done.stdout.splitlines()]


def run_edge(name: str, arguments: Sequence[str]) -> None:
    """Measure networks, and print a line of JSON for each."""
    ports, models = [int(port) for port in arguments[:3]], arguments[3:]
    use_threads(1)
    turns = tqdm(models, desc=name, unit="network", disable=None)
    for model in turns:
        print(json.dumps(measure_model(model, LINKS[name], ports)), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["edge"]:
        run_edge(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--link", nargs="+", choices=LINKS, default=[], help="measure these again (default: all)")
    parser.add_argument("-t", "--type", nargs="+", choices=MODELS, default=[], help="networks (default: all)")
    args = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    for name in args.link or LINKS:
        kept = kept_rows("regret")
        known = set() if args.link or args.type else {row["model"] for row in kept if row["link"] == name}
        models = [model for model in args.type or MODELS if model not in known]
        if not models:
            continue
        measured = measure_link(name, models)
        done = {row["model"] for row in measured}
        others = [row for row in kept if row["link"] != name or row["model"] not in done]
        rows = [*others, *measured]
        rows.sort(key=lambda row: (MODELS.index(row["model"]), list(LINKS).index(row["link"])))
        save("regret", {"rows": rows})
        if len(measured) < len(models):
            raise SystemExit(
                f"{name} ended after {len(measured)} of {len(models)} networks: start it again to continue"
            )
    report(kept_rows("regret"))


if __name__ == "__main__":
    main()
