"""Predictors with made-up rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import FEATURE_NAMES
from neurosurgeon.predictor.kind_models import KindModel
from neurosurgeon.predictor.predictor_utils import LatencyPredictor

RATES = np.array([0.01, 5.0, 0.1, 0.2, 0.05, 0.3, 0.0, 1.5])


ONES = np.ones(len(FEATURE_NAMES))


ANYWHERE = np.array([-np.inf]), np.array([np.inf])


def linear_model(rates: Any) -> KindModel:
    return KindModel(np.asarray(rates, dtype=float), None, (0.5, 2.0), *ANYWHERE)


def linear_predictor(rates: dict[LayerKind, Any]) -> LatencyPredictor:
    return LatencyPredictor("linear", {kind: linear_model(values) for kind, values in rates.items()}, {})


def install(directory: Path, machine: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "batchnorm_lat.csv").write_text("HW,Cin,latency\n")
    (directory / "provenance.json").write_text(json.dumps({"device_name": machine}))
