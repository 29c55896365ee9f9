"""Whole-model error of the shipped predictors, measured afresh: the four networks, edge and cloud.

    python -m tests.benchmark.prediction

Each side runs in a process of its own with the threads its predictors were measured with, as the scripts do.
"""

from __future__ import annotations

import json
import subprocess
import sys

from models.zoo import ZOO, load_network
from predictor.predictor_utils import SIDES, find_predictor
from tests.benchmark.common import interleaved_medians, save
from utils.cli import ROOT
from utils.inference_utils import random_input, run_half, use_threads

ROUNDS = 15


def measure_side(side: str) -> dict[str, dict[str, float]]:
    """Return predicted and measured time (ms) of every whole network on one side."""
    predictor = find_predictor(side)
    use_threads(predictor.threads)
    tensor = random_input()
    networks = {name: load_network(name) for name in ZOO}
    halves = {name: network.cut(0).cloud for name, network in networks.items()}
    measured = interleaved_medians(
        {name: lambda half=half: run_half(half, [tensor]) for name, half in halves.items()}, ROUNDS, calls=5
    )
    return {
        name: {"predicted": predictor.predict(network.graph).total(), "measured": measured[name]}
        for name, network in networks.items()
    }


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(measure_side(sys.argv[1])))
        return
    results = {}
    print(f"prediction: whole networks, ms\n{'side':<8}{'model':<12}{'predicted':>11}{'measured':>11}{'error':>9}")
    for side in SIDES:
        command = [sys.executable, "-m", "tests.benchmark.prediction", side]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        results[side] = json.loads(output)
        for name, times in results[side].items():
            times["error"] = times["predicted"] / times["measured"] - 1
            print(f"{side:<8}{name:<12}{times['predicted']:>11.3f}{times['measured']:>11.3f}{times['error']:>9.1%}")
    errors = [abs(times["error"]) for side in results.values() for times in side.values()]
    print(f"mean absolute error {sum(errors) / len(errors):.1%}")
    save("prediction", {"latency_ms": results})


if __name__ == "__main__":
    main()
