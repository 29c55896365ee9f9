"""What the chosen cut costs beyond the best one, by measured partitions: four networks, ten bandwidths.

    python -m tests.benchmark.halves_regret

Both partitions of every partition point are measured, each side in a process of its own with the threads of its
predictors, all points in turn, in rounds; a latency is the lower quartile of the rounds, as in the data sets. The
predictors are those of the scripts: data of another machine is scaled to this one. The link's share is the same formula
for all. Regret is cost(chosen) / cost(best) - 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from neurosurgeon.cli.process import ROOT
from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.models.names import ZOO
from neurosurgeon.planner.plan import plan_split
from neurosurgeon.planner.transfer import transfer_time_ms
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.predictor_utils import PREDICTORS, SIDES
from neurosurgeon.predictor.profile import profile_passes, summarise
from neurosurgeon.utils.timing import now_ms
from tests.benchmark.common import save
from tests.benchmark.predictors import used_and_found
from tests.networks import cut, load_network, model_graph, pixels, random_input, run

ROUNDS = 9
RATES_MB_PER_S = [float(rate) for rate in np.geomspace(0.1, 100, 10)]
RTT_MS = 5.0
GOOD = 0.02
SOURCES = (*PREDICTORS, "measured")


def measure_side(side: str) -> dict[str, dict[str, Any]]:
    """Return for every network the latencies (ms) of its partitions on one side, by point, and of its layers."""
    predictors = [used_and_found(side, source)[0] for source in PREDICTORS]
    result: dict[str, dict[str, Any]] = {}
    for name in ZOO:
        network = load_network(name)
        sources = [predictor.predict(network.graph) for predictor in predictors]
        sources.append(summarise(profile_passes(network, [as_tensor(random_input())])))
        points = range(len(network.graph.layers) + 1)
        cuts = [cut(network, point) for point in points]
        inputs = [run(edge, [pixels()]).arrays for edge, _ in cuts]
        times: list[list[float]] = [[] for _ in points]
        for _ in range(ROUNDS):
            for point in points:
                edge, cloud = cuts[point]
                partition, arrays = (edge, (pixels(),)) if side == "edge" else (cloud, inputs[point])
                start_ms = now_ms()
                if cloud.inputs or side == "edge":  # after the last layer, the cloud has nothing to do
                    partition.run(arrays)
                times[point].append(now_ms() - start_ms)
        partitions = [float(np.quantile(values, 0.25)) for values in times]
        partitions[0 if side == "edge" else -1] = 0.0  # the empty partition
        result[name] = {"partitions": partitions}
        for known in sources:
            result[name][known.source] = [list(known.latency_ms), list(known.low_ms), list(known.high_ms)]
    return result


Measured = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by side, network, and source


def regrets(measured: Measured, source: str) -> list[dict[str, object]]:
    """Return the regret of the cuts that one source of latencies chooses."""
    rows: list[dict[str, object]] = []
    for name in ZOO:
        graph = model_graph(name)
        edge, cloud = (LayerLatencies(*measured[side][name][source], source) for side in SIDES)
        partitions = {side: measured[side][name]["partitions"] for side in SIDES}
        for rate in RATES_MB_PER_S:
            costs = [
                edge_ms + transfer_time_ms(sent_bytes, graph.outputs_bytes, rate * 1e6, RTT_MS) + cloud_ms
                for edge_ms, sent_bytes, cloud_ms in zip(
                    partitions["edge"], graph.boundary_bytes, partitions["cloud"], strict=True
                )
            ]
            chosen = plan_split(graph, edge, cloud, rate * 1e6, RTT_MS).best.point
            best = int(np.argmin(costs))
            regret = costs[chosen] / costs[best] - 1
            rows.append({"model": name, "mb_per_s": rate, "chosen": chosen, "best": best, "regret": regret})
    return rows


def main() -> None:
    if sys.argv[1:] and sys.argv[1] in SIDES:
        print(json.dumps(measure_side(sys.argv[1])))
        return
    measured = {}
    for side in SIDES:
        command = [sys.executable, "-m", "tests.benchmark.halves_regret", side]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        measured[side] = json.loads(output)
    results = {source: regrets(measured, source) for source in SOURCES}
    print(f"regret of the chosen cut: {len(ZOO)} networks x {len(RATES_MB_PER_S)} bandwidths, RTT {RTT_MS:g} ms")
    print(f"{'latencies':<11}{'at most 2 %':>12}{'mean':>9}{'worst':>9}")
    for source, rows in results.items():
        values = np.array([row["regret"] for row in rows], dtype=float)
        print(f"{source:<11}{(values <= GOOD).mean():>12.1%}{values.mean():>9.2%}{values.max():>9.2%}")
        for row in rows:
            if float(str(row["regret"])) > GOOD:
                where = f"{row['model']} at {row['mb_per_s']:.2f} MB/s"
                print(f"    {where}: point {row['chosen']}, best {row['best']}, {row['regret']:.1%}")
    save("halves_regret", {"regret": results})


if __name__ == "__main__":
    main()
