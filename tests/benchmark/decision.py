"""The time of a decision from a cached graph, for the four classic networks and every network of torchvision.

    python -m tests.benchmark.decision

A decision is all the work of `plan_split`: transfer times, the search, and the list of candidates. Two columns have the
work that is done once for a graph: predict its latencies, and build its search. The edge is 1, 3 and 10 times as slow
as predicted, and the uplink has 0.1 to 100 MB/s, so that cuts are found everywhere. The last line compares the
bottlenecks that the search for throughput finds in random graphs with the shortest ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import ZOO, torchvision_names
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.dag_search import DagSearch
from neurosurgeon.planner.heavy_load import shortest_bottleneck
from neurosurgeon.planner.plan import plan_split
from neurosurgeon.planner.strategies import search_of
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.store import find_predictor
from neurosurgeon.utils.timing import now_ms
from tests.benchmark.common import save
from tests.networks import model_graph
from tests.planner.dags import closed_sets, random_case, stages_of

ROUNDS = 5  # of every link and slowdown
RATES_BYTES_PER_S = (1e5, 1e6, 1e7, 1e8)
SLOWDOWNS = (1.0, 3.0, 10.0)
RTT_MS = 5.0
RANDOM_GRAPHS = 1000
COLUMNS = ("nodes", "first", "median", "max", "throughput", "predicting", "building")
TARGET_MAX_MS, TARGET_MEDIAN_MS = 5.0, 2.0


def main() -> None:
    predictors = [find_predictor(side) for side in SIDES]
    print("decision, ms from a cached graph; throughput: median for that objective; predicting, building: once")
    print(f"{'model':<20}" + "".join(f"{column:>12}" for column in COLUMNS))
    rows = {}
    for name in (*ZOO, *torchvision_names()):
        graph = model_graph(name)
        start_ms = now_ms()
        edge, cloud = (predictor.predict(graph) for predictor in predictors)
        predicted_ms = now_ms()
        search_of(graph)
        built_ms = now_ms()
        times = decision_times(graph, edge, cloud)
        row = {**times, "predicting": predicted_ms - start_ms, "building": built_ms - predicted_ms}
        rows[name] = {"nodes": len(graph.nodes), **row}
        print(f"{name:<20}{len(graph.nodes):>12}" + "".join(f"{value:>12.3f}" for value in row.values()))
    show_summary(rows)
    ratios = bottleneck_ratios()
    shares = f"the shortest in {np.mean(ratios < 1 + 1e-9):.1%}, {ratios.mean():.4f} times it on average"
    print(f"throughput, {RANDOM_GRAPHS} random graphs: {shares}, at most {ratios.max():.3f} times")
    save("decision", {"decision_ms": rows, "bottleneck_ratio": {"mean": ratios.mean(), "max": ratios.max()}})


def decision_times(graph: LayerGraph, edge: LayerLatencies, cloud: LayerLatencies) -> dict[str, float]:
    """Return the time of the first decision, and median and maximum of the others, ms."""
    times_ms: dict[Objective, list[float]] = {objective: [] for objective in Objective}
    sides = [edge.scaled(slowdown) for slowdown in SLOWDOWNS]
    for _, side, rate in itertools.product(range(ROUNDS), sides, RATES_BYTES_PER_S):
        for objective, times in times_ms.items():
            times.append(plan_split(graph, side, cloud, rate, RTT_MS, objective=objective).decision_ms)
    first, *others = times_ms[Objective.LATENCY]
    return {
        "first": first,
        "median": float(np.median(others)),
        "max": max(others),
        "throughput": float(np.median(times_ms[Objective.THROUGHPUT])),
    }


def show_summary(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print how many networks reach the targets."""
    slowest = max(rows, key=lambda name: rows[name]["max"])
    median_ms = np.median([row["median"] for row in rows.values()])
    in_time = sum(row["max"] <= TARGET_MAX_MS for row in rows.values())
    print(
        f"{in_time} of {len(rows)} networks always within {TARGET_MAX_MS:g} ms; median of medians {median_ms:.2f} ms "
        f"(target {TARGET_MEDIAN_MS:g}); longest {rows[slowest]['max']:.2f} ms ({slowest})"
    )


def bottleneck_ratios() -> np.ndarray:
    """Return the bottleneck found over the shortest one, for random graphs."""
    ratios = []
    for seed in range(RANDOM_GRAPHS):
        reads, costs = random_case(seed)
        shortest_ms = min(max(stages_of(edge, reads, costs)) for edge in closed_sets(reads))
        ratios.append(shortest_bottleneck(DagSearch(reads), costs).cost_ms / shortest_ms)
    return np.array(ratios)


if __name__ == "__main__":
    main()
