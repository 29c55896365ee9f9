"""Evaluate the predictors: by kind of layer, and for whole networks that are not in the data.

Layers are held out in three ways: at random, by whole feature-map sizes, and by whole ranges of channels. Networks are
torchvision's, measured in the same run. In every round, in random order, each runs twice, and the second run counts.
As in the data sets, a latency is the lower quartile of the rounds.

Some rows of the data set are measured again between the networks. Their latency now / then is the machine's drift since
the collection; errors are shown as they are, and with the drift divided out. The noise floor beside each error is the
difference of two measurements of the same layer or network: no predictor can be more accurate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.collect import new_provenance
from neurosurgeon.predictor.features import FloatArray
from neurosurgeon.predictor.forest import fit_forest
from neurosurgeon.predictor.get_datasets_func import BoolArray, DataSet, load_datasets, read_provenance
from neurosurgeon.predictor.kind_models import Score, fit_kind, fit_model
from neurosurgeon.predictor.places import dataset_directory
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from neurosurgeon.predictor.store import installed_predictor
from neurosurgeon.predictor.whole_networks import (
    NetworkScore,
    RemeasuredRows,
    measure_networks,
    prepared_networks,
    sampled_rows,
    score_network,
)

FOLDS = 5
ROUNDS = 11
PREDICTORS = ("linear", "forest")


# ---------------------------------------------------------------- layers


Splitter = Callable[[DataSet], FloatArray]  # returns the number of the fold of every row, (n,)


def random_folds(data: DataSet) -> FloatArray:
    """Return folds of random rows, (n,)."""
    return np.random.default_rng(0).integers(0, FOLDS, len(data)).astype(float)


def width_folds(data: DataSet) -> FloatArray:
    """Return folds of whole feature-map sizes (of input features, for linear layers), (n,)."""
    widths = data.tree_features[:, 0]  # the first column of every kind
    order = np.random.default_rng(0).permutation(np.unique(widths))
    fold_of = dict(zip(order.tolist(), np.arange(len(order)) % FOLDS, strict=True))
    return np.array([fold_of[width] for width in widths.tolist()], dtype=np.float64)


def channel_folds(data: DataSet) -> FloatArray:
    """Return folds of whole ranges of channels (of output features, for linear layers), (n,)."""
    channels = data.features[:, 3] / np.maximum(data.features[:, 7], 1e-12)  # output MB / output positions
    edges = np.quantile(channels, np.arange(1, FOLDS) / FOLDS)
    return np.searchsorted(edges, channels).astype(float)


SPLITS: Mapping[str, Splitter] = {
    "random rows": random_folds,
    "left-out sizes": width_folds,
    "left-out channels": channel_folds,
}


@dataclass(frozen=True, slots=True)
class KindScore:
    """The errors of one predictor on one kind, with rows held out in one way."""

    predictor: str
    kind: str
    split: str
    rows: int
    within_10: float
    within_20: float
    mape: float
    r2: float
    coverage: float  # of the 90 % intervals


def score_kind(kind: LayerKind, data: DataSet, name: str, split: str) -> KindScore:
    """Return the errors of a predictor on a kind, each fold predicted by a fit to the others."""
    folds = SPLITS[split](data)
    predicted, low, high = (np.zeros(len(data)) for _ in range(3))
    for fold in np.unique(folds):
        held_out: BoolArray = folds == fold
        if held_out.all():  # a single fold: hold out every fifth row instead
            held_out = np.arange(len(data)) % FOLDS == 0
        model, _ = fit_kind(data.rows(~held_out), with_forest=name == "forest")
        rest = data.rows(held_out)
        predicted[held_out] = model.predict(rest.features, rest.tree_features)
        low[held_out], high[held_out] = (predicted[held_out] * factor for factor in model.interval)
    is_predicted = predicted > 0
    predicted, measured = predicted[is_predicted], data.latency_ms[is_predicted]
    score = Score.of(predicted, measured)
    inside = (low[is_predicted] <= measured) & (measured <= high[is_predicted])
    r2 = 1 - ((measured - predicted) ** 2).sum() / max(((measured - measured.mean()) ** 2).sum(), 1e-12)
    errors = score.within_10, score.within_20, score.mean_error
    return KindScore(name, kind, split, len(data), *errors, float(r2), float(inside.mean()))


# ---------------------------------------------------------------- other trees


def compared_predictors(directory: Path) -> Iterator[LatencyPredictor]:
    """Yield predictors with other kinds of trees on the same features and the same linear models."""
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

    settings = {"n_estimators": 100, "min_samples_leaf": 2, "n_jobs": -1, "random_state": 0}
    fits: Mapping[str, Callable[[FloatArray, FloatArray], Any]] = {
        "extra trees": lambda x, y: ExtraTreesRegressor(max_features=0.7, **settings).fit(x, y),
        "random forest": lambda x, y: RandomForestRegressor(max_features=0.5, **settings).fit(x, y),
        "boosting": fit_forest,
    }
    datasets = load_datasets(directory)
    for name, fit_trees in fits.items():
        yield LatencyPredictor(name, {kind: fit_model(data, fit_trees) for kind, data in datasets.items()}, {})


# ---------------------------------------------------------------- the report


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation of one side."""

    side: str
    kinds: Sequence[KindScore]
    noise: Mapping[str, float]  # by kind; see `RemeasuredRows.noise`
    drift: float  # of this machine since the data set was collected; see `RemeasuredRows.drift`
    networks: Sequence[NetworkScore]


def evaluate_side(
    side: str,
    device: str = "cpu",
    threads: int | None = None,
    *,
    dataset: Path | None = None,
    rounds: int = ROUNDS,
    compares: bool = False,
) -> Evaluation:
    """Return the evaluation of one side, measured on this machine. Blocks for minutes.

    Args: threads: to compute with (default: those of the side's data). dataset: a directory (default: the installed
          one). rounds: of measuring whole networks. compares: also evaluate other kinds of trees.
    """
    directory = dataset or dataset_directory(side, device)
    collected = read_provenance(directory)
    threads = use_threads(threads or int(collected.get("threads", 1)))
    here = new_provenance(side, device, threads)
    is_same_machine = all(collected.get(name) == here[name] for name in ("device", "device_name", "threads"))
    remeasured = RemeasuredRows(sampled_rows(directory) if is_same_machine else [], device)
    prepared = prepared_networks(device)
    wholes = {name: whole for name, (_, whole) in prepared.items()}
    times_ms = measure_networks(wholes, remeasured, device, rounds)
    predictors = [installed_predictor(directory, name) for name in PREDICTORS]
    if compares:
        predictors += compared_predictors(directory)
    networks = [score_network(graph, times_ms[name], predictors) for name, (graph, _) in prepared.items()]
    return Evaluation(side, score_kinds(directory, side), remeasured.noise(), remeasured.drift, networks)


def score_kinds(directory: Path, side: str) -> list[KindScore]:
    """Return the errors of both predictors on all kinds, with rows held out in all ways."""
    datasets = load_datasets(directory)
    steps = [(name, kind, split) for name in PREDICTORS for kind in datasets for split in SPLITS]
    return [
        score_kind(kind, datasets[kind], name, split)
        for name, kind, split in tqdm(steps, desc=f"{side}: layers", unit="fit", disable=None)
    ]


def summaries(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return mean absolute error, share within 10 %, and coverage of the intervals, by predictor.

    Errors are given as they are, and with the drift of the machine divided out, which no predictor can know.
    """
    networks = evaluation.networks
    names = list(networks[0].predicted_ms)
    errors = {name: np.array([network.error(name) for network in networks]) for name in names}
    without_drift = {name: (1 + errors[name]) * evaluation.drift - 1 for name in names}
    return {
        "mean error": {name: float(np.abs(errors[name]).mean()) for name in names},
        "within 10 %": {name: float((np.abs(errors[name]) <= 0.1).mean()) for name in names},
        "mean error less drift": {name: float(np.abs(without_drift[name]).mean()) for name in names},
        "within 10 % less drift": {name: float((np.abs(without_drift[name]) <= 0.1).mean()) for name in names},
        "inside the 90 % interval": {
            name: float(np.mean([network.covered[name] for network in networks])) for name in names
        },
    }
