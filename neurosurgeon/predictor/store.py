"""Fit, save, load and find latency predictors.

Linear predictors are stored as JSON beside the data sets; the shipped ones are part of the project. Forests are fitted
from the data sets at their first use, which takes seconds. The cache directory keeps them as plain arrays, under a
digest of the data, the features, the settings and the library version. Neither is ever a pickle.

Kinds of layers with too few rows borrow their model from the shipped data (`predictor.borrowing`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor import forest
from neurosurgeon.predictor.borrowing import PRIOR_ROWS, borrowed_models
from neurosurgeon.predictor.features import FEATURE_NAMES, FEATURES_VERSION, TREE_COLUMNS, FloatArray
from neurosurgeon.predictor.forest import ARRAY_NAMES, Forest
from neurosurgeon.predictor.get_datasets_func import (
    COLUMNS,
    MAX_CONTROL_RATIO,
    MIN_ROWS,
    UNDISTURBED_QUANTILE,
    csv_path,
    kinds_in,
    load_datasets,
    measured_kinds,
    read_provenance,
)
from neurosurgeon.predictor.kind_models import HELD_OUT_EVERY, UNMEASURED_INTERVAL, KindModel, Score, fit_kind
from neurosurgeon.predictor.places import config_paths, dataset_directories, default_directory
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from neurosurgeon.predictor.staging import final_directory
from neurosurgeon.utils.errors import DataSetError, writing
from neurosurgeon.utils.files import cache_directory, replace_file

log = logging.getLogger(__name__)

CONFIG_VERSION = 2
Found = TypeVar("Found")


# ---------------------------------------------------------------- finding


def find_predictor(side: str, device: str = "cpu", name: str = "forest", path: Path | None = None) -> LatencyPredictor:
    """Return a side's predictor, not scaled to this machine.

    Fitting a forest may block for seconds.

    Args:   name: linear or forest. path: a parameter file, or a directory of data sets (default: the best data that
            is installed; damaged data of this machine is passed over with a warning).
    Raises: DataSetError: the named or the shipped data is missing or malformed.
    """
    if path is not None:
        return installed_predictor(path, name) if path.is_dir() else load_predictor(path)
    if name == "linear":
        return first_usable(config_paths(side, device), load_predictor, side)

    def read(directory: Path) -> LatencyPredictor:
        if directory != default_directory(side, "cpu") and "side" not in read_provenance(directory):
            raise DataSetError(f"{directory} has no provenance.json of a collection, so kinds may be missing")
        return installed_predictor(directory, name)

    return first_usable(dataset_directories(side, device), read, side)


def dataset_threads(side: str, device: str) -> int:
    """Return the number of CPU threads that a side's installed data was measured with."""
    places = dataset_directories(side, device)
    return first_usable(places, lambda place: int(read_provenance(place).get("threads", 1)), side)


def first_usable(places: Sequence[Path], read: Callable[[Path], Found], side: str) -> Found:
    """Return the content of the first place that is not damaged; warn of each damaged one.

    Raises: DataSetError: the last place is damaged, too.
    """
    for place in places[:-1]:
        try:
            return read(place)
        except DataSetError as exc:
            _warn_of_damage(str(exc), side)
    return read(places[-1])


@cache  # of the process: each model of a run finds its predictor, and one warning is enough
def _warn_of_damage(damage: str, side: str) -> None:
    log.warning(
        "%s; using the shipped data instead: python -m predictor.collect --side %s --fresh measures this machine again",
        damage,
        side,
    )


@cache  # of the process: the functions of the Python API, such as `plan`, have no owner who could keep it
def installed_predictor(directory: Path, name: str) -> LatencyPredictor:
    """Return the predictor of a directory of data sets; a fitted forest is kept in the cache directory.

    Raises: DataSetError: a file is missing or malformed.
    """
    if name != "forest":
        return fit_directory(directory, name)[0]
    digest = data_digest(directory)
    try:
        return load_forest(forest_file(digest), read_provenance(directory))
    except OSError:
        log.info("fitting the forest of %s: this takes seconds, and is kept", directory)
    except DataSetError as exc:
        log.warning("%s; fitting it again", exc)
    with ThreadPoolExecutor(1, "fit") as fitter:  # a thread that ends: its team of OpenMP threads ends with it
        predictor, _ = fitter.submit(fit_directory, directory, name).result()
    log_borrowed_kinds(predictor)
    keep_forest(digest, predictor)
    return predictor


# ---------------------------------------------------------------- fitting


def fit_directory(directory: Path, name: str) -> tuple[LatencyPredictor, dict[LayerKind, Score]]:
    """Fit every kind that has a CSV file in ``directory``.

    Kinds with too few rows borrow their model, and have no score. Data of the collector also borrows the kinds that it
    has no file of. The provenance of the predictor names the borrowed kinds and their machine.

    Raises: DataSetError: there are too few rows and nothing to borrow, or a file is malformed.
    """
    datasets = load_datasets(directory, min_rows=1)
    provenance = {**read_provenance(directory), "rows": {kind: len(data) for kind, data in datasets.items()}}
    own = {kind: data for kind, data in datasets.items() if len(data) >= MIN_ROWS}
    fitted = {kind: fit_kind(data, with_forest=name == "forest") for kind, data in own.items()}
    models = {kind: model for kind, (model, _) in fitted.items()}
    wanted = COLUMNS if "side" in provenance else kinds_in(directory)
    source = lending_directory(directory, provenance)
    if not own and (source is None or not datasets):
        raise DataSetError(f"no data set in {directory} has {MIN_ROWS} rows: collect for longer")
    if source is not None and not set(wanted) <= set(own):
        lent = installed_predictor(source, name)
        borrowed = borrowed_models({kind: lent.kinds[kind] for kind in wanted if kind in lent.kinds}, datasets, own)
        models |= borrowed
        provenance |= {"borrowed": {"kinds": list(borrowed), "device_name": lent.provenance.get("device_name")}}
    return LatencyPredictor(name, models, provenance), {kind: score for kind, (_, score) in fitted.items()}


def lending_directory(directory: Path, provenance: Mapping[str, Any]) -> Path | None:
    """Return the shipped data from which data sets borrow; None if there is none, or the data sets replace it."""
    shipped = default_directory(str(provenance.get("side", "edge")), "cpu")
    return None if final_directory(directory).resolve() == shipped.resolve() or not kinds_in(shipped) else shipped


def log_borrowed_kinds(predictor: LatencyPredictor) -> None:
    """Log the kinds whose models are borrowed, if any."""
    borrowed = predictor.provenance.get("borrowed")
    if borrowed:
        log.info(
            "borrowed from the data of %s, scaled to this machine: %s; there are fewer than %d rows of each",
            borrowed["device_name"],
            ", ".join(borrowed["kinds"]),
            MIN_ROWS,
        )


def fit_and_save(directory: Path, path: Path) -> dict[str, dict[LayerKind, Score]]:
    """Fit both predictors of a directory; write the linear parameters and keep the forest; return their scores.

    Raises: DataSetError: see `fit_directory`. UsageError: the parameters cannot be written.
    """
    linear, linear_scores = fit_directory(directory, "linear")
    log_borrowed_kinds(linear)
    save_predictor(path, linear, linear_scores)
    trees, forest_scores = fit_directory(directory, "forest")
    keep_forest(data_digest(directory), trees)
    return {"linear": linear_scores, "forest": forest_scores}


# ---------------------------------------------------------------- forests in the cache directory


def data_digest(directory: Path) -> str:
    """Return the digest of all that a fitted forest depends on: data, features, settings and library version.

    Raises: DataSetError: there is no data.
    """
    rounds = (forest.ROUNDS, forest.LEARNING_RATE, forest.FEW_ROWS, forest.FEW_ROUNDS, forest.FEW_RATE)
    settings = (rounds, forest.LEAVES, forest.L2_PENALTY, forest.MIN_LEAF_ROWS)
    versions = (FEATURES_VERSION, CONFIG_VERSION, importlib.metadata.version("scikit-learn"))
    features = sorted(TREE_COLUMNS.items())
    rows = (HELD_OUT_EVERY, UNDISTURBED_QUANTILE, MAX_CONTROL_RATIO)
    digest = hashlib.sha256(repr((versions, features, rows, settings)).encode())
    provenance = read_provenance(directory)
    digest.update(repr(sorted((key, str(value)) for key, value in provenance.items())).encode())
    for kind in measured_kinds(directory):
        try:
            content = csv_path(directory, kind).read_bytes()
        except OSError as exc:
            raise DataSetError(f"{csv_path(directory, kind)} cannot be read: {exc.strerror or exc}") from exc
        digest.update(f"{kind} {len(content)} ".encode() + content)
    source = lending_directory(directory, provenance)
    if source is not None:  # kinds with few rows may be borrowed from it
        digest.update(repr((MIN_ROWS, PRIOR_ROWS, UNMEASURED_INTERVAL, data_digest(source))).encode())
    return digest.hexdigest()[:32]


def forest_file(digest: str) -> Path:
    """Return the path of the kept forest with this digest.

    Raises: OSError: there is no cache directory.
    """
    return cache_directory() / "forests" / f"{digest}.npz"


def keep_forest(digest: str, predictor: LatencyPredictor) -> None:
    """Write a fitted forest to the cache directory; a failed write is logged."""
    try:
        save_forest(forest_file(digest), predictor)
    except OSError as exc:
        log.warning("the fitted forest cannot be kept: %s", exc)


def save_forest(path: Path, predictor: LatencyPredictor) -> None:
    """Write a fitted forest as an archive of plain arrays."""
    arrays: dict[str, Any] = {}
    for kind, model in predictor.kinds.items():
        arrays |= {f"{kind}.{name}": getattr(model.forest, name) for name in (*ARRAY_NAMES, "baseline")}
        arrays |= {f"{kind}.{name}": getattr(model, name) for name in ("rates", "interval", "low", "high")}
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    replace_file(path, stream.getvalue())


def load_forest(path: Path, provenance: Mapping[str, Any]) -> LatencyPredictor:
    """Return a fitted forest; no pickle is ever read.

    Raises: OSError: the file is missing or cannot be read. DataSetError: it is damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        names = dict.fromkeys(name.split(".")[0] for name in arrays)
        kinds = {LayerKind(kind): _kind_model(kind, arrays) for kind in names}
    except OSError:
        raise
    except Exception as exc:  # a damaged archive fails in many ways
        raise DataSetError(f"the kept forest {path} is damaged ({exc})") from exc
    return LatencyPredictor("forest", kinds, provenance)


def _kind_model(kind: str, arrays: Mapping[str, Any]) -> KindModel:
    trees = Forest(
        **{name: arrays[f"{kind}.{name}"] for name in ARRAY_NAMES}, baseline=float(arrays[f"{kind}.baseline"])
    )
    if any(not 0 <= ends.min() <= ends.max() < len(trees.value) for ends in (trees.left, trees.right, trees.roots)):
        raise ValueError("a tree leaves its arrays")
    low, high = arrays[f"{kind}.interval"].tolist()
    return KindModel(arrays[f"{kind}.rates"], trees, (low, high), arrays[f"{kind}.low"], arrays[f"{kind}.high"])


# ---------------------------------------------------------------- files of linear parameters


def save_predictor(path: Path, predictor: LatencyPredictor, scores: Mapping[LayerKind, Score]) -> None:
    """Write the linear models, their scores and their provenance as JSON.

    Raises: UsageError: the file cannot be written.
    """
    document = {
        "version": CONFIG_VERSION,
        "features_version": FEATURES_VERSION,
        "provenance": dict(predictor.provenance),
        "features": list(FEATURE_NAMES),
        "kinds": {
            kind: {
                "coefficients_ms": _rounded(model.rates, 9),
                "interval": _rounded(model.interval, 4),
                "low": _rounded(model.low, 4),
                "high": _rounded(model.high, 4),
                "held_out_mean_error": round(scores[kind].mean_error, 4) if kind in scores else None,
            }
            for kind, model in predictor.kinds.items()
        },
    }
    with writing(path):
        replace_file(path, json.dumps(document, indent=2) + "\n")


def _rounded(values: Sequence[float] | FloatArray, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


def load_predictor(path: Path) -> LatencyPredictor:
    """Return the linear predictor of a parameter file.

    Raises: DataSetError: the file is missing, malformed, or was written for other features.
    """
    try:
        document = json.loads(path.read_text())
        versions = (document["version"], document.get("features_version"), document["features"])
        if versions != (CONFIG_VERSION, FEATURES_VERSION, list(FEATURE_NAMES)):
            raise DataSetError(
                f"{path} was fitted for other features: fit it again (python -m predictor.predictor_utils)"
            )
        kinds = {LayerKind(kind): _linear_model(kind, entry) for kind, entry in document["kinds"].items()}
        provenance = dict(document["provenance"])
        if not (isinstance(provenance.get("threads", 1), int) and provenance.get("threads", 1) >= 1):
            raise ValueError(f"threads is {provenance['threads']!r}, expected a whole number of at least 1")
        return LatencyPredictor("linear", kinds, provenance)
    except FileNotFoundError as exc:
        raise DataSetError(f"no predictor parameters at {path}: python -m predictor.collect makes them") from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise DataSetError(f"predictor parameters {path} are malformed: {exc}") from exc


def _linear_model(kind: str, entry: Mapping[str, Any]) -> KindModel:
    rates, low, high = (np.array(entry[name], dtype=np.float64) for name in ("coefficients_ms", "low", "high"))
    if rates.shape != (len(FEATURE_NAMES),) or not (np.isfinite(rates) & (rates >= 0)).all():
        raise ValueError(f"the coefficients of {kind} are not {len(FEATURE_NAMES)} numbers of at least 0")
    below, above = (float(factor) for factor in entry["interval"])
    if not 0 <= below <= 1 <= above < np.inf:
        raise ValueError(f"the interval of {kind} does not hold its prediction")
    return KindModel(rates, None, (below, above), low, high)
