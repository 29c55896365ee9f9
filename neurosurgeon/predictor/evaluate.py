"""How good the predictors are: per kind of layer, and for whole networks that no fit has seen.

Layers are held out in three ways: at random, by whole feature-map sizes, and by whole ranges of channels. Networks
are torchvision's, measured in the same run: in every round, in random order, each is run twice and the second run
counts. So are some rows of the data set: how much longer they take now is the machine's drift since it was collected,
and errors are shown with it and less it. As in the data sets, a latency is the lower quartile of the rounds. The noise
floor beside each error is what two measurements of the same thing differ by: nobody predicts better than that.
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
from neurosurgeon.predictor.collect import provenance
from neurosurgeon.predictor.features import FloatArray
from neurosurgeon.predictor.forest import fit_forest
from neurosurgeon.predictor.get_datasets_func import BoolArray, DataSet
from neurosurgeon.predictor.kind_models import KindModel, Score, fit_kind, fit_rates
from neurosurgeon.predictor.predictor_utils import (
    LatencyPredictor,
    dataset_directory,
    installed_predictor,
    load_datasets,
    read_provenance,
)
from neurosurgeon.predictor.whole_networks import (
    Again,
    NetworkScore,
    measure_networks,
    prepared_networks,
    sampled_rows,
    score_network,
)

FOLDS = 5
ROUNDS = 11
PREDICTORS = ("linear", "forest")


# ---------------------------------------------------------------- layers


Splitter = Callable[[DataSet], FloatArray]  # the fold of every row, (n,)


def random_folds(data: DataSet) -> FloatArray:
    """Return folds that mix everything."""
    return np.random.default_rng(0).integers(0, FOLDS, len(data)).astype(float)


def width_folds(data: DataSet) -> FloatArray:
    """Return folds of whole feature-map sizes (of input features, for linear layers)."""
    widths = data.tree_features[:, 0]  # the first column of every kind
    order = np.random.default_rng(0).permutation(np.unique(widths))
    fold_of = dict(zip(order.tolist(), np.arange(len(order)) % FOLDS, strict=True))
    return np.array([fold_of[width] for width in widths.tolist()], dtype=np.float64)


def channel_folds(data: DataSet) -> FloatArray:
    """Return folds of whole ranges of channels (of output features, for linear layers)."""
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
    """How one predictor does on one kind under one way to hold out."""

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
    """Return the scores of a predictor over all folds."""
    folds = SPLITS[split](data)
    predicted, low, high = (np.zeros(len(data)) for _ in range(3))
    for fold in np.unique(folds):
        held: BoolArray = folds == fold
        if held.all():  # all rows alike: nothing to learn from
            held = np.arange(len(data)) % FOLDS == 0
        model, _ = fit_kind(data.rows(~held), with_forest=name == "forest")
        rest = data.rows(held)
        predicted[held] = model.predict(rest.features, rest.tree_features)
        low[held], high[held] = (predicted[held] * factor for factor in model.interval)
    seen = predicted > 0
    predicted, measured = predicted[seen], data.latency_ms[seen]
    score = Score.of(predicted, measured)
    inside = (low[seen] <= measured) & (measured <= high[seen])
    r2 = 1 - ((measured - predicted) ** 2).sum() / max(((measured - measured.mean()) ** 2).sum(), 1e-12)
    return KindScore(
        name,
        kind,
        split,
        len(data),
        score.within_10,
        score.within_20,
        score.mean_error,
        float(r2),
        float(inside.mean()),
    )


# ---------------------------------------------------------------- other trees


def compared_predictors(directory: Path) -> Iterator[LatencyPredictor]:
    """Yield predictors with other kinds of trees on the same features and the same linear models."""
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

    makers: Mapping[str, Callable[[], Any]] = {
        "extra trees": lambda: ExtraTreesRegressor(
            100, min_samples_leaf=2, max_features=0.7, n_jobs=-1, random_state=0
        ),
        "random forest": lambda: RandomForestRegressor(
            100, min_samples_leaf=2, max_features=0.5, n_jobs=-1, random_state=0
        ),
    }
    datasets = load_datasets(directory)
    for name, make in makers.items():
        yield LatencyPredictor(name, {kind: _with_trees(data, make()) for kind, data in datasets.items()}, {})
    yield LatencyPredictor("boosting", {kind: _boosted(data) for kind, data in datasets.items()}, {})


def _with_trees(data: DataSet, trees: Any) -> KindModel:
    linear = _linear(data)
    trees.fit(data.tree_features, np.log(data.latency_ms / linear.predict(data.features, data.tree_features)))
    return KindModel(linear.rates, trees, linear.interval, linear.low, linear.high)


def _boosted(data: DataSet) -> KindModel:
    linear = _linear(data)
    residuals = np.log(data.latency_ms / linear.predict(data.features, data.tree_features))
    trees = fit_forest(data.tree_features, residuals)
    return KindModel(linear.rates, trees, linear.interval, linear.low, linear.high)


def _linear(data: DataSet) -> KindModel:
    low, high = data.tree_features.min(axis=0), data.tree_features.max(axis=0)
    return KindModel(fit_rates(data.features, data.latency_ms), None, (1.0, 1.0), low, high)


# ---------------------------------------------------------------- the report


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that is known of one side."""

    side: str
    kinds: Sequence[KindScore]
    noise: Mapping[str, float]  # by kind
    drift: float  # of this machine since the data set was collected; see Again
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
    """Return the scores of one side, measured on this machine.

    Args: threads: to compute with (default: those of the side's data). dataset: a directory (default: the installed
          one). rounds: of measuring whole networks. compares: also score other kinds of trees.
    """
    directory = dataset or dataset_directory(side, device)
    about = read_provenance(directory)
    threads = use_threads(threads or int(about.get("threads", 1)))
    here = provenance(side, device, threads)
    is_same_machine = all(about.get(name) == here[name] for name in ("device", "device_name", "threads"))
    again = Again(sampled_rows(directory) if is_same_machine else [], device)
    prepared = prepared_networks(device)
    wholes = {name: whole for name, (_, whole) in prepared.items()}
    times_ms = measure_networks(wholes, again, device, rounds)
    predictors = [installed_predictor(directory, name) for name in PREDICTORS]
    if compares:
        predictors += compared_predictors(directory)
    networks = [score_network(graph, times_ms[name], predictors) for name, (graph, _) in prepared.items()]
    return Evaluation(side, score_kinds(directory, side), again.noise(), again.drift, networks)


def score_kinds(directory: Path, side: str) -> list[KindScore]:
    """Return the scores of both predictors on all kinds, held out in all ways."""
    datasets = load_datasets(directory)
    steps = [(name, kind, split) for name in PREDICTORS for kind in datasets for split in SPLITS]
    return [
        score_kind(kind, datasets[kind], name, split)
        for name, kind, split in tqdm(steps, desc=f"{side}: layers", unit="fit", disable=None)
    ]


def summaries(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return mean absolute error, share within 10 %, and coverage of the intervals, by predictor.

    Once as they are, and once less the drift of the machine, which no predictor can know of.
    """
    networks = evaluation.networks
    names = list(networks[0].predicted_ms)
    errors = {name: np.array([network.error(name) for network in networks]) for name in names}
    level = {name: (1 + errors[name]) * evaluation.drift - 1 for name in names}
    return {
        "mean error": {name: float(np.abs(errors[name]).mean()) for name in names},
        "within 10 %": {name: float((np.abs(errors[name]) <= 0.1).mean()) for name in names},
        "mean error less drift": {name: float(np.abs(level[name]).mean()) for name in names},
        "within 10 % less drift": {name: float((np.abs(level[name]) <= 0.1).mean()) for name in names},
        "inside the 90 % interval": {
            name: float(np.mean([network.covered[name] for network in networks])) for name in names
        },
    }
