"""Compare predicted and measured latencies of ten whole networks, on the edge and in the cloud.

    python -m tests.benchmark.prediction [MODEL ...] [--empty-cache] [--foreign]

Each side runs in a process of its own, with the threads of its predictors, as the scripts do. It finds the predictor,
scales data of another machine to this one, predicts, and only then measures. With --empty-cache nothing is kept (a
fresh XDG_CACHE_HOME), as at the first contact. With --foreign the data is the shipped data of every other machine;
linear models are then fitted from it.

The networks run in turns, twice a turn, and the second run counts. Other programs must not look like prediction errors.
So the latency of one thread is its CPU time, which is the latency on an idle machine: the lower quartile of the turns,
as in the data sets. Several threads wait for each other and spin; their latency is the minimum of the wall times. The
lower quartiles of wall time and of CPU time of all threads are shown beside it. A row has an asterisk if the machine
was too busy to trust even the fastest run: if several threads got less than 80 % of their cores. "Unscaled" is the
error of the same data without scaling. The common factor is the median of predicted / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neurosurgeon.cli.process import ROOT
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import ZOO
from neurosurgeon.predictor.get_datasets_func import read_provenance
from neurosurgeon.predictor.places import default_directory
from neurosurgeon.predictor.predictor_utils import PREDICTORS, SIDES
from neurosurgeon.utils.machine import device_name
from neurosurgeon.utils.units import s_to_ms
from tests.benchmark.common import percentile, save
from tests.benchmark.predictors import used_and_found
from tests.networks import Network, cut, load_network, model_graph, pixels, run

ROUNDS = 15
MODELS = (*ZOO, "resnet18", "googlenet", "densenet121", "efficientnet_b0", "vit_b_16", "swin_t")
BUSY_SHARE = 0.8  # of their cores, which several threads get at least on an idle machine
INSTALLED = "installed"  # the data that the scripts find here

Json = dict[str, Any]

# ---------------------------------------------------------------- one side


def predictions(side: str, name: str, source: str, graphs: Mapping[str, LayerGraph]) -> Json:
    """Return the predictions of a side for every network, as the scripts make them here, and the origin of the data.

    Args: source: a directory of data sets, or `INSTALLED`.
    """
    used, found = used_and_found(side, name, None if source == INSTALLED else Path(source))
    rows = {}
    for model, graph in graphs.items():
        latencies, unscaled = used.predict(graph), found.predict(graph)
        low_ms, high_ms = latencies.interval()
        rows[model] = {"ms": latencies.total(), "low": low_ms, "high": high_ms, "unscaled_ms": unscaled.total()}
    return {"predictor": name, "data": used.origin, "networks": rows}


def measure(networks: Mapping[str, Network], threads: int) -> dict[str, Json]:
    """Return the measured latencies of every network, and whether other programs disturbed them."""
    partitions = {name: cut(network, 0).cloud for name, network in networks.items()}
    inputs = {name: [pixels(network.graph.inputs[0].shape)] for name, network in networks.items()}
    wall_ms: dict[str, list[float]] = {name: [] for name in networks}
    cpu_ms: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(ROUNDS):
        for name in random.sample(list(networks), len(networks)):
            run(partitions[name], inputs[name])  # after another network; in the first round, builds kernels, too
            start_s = time.process_time()
            wall_ms[name].append(run(partitions[name], inputs[name]).compute_ms)
            cpu_ms[name].append(s_to_ms(time.process_time() - start_s))
    return {name: measured(wall_ms[name], cpu_ms[name], threads) for name in networks}


def measured(wall_ms: Sequence[float], cpu_ms: Sequence[float], threads: int) -> Json:
    """Return the latency of a network on an idle machine, from the times of its runs, ms."""
    wall, cpu = percentile(wall_ms, 25), percentile(cpu_ms, 25)
    true = cpu if threads == 1 else min(wall_ms)
    return {"ms": true, "wall": wall, "cpu": cpu, "is_spoiled": cpu < BUSY_SHARE * threads * true}


def run_side(side: str, models: Sequence[str], sources: Sequence[str]) -> Json:
    """Return the predicted and the measured latencies of one side."""
    graphs = {name: model_graph(name) for name in models}
    predicted = [predictions(side, name, source, graphs) for source in sources for name in PREDICTORS]
    networks = {name: load_network(name) for name in models}
    return {"predicted": predicted, "measured": measure(networks, torch.get_num_threads())}


def foreign_sources(side: str) -> list[str]:
    """Return the directories of a side's shipped data of other processors."""
    shipped = sorted(path.parent for path in default_directory(side, "cpu").rglob("provenance.json"))
    return [str(path) for path in shipped if read_provenance(path).get("device_name") != device_name("cpu")]


# ---------------------------------------------------------------- errors


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Return the mean and worst error of predicted / measured, with and without their common factor."""
    common = statistics.median(ratios)
    errors, own = [abs(ratio - 1) for ratio in ratios], [abs(ratio / common - 1) for ratio in ratios]
    return {
        "mean_error": statistics.fmean(errors),
        "worst_error": max(errors),
        "common_factor": common,
        "mean_own_error": statistics.fmean(own),
        "worst_own_error": max(own),
    }


def compared(predicted: Json, true: Mapping[str, Json]) -> Json:
    """Return the errors of one predictor, for every network and together."""
    rows = {}
    for name, prediction in predicted["networks"].items():
        true_ms = true[name]["ms"]
        rows[name] = {
            **prediction,
            "ratio": prediction["ms"] / true_ms,
            "unscaled_ratio": prediction["unscaled_ms"] / true_ms,
            "is_inside": prediction["low"] <= true_ms <= prediction["high"],
        }
    ratios = [row["ratio"] for row in rows.values()]
    inside = statistics.fmean(row["is_inside"] for row in rows.values())
    unscaled = summary([row["unscaled_ratio"] for row in rows.values()])
    together = {**summary(ratios), "inside": inside, "unscaled_mean_error": unscaled["mean_error"]}
    return {**predicted, "networks": rows, "together": together}


def show(side: str, found: Json, true: Mapping[str, Json]) -> None:
    """Print the table of one side and predictor."""
    print(f"\n{side}, {found['predictor']}, {found['data']}")
    heads = ("predicted", "low", "high", "measured", "wall", "CPU", "ratio", "unscaled")
    print(f"{'':<18}" + "".join(f"{head:>10}" for head in heads) + "  inside")
    for name, row in found["networks"].items():
        took = true[name]
        figures = (row["ms"], row["low"], row["high"], took["ms"], took["wall"], took["cpu"])
        ratios = (row["ratio"], row["unscaled_ratio"])
        busy = " *" if took["is_spoiled"] else ""
        columns = "".join(f"{value:>10.2f}" for value in (*figures, *ratios))
        print(f"{name:<18}{columns}{'  yes' if row['is_inside'] else '  no '}{busy}")
    together = found["together"]
    print(
        f"mean error {together['mean_error']:.1%}, worst {together['worst_error']:.1%}, inside the interval "
        f"{together['inside']:.0%}; without the common factor of {together['common_factor']:.2f}: mean "
        f"{together['mean_own_error']:.1%}, worst {together['worst_own_error']:.1%}; unscaled: mean "
        f"{together['unscaled_mean_error']:.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.prediction")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="networks (default: ten)")
    parser.add_argument("--empty-cache", action="store_true", help="the first contact: nothing is kept (default: off)")
    parser.add_argument("--foreign", action="store_true", help="use shipped data of other processors (default: off)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    models = args.models or list(MODELS)
    if args.side:
        sources = foreign_sources(args.side) if args.foreign else [INSTALLED]
        print(json.dumps(run_side(args.side, models, sources)))
        return
    print(f"prediction: whole networks, ms, {device_name('cpu')}, load before it {os.getloadavg()[0]:.1f}", end="")
    print("; *: the machine was busy")
    results = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | ({"XDG_CACHE_HOME": cache} if args.empty_cache else {})
        for side in SIDES:
            command = [sys.executable, "-m", "tests.benchmark.prediction", "--side", side, *models]
            command += ["--foreign"] if args.foreign else []
            done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            output = json.loads(done.stdout)
            found = [compared(predicted, output["measured"]) for predicted in output["predicted"]]
            results[side] = {"predicted": found, "measured": output["measured"]}
            for one in found:
                show(side, one, output["measured"])
    save("prediction", {"empty_cache": args.empty_cache, "foreign": args.foreign, "sides": results})


if __name__ == "__main__":
    main()
