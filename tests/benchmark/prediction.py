"""Whole-model error of the shipped predictors, measured afresh: four networks, five transformers.

    python -m tests.benchmark.prediction [MODEL ...]

Each side runs in a process of its own with the threads its predictors were measured with, as the scripts do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import partial

from models.zoo import ZOO, load_network
from predictor.predictor_utils import SIDES, find_predictor
from tests.benchmark.common import interleaved_medians, save
from utils.cli import ROOT
from utils.inference_utils import run_half, stand_in, use_threads

ROUNDS, CALLS = 9, 3
TRANSFORMERS = ("vit_b_16", "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t")


def measure_side(side: str, models: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return predicted and measured time (ms) of every whole network on one side."""
    predictor = find_predictor(side)
    use_threads(predictor.threads)
    networks = {name: load_network(name) for name in models}
    runs = {
        name: partial(run_half, network.cut(0).cloud, [stand_in(network.graph.input.shape)])
        for name, network in networks.items()
    }
    measured = interleaved_medians(runs, ROUNDS, calls=CALLS)
    return {
        name: {"predicted": predictor.predict(network.graph).total(), "measured": measured[name]}
        for name, network in networks.items()
    }


def mean_error(errors: Iterable[float]) -> float:
    """Return the mean of what errors are without their sign."""
    return statistics.mean(map(abs, errors))


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SIDES:
        print(json.dumps(measure_side(sys.argv[1], sys.argv[2:])))
        return
    models = sys.argv[1:] or [*ZOO, *TRANSFORMERS]
    results = {}
    print(f"prediction: whole networks, ms\n{'side':<8}{'model':<12}{'predicted':>11}{'measured':>11}{'error':>9}")
    for side in SIDES:
        command = [sys.executable, "-m", "tests.benchmark.prediction", side, *models]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        results[side] = json.loads(output)
        for name, times in results[side].items():
            times["error"] = times["predicted"] / times["measured"] - 1
            print(f"{side:<8}{name:<12}{times['predicted']:>11.3f}{times['measured']:>11.3f}{times['error']:>9.1%}")
    errors = [(name, times["error"]) for side in results.values() for name, times in side.items()]
    for what, group in (("classic", ZOO), ("others", [name for name in models if name not in ZOO])):
        if known := [error for name, error in errors if name in group]:
            print(f"mean absolute error, {what:<8}{mean_error(known):.1%}")
    save("prediction", {"latency_ms": results})


if __name__ == "__main__":
    main()
