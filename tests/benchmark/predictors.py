"""Find and scale predictors for all benchmarks, as the scripts do on this machine."""

from __future__ import annotations

from pathlib import Path

from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.predictor.machine_speed import measure_machine_speed, reference_layers, scaled_to_machine, scales_of
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from neurosurgeon.predictor.store import find_predictor


def used_and_found(side: str, name: str, path: Path | None = None) -> tuple[LatencyPredictor, LatencyPredictor]:
    """Return a side's predictor scaled to this machine, and the same predictor as it was found.

    Sets the number of threads of this process to the predictor's, so a process measures one side only.

    Args: path: a directory of data sets (default: that of the scripts).
    """
    found = find_predictor(side, "cpu", name, path)
    return scaled_to_machine(found, "cpu", use_threads(found.threads)), found


def measured_factors(side: str) -> dict[str, float]:
    """Return the measured speed factor of each family of layers, measured as at the first contact.

    A factor is the latency of layers here / on the machine of the data in use.
    """
    found = find_predictor(side)
    speed = measure_machine_speed("cpu", use_threads(found.threads))
    return {family: scale.factor for family, scale in scales_of(found, reference_layers(), speed.layers_ms).items()}
