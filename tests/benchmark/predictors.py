"""The predictors as the scripts use them on this machine: the one place of the benchmarks that knows how."""

from __future__ import annotations

from pathlib import Path

from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.predictor.machine_speed import measure_machine_speed, reference_layers, scaled_to_machine, scales_of
from neurosurgeon.predictor.predictor_utils import LatencyPredictor, find_predictor


def used_and_found(side: str, name: str, path: Path | None = None) -> tuple[LatencyPredictor, LatencyPredictor]:
    """Return a side's predictor as it is used here, scaled to this machine, and as it was found.

    This process computes with the predictor's threads from then on; both sides in one process would mix them up.

    Args: path: a directory of data sets (default: what the scripts find).
    """
    found = find_predictor(side, "cpu", name, path)
    return scaled_to_machine(found, "cpu", use_threads(found.threads)), found


def measured_factors(side: str) -> dict[str, float]:
    """Measure this machine's speed as the first contact does; return its factors, by what each is of.

    A factor is how much longer layers take here than where the data comes from that is in use.
    """
    found = find_predictor(side)
    speed = measure_machine_speed("cpu", use_threads(found.threads))
    return {family: scale.factor for family, scale in scales_of(found, reference_layers(), speed.layers_ms).items()}
