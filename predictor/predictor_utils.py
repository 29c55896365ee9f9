"""Fit, score, save, load and apply the latency predictors: one linear regression per kind of layer.

    python -m predictor.predictor_utils --side edge      fit again from predictor/dataset/edge, show the scores

Coefficients are non-negative (each is a physical rate) and minimise the relative error: a row counts with the
inverse square of its latency, so that short layers matter as much as long ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from models.graph import LayerGraph, Node
from models.operations import LayerKind
from predictor.features import FEATURE_NAMES, FloatArray, feature_matrix
from predictor.get_datasets_func import COLUMNS, DATASET_DIR, PREDICTOR_DIR, csv_path, load_dataset
from predictor.kernel_flops import node_work
from utils.cli import base_parser, run_main
from utils.errors import DataSetError, MissingPredictorError, writing

CONFIG_DIR = PREDICTOR_DIR / "config"
CONFIG_VERSION = 1
SIDES = ("edge", "cloud")
HOLD_OUT_FOLDS = 5


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """Fitted coefficients per kind, and where they come from."""

    coefficients: Mapping[LayerKind, FloatArray]  # (features,), ms per feature
    provenance: Mapping[str, Any]

    @property
    def threads(self) -> int:
        """CPU threads that the data was measured with."""
        return int(self.provenance.get("threads", 1))

    @property
    def device(self) -> str:
        """Device that the data was measured on."""
        return str(self.provenance.get("device", "cpu"))

    def layer_latencies_ms(self, graph: LayerGraph) -> list[float]:
        """Return the predicted latency of every layer of a chain, (L,), ms.

        A folded batch norm costs nothing: its work happens inside the convolution before it.

        Raises: MissingPredictorError: names the layer whose kind has no predictor.
        """
        nodes, features = graph_features(graph)
        for node in nodes:
            self._check(node)
        rates = np.array([self.coefficients[node.kind] for node in nodes])
        latencies_ms = [0.0] * len(graph.layers)
        for node, latency_ms in zip(nodes, (features * rates).sum(axis=1).tolist(), strict=True):
            latencies_ms[node.layer] += latency_ms
        return latencies_ms

    def _check(self, node: Node) -> None:
        if node.kind not in self.coefficients:
            raise MissingPredictorError(
                f"layer {node.name} is of kind {node.kind}, which has no predictor; there are predictors for "
                f"{', '.join(sorted(self.coefficients))}"
            )


@cache
def graph_features(graph: LayerGraph) -> tuple[list[Node], FloatArray]:
    """Return the nodes of a graph that do work, and their features (n, features); kept with the graph."""
    nodes = [node for layer in graph.layers for node in layer.nodes if not node.folded]
    return nodes, feature_matrix([node_work(node) for node in nodes])


# ---------------------------------------------------------------- fitting


def fit_rates(features: FloatArray, latency_ms: FloatArray) -> FloatArray:
    """Return the non-negative coefficients (features,) that take features (n, features) to latencies (n,), ms."""
    from sklearn.linear_model import LinearRegression

    regression = LinearRegression(positive=True, fit_intercept=False)
    regression.fit(features / latency_ms[:, None], np.ones_like(latency_ms))
    rates: FloatArray = regression.coef_
    return rates


@dataclass(frozen=True, slots=True)
class Score:
    """How well held-out rows of one kind are predicted."""

    rows: int
    mean_error: float  # mean of |predicted - measured| / measured
    within_10: float
    within_20: float


def score_held_out(features: FloatArray, latency_ms: FloatArray) -> Score:
    """Return the errors of rows that the fit did not see (every fifth row in turn)."""
    folds = np.arange(len(latency_ms)) % HOLD_OUT_FOLDS
    errors = np.empty_like(latency_ms)
    for fold in range(HOLD_OUT_FOLDS):
        held = folds == fold
        predicted = features[held] @ fit_rates(features[~held], latency_ms[~held])
        errors[held] = np.abs(predicted / latency_ms[held] - 1)
    return Score(len(errors), float(errors.mean()), float((errors <= 0.1).mean()), float((errors <= 0.2).mean()))


def fit_directory(directory: Path) -> tuple[LatencyPredictor, dict[LayerKind, Score]]:
    """Fit every kind whose CSV file lies in ``directory``.

    Raises: DataSetError: there is none, or one is malformed.
    """
    kinds = [kind for kind in COLUMNS if csv_path(directory, kind).exists()]
    if not kinds:
        raise DataSetError(f"no data sets in {directory}: collect them with python -m predictor.collect")
    datasets = {kind: load_dataset(directory, kind) for kind in kinds}
    for kind, data in datasets.items():
        if len(data.latency_ms) < HOLD_OUT_FOLDS:
            raise DataSetError(
                f"{csv_path(directory, kind)} has {len(data.latency_ms)} rows; at least {HOLD_OUT_FOLDS} are needed"
            )
    coefficients = {kind: fit_rates(data.features, data.latency_ms) for kind, data in datasets.items()}
    scores = {kind: score_held_out(data.features, data.latency_ms) for kind, data in datasets.items()}
    provenance = {**read_provenance(directory), "rows": {kind: score.rows for kind, score in scores.items()}}
    return LatencyPredictor(coefficients, provenance), scores


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return what the collector wrote about device, threads, versions and date; empty for data without it."""
    try:
        provenance = json.loads((directory / "provenance.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise DataSetError(f"{directory / 'provenance.json'} cannot be read: {exc}") from exc
    return provenance if isinstance(provenance, dict) else {}


# ---------------------------------------------------------------- files


def config_path(side: str, device: str = "cpu") -> Path:
    """Return where a side's parameters lie: those of the device, or where there are none, of the CPU."""
    own = parameter_file(side, device)
    return own if own.exists() else parameter_file(side, "cpu")


def parameter_file(side: str, device: str) -> Path:
    """Return the parameter file of a side and device, which may not exist."""
    return CONFIG_DIR / side / f"{device}.json"


def save_predictor(path: Path, predictor: LatencyPredictor, scores: Mapping[LayerKind, Score]) -> None:
    """Write coefficients, scores and provenance as JSON."""
    document = {
        "version": CONFIG_VERSION,
        "provenance": dict(predictor.provenance),
        "features": list(FEATURE_NAMES),
        "kinds": {
            kind: {
                "coefficients_ms": [round(float(rate), 9) for rate in rates],
                "rows": scores[kind].rows,
                "held_out_mean_error": round(scores[kind].mean_error, 4),
            }
            for kind, rates in predictor.coefficients.items()
        },
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n")


def load_predictor(path: Path) -> LatencyPredictor:
    """Return a predictor from a parameter file.

    Raises: DataSetError: missing, malformed, or written for other features.
    """
    try:
        document = json.loads(path.read_text())
        if document["version"] != CONFIG_VERSION or document["features"] != list(FEATURE_NAMES):
            raise DataSetError(
                f"{path} was fitted for other features: fit it again (python -m predictor.predictor_utils)"
            )
        coefficients = {
            LayerKind(kind): np.array(entry["coefficients_ms"], dtype=np.float64)
            for kind, entry in document["kinds"].items()
        }
        for kind, rates in coefficients.items():
            if rates.shape != (len(FEATURE_NAMES),) or not (np.isfinite(rates) & (rates >= 0)).all():
                raise ValueError(f"the coefficients of {kind} are not {len(FEATURE_NAMES)} numbers of at least 0")
        provenance = dict(document["provenance"])
        if not (isinstance(provenance.get("threads", 1), int) and provenance.get("threads", 1) >= 1):
            raise ValueError("the number of threads is no number of at least 1")
        return LatencyPredictor(coefficients, provenance)
    except FileNotFoundError as exc:
        raise DataSetError(f"no predictor parameters at {path}: python -m predictor.collect makes them") from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise DataSetError(f"predictor parameters {path} are malformed: {exc}") from exc


def fit_and_save(dataset_directory: Path, path: Path) -> dict[LayerKind, Score]:
    """Fit a directory of data sets, write the parameters, return the scores."""
    predictor, scores = fit_directory(dataset_directory)
    save_predictor(path, predictor, scores)
    return scores


def print_scores(scores: Mapping[LayerKind, Score]) -> None:
    """Print the held-out errors, a line per kind."""
    print(f"{'kind':<12}{'rows':>6}{'mean error':>12}{'within 10 %':>13}{'within 20 %':>13}")
    for kind, score in scores.items():
        print(f"{kind:<12}{score.rows:>6}{score.mean_error:>12.1%}{score.within_10:>13.1%}{score.within_20:>13.1%}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser("predictor_utils.py", __doc__)
    parser.add_argument("--side", choices=SIDES, required=True, help="which side's data sets to fit")
    parser.add_argument("--dataset", type=Path, help="directory of CSV files (default: predictor/dataset/SIDE)")
    parser.add_argument("--output", type=Path, help="parameter file to write (default: predictor/config/SIDE/cpu.json)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    dataset = args.dataset or DATASET_DIR / args.side
    print_scores(fit_and_save(dataset, args.output or config_path(args.side)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
