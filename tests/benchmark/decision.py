"""How long a decision takes from a cached graph: transfer times and search; and once for a graph, predictions.

python -m tests.benchmark.decision
"""

from __future__ import annotations

import statistics

from deployment import plan_split
from models.zoo import ZOO, model_graph
from predictor.predictor_utils import SIDES, find_predictor
from tests.benchmark.common import save
from utils.timing import now_ms

ROUNDS = 200
RATES_BYTES_PER_S = (1e5, 1e6, 1e7, 1e8)


def main() -> None:
    predictors = [find_predictor(side) for side in SIDES]
    results = {}
    print(
        f"decision: ms from a cached graph\n{'model':<12}{'first':>10}{'median':>10}{'max':>10}{'predicting, once':>18}"
    )
    for name in ZOO:
        graph = model_graph(name)
        start_ms = now_ms()
        edge, cloud = (predictor.predict(graph) for predictor in predictors)
        prediction_ms = now_ms() - start_ms
        times_ms = [plan_split(graph, edge, cloud, RATES_BYTES_PER_S[i % 4], 5.0).decision_ms for i in range(ROUNDS)]
        results[name] = {"first": times_ms[0], "median": statistics.median(times_ms[1:]), "max": max(times_ms[1:])}
        results[name]["predicting, once"] = prediction_ms
        print(f"{name:<12}" + "".join(f"{value:>10.3f}" for value in results[name].values()))
    save("decision", {"decision_ms": results})


if __name__ == "__main__":
    main()
