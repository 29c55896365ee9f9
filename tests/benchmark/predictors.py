"""The predictors as the scripts use them on this machine: the one place of the benchmarks that knows how."""

from __future__ import annotations

from pathlib import Path

from predictor.pace import measured_pace_ms
from predictor.predictor_utils import LatencyPredictor, find_predictor, suited, this_machine
from utils.inference_utils import use_threads


def used_and_found(side: str, name: str, path: Path | None = None) -> tuple[LatencyPredictor, LatencyPredictor]:
    """Return a side's predictor as it is used here, scaled to this machine, and as it was found.

    This process computes with the predictor's threads from then on; both sides in one process would mix them up.

    Args: path: a directory of data sets (default: what the scripts find).
    """
    found = find_predictor(side, "cpu", name, path)
    machine = this_machine("cpu", use_threads(found.threads))
    return suited(found, side, machine, is_chosen=False), found


def measured_factors(side: str) -> dict[str, float]:
    """Measure this machine's speed as the first contact does; return its factors, by what each is of.

    A factor is how much longer layers take here than where the data comes from that is in use.
    """
    found = find_predictor(side)
    use_threads(found.threads)
    return {"all": measured_pace_ms("cpu") / (found.pace_ms or 1.0)}
