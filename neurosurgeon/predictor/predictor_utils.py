"""Fit, score, save, load and apply the latency predictors: a model for each kind of layer, and how sure it is.

Two choices. ``linear``: non-negative coefficients (each is a physical rate) that minimise the relative error; they
are shipped as JSON. ``forest``: trees over the linear model; they are fitted from the data set where they are first
used, which takes seconds, and kept in the cache directory as plain arrays, under a name that changes with the data,
the features and the library. Neither is ever a pickle.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph, Node
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor import forest
from neurosurgeon.predictor.borrowing import COMMON_ROWS, borrowed_models
from neurosurgeon.predictor.features import (
    FEATURE_NAMES,
    FEATURES_VERSION,
    TREE_COLUMNS,
    FloatArray,
    feature_matrix,
    tree_matrix,
)
from neurosurgeon.predictor.forest import ARRAY_NAMES, Forest
from neurosurgeon.predictor.get_datasets_func import (
    COLUMNS,
    DATASET_DIR,
    MAX_PACE,
    MIN_ROWS,
    UNDISTURBED,
    DataSet,
    csv_path,
    dataset_of,
    read_rows,
)
from neurosurgeon.predictor.kernel_flops import node_work
from neurosurgeon.predictor.kind_models import (
    HELD_OUT_EVERY,
    UNMEASURED,
    Family,
    KindModel,
    Scale,
    Score,
    family_of,
    fit_kind,
)
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.staging import home_of, in_effect
from neurosurgeon.utils.errors import DataSetError, MissingPredictorError, writing
from neurosurgeon.utils.files import cache_directory, data_directory, file_name, replace_file
from neurosurgeon.utils.machine import device_name

log = logging.getLogger(__name__)

CONFIG_DIR = data_directory() / "config"
CONFIG_VERSION = 2
SIDES = ("edge", "cloud")
PREDICTORS = ("forest", "linear")
FREE_KINDS = frozenset({LayerKind.INPUT, LayerKind.VIEW})
# Whose rates stand in for a kind that was never measured: they know what arithmetic and traffic cost.
STAND_INS: Mapping[LayerKind, tuple[LayerKind, ...]] = {
    LayerKind.MATMUL: (LayerKind.CONV, LayerKind.LINEAR),
    LayerKind.ATTENTION: (LayerKind.MATMUL, LayerKind.CONV, LayerKind.LINEAR),
    LayerKind.LAYER_NORM: (LayerKind.BATCHNORM, LayerKind.ACTIVATION),
    LayerKind.SOFTMAX: (LayerKind.ACTIVATION, LayerKind.BATCHNORM),
    LayerKind.WEIGHTED: (LayerKind.CONV, LayerKind.LINEAR),
    LayerKind.OTHER: (LayerKind.ACTIVATION, LayerKind.BATCHNORM),
}


# ---------------------------------------------------------------- predictors


class Machine(NamedTuple):
    """What a latency depends on, beside the layer."""

    device: str
    threads: int | None  # of a CPU
    device_name: str | None

    def __str__(self) -> str:
        threads = f", threads: {self.threads}" if self.threads else ""
        return f"{self.device_name or self.device}{threads}"


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """A model for every kind, and where their data comes from."""

    name: str  # linear or forest
    kinds: Mapping[LayerKind, KindModel]
    provenance: Mapping[str, Any]
    scales: Mapping[Family, Scale] = field(default_factory=dict)  # to this machine; none: as the data is
    scaled_how: str = "as it is"
    _known: dict[LayerGraph, LayerLatencies] = field(default_factory=dict, repr=False, init=False)

    @property
    def threads(self) -> int:
        """CPU threads that the data was measured with."""
        return int(self.provenance.get("threads", 1))

    @property
    def machine(self) -> Machine:
        """What the data was measured with, as far as it tells."""
        device = str(self.provenance.get("device", "cpu"))
        name = self.provenance.get("device_name")
        return Machine(device, self.threads if device == "cpu" else None, None if name is None else str(name))

    @property
    def origin(self) -> str:
        """Whose data the predictions come from, and how they were scaled, for people."""
        return f"data of {self.machine}, {self.scaled_how}"

    def predict(self, graph: LayerGraph) -> LayerLatencies:
        """Return the predicted latency of every layer of a chain; kept with the graph.

        A folded batch norm costs nothing: its work happens inside the convolution before it.

        Raises: MissingPredictorError: names the layer whose kind has no predictor.
        """
        if graph not in self._known:
            self._known[graph] = self._predict(graph)
        return self._known[graph]

    def _predict(self, graph: LayerGraph) -> LayerLatencies:
        size = len(graph.layers)
        total, below, above = (np.zeros(size) for _ in range(3))
        extrapolated: list[str] = []
        for kind, (nodes, features, tree_features) in graph_features(graph).items():
            model = self._model(kind, nodes[0])
            scales = [self.scales.get(family_of(kind, node.params), Scale()) for node in nodes]
            factor, scale_low, scale_high = np.array(scales).T
            latency_ms = model.predict(features, tree_features) * factor
            layers = [node.layer for node in nodes]
            np.add.at(total, layers, latency_ms)
            np.add.at(below, layers, ((1 - np.minimum(model.interval[0], scale_low)) * latency_ms) ** 2)
            np.add.at(above, layers, ((np.maximum(model.interval[1], scale_high) - 1) * latency_ms) ** 2)
            beyond = model.is_beyond(tree_features)
            extrapolated += [node.name for node, is_beyond in zip(nodes, beyond, strict=True) if is_beyond]
        low, high = np.maximum(total - np.sqrt(below), 0), total + np.sqrt(above)
        return LayerLatencies(total.tolist(), low.tolist(), high.tolist(), self.name, extrapolated, self.origin)

    def _model(self, kind: LayerKind, node: Node) -> KindModel:
        if kind in self.kinds:
            return self.kinds[kind]
        stand_in = next((other for other in STAND_INS.get(kind, ()) if other in self.kinds), None)
        if stand_in is None:
            raise MissingPredictorError(
                f"layer {node.name} is of kind {kind}, which has no predictor; there are predictors for "
                f"{', '.join(sorted(self.kinds))}"
            )
        return self.kinds[stand_in].for_another_kind()


NodeFeatures = tuple[list[Node], FloatArray, FloatArray]


@cache
def graph_features(graph: LayerGraph) -> Mapping[LayerKind, NodeFeatures]:
    """Return for every kind the nodes that do work and their features, (n, features) each; kept with the graph."""
    by_kind: dict[LayerKind, list[Node]] = {}
    for node in graph.nodes:
        if node.kind not in FREE_KINDS and not node.folded:
            by_kind.setdefault(node.kind, []).append(node)
    return {kind: node_features(kind, nodes) for kind, nodes in by_kind.items()}


def node_features(kind: LayerKind, nodes: list[Node]) -> NodeFeatures:
    """Return nodes of one kind with their features."""
    works = [node_work(node) for node in nodes]
    return nodes, feature_matrix(works), tree_matrix(kind, [node.params for node in nodes], works)


def fit_directory(directory: Path, name: str) -> tuple[LatencyPredictor, dict[LayerKind, Score]]:
    """Fit every kind whose CSV file lies in ``directory``; kinds with too few rows borrow, and have no score.

    Data of the collector also borrows kinds that it has no file of. What was borrowed, and from where, is in the
    provenance.

    Raises: DataSetError: there are too few rows, and nothing to borrow from, or a file is malformed.
    """
    datasets = load_datasets(directory, min_rows=1)
    provenance = {**read_provenance(directory), "rows": {kind: len(data) for kind, data in datasets.items()}}
    own = {kind: data for kind, data in datasets.items() if len(data) >= MIN_ROWS}
    fitted = {kind: fit_kind(data, with_forest=name == "forest") for kind, data in own.items()}
    models = {kind: model for kind, (model, _) in fitted.items()}
    wanted = COLUMNS if "side" in provenance else _kinds_in(directory)
    source = lender(directory, provenance)
    if not own and (source is None or not datasets):
        raise DataSetError(f"no data set in {directory} has {MIN_ROWS} rows: collect for longer")
    if source is not None and not set(wanted) <= set(own):
        lent = installed_predictor(source, name)
        borrowed = borrowed_models({kind: lent.kinds[kind] for kind in wanted if kind in lent.kinds}, datasets, own)
        models |= borrowed
        provenance |= {"borrowed": {"kinds": list(borrowed), "device_name": lent.provenance.get("device_name")}}
    return LatencyPredictor(name, models, provenance), {kind: score for kind, (_, score) in fitted.items()}


def lender(directory: Path, provenance: Mapping[str, Any]) -> Path | None:
    """Return the shipped data from which data sets borrow; None where they take its place, or there is none."""
    shipped = default_directory(str(provenance.get("side", "edge")), "cpu")
    return None if home_of(directory).resolve() == shipped.resolve() or not _kinds_in(shipped) else shipped


def say_what_is_borrowed(predictor: LatencyPredictor) -> None:
    """Log which kinds have too few rows."""
    borrowed = predictor.provenance.get("borrowed")
    if borrowed:
        log.info(
            "borrowed from the data of %s, scaled to this machine: %s; there are fewer than %d rows of each",
            borrowed["device_name"],
            ", ".join(borrowed["kinds"]),
            MIN_ROWS,
        )


def load_datasets(directory: Path, min_rows: int = MIN_ROWS) -> dict[LayerKind, DataSet]:
    """Return every data set in a directory that has enough rows.

    Raises: DataSetError: there is no file, or one is malformed.
    """
    kinds = _kinds_in(directory)
    if not kinds:
        raise DataSetError(f"no data sets in {directory}: collect them with python -m predictor.collect")
    rows = {kind: read_rows(csv_path(directory, kind), kind) for kind in kinds}
    return {kind: dataset_of(kind, known) for kind, known in rows.items() if len(known) >= min_rows}


def _kinds_in(directory: Path) -> list[LayerKind]:
    return [kind for kind in COLUMNS if csv_path(directory, kind).exists()]


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return what the collector wrote: device, threads, versions, and its collections; empty for data without it.

    Raises: DataSetError: it is damaged.
    """
    path = in_effect(directory) / "provenance.json"
    try:
        provenance = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise DataSetError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(provenance, dict):
        return {}
    threads = provenance.get("threads", 1)
    if not isinstance(threads, int) or threads < 1:
        raise DataSetError(f"{path}: threads is {threads!r}, expected a whole number of at least 1")
    return provenance


# ---------------------------------------------------------------- which predictor


Found = TypeVar("Found")


def dataset_threads(side: str, device: str) -> int:
    """Return the CPU threads that a side's installed data was measured with."""
    places = dataset_directories(side, device)
    return first_usable(places, lambda place: int(read_provenance(place).get("threads", 1)), side)


def find_predictor(side: str, device: str = "cpu", name: str = "forest", path: Path | None = None) -> LatencyPredictor:
    """Return a side's predictor: of a parameter file, of a directory of data sets, or the installed one.

    Raises: DataSetError: what the user named, or what is shipped, is missing or malformed.
    """
    if path is not None:
        return installed_predictor(path, name) if path.is_dir() else load_predictor(path)
    if name == "linear":
        return first_usable(config_paths(side, device), load_predictor, side)

    def profile(place: Path) -> LatencyPredictor:
        if place != default_directory(side, "cpu") and "side" not in read_provenance(place):
            raise DataSetError(f"{place} has no provenance.json of a collection, so kinds may be missing")
        return installed_predictor(place, name)

    return first_usable(dataset_directories(side, device), profile, side)


def first_usable(places: Sequence[Path], read: Callable[[Path], Found], side: str) -> Found:
    """Return what is read in the first of some places that is not damaged; each that is, is reported.

    Raises: DataSetError: the last one is damaged, too.
    """
    for place in places[:-1]:
        try:
            return read(place)
        except DataSetError as exc:
            _warn_of_damage(str(exc), side)
    return read(places[-1])


@cache
def _warn_of_damage(damage: str, side: str) -> None:
    """Log it, once in this process."""
    log.warning(
        "%s; using the shipped data instead: python -m predictor.collect --side %s --fresh measures this machine again",
        damage,
        side,
    )


@cache
def installed_predictor(directory: Path, name: str) -> LatencyPredictor:
    """Return the predictor of a directory of data sets, kept in this process; a forest, in the cache directory."""
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
    say_what_is_borrowed(predictor)
    try:
        save_forest(forest_file(digest), predictor)
    except OSError as exc:
        log.warning("the fitted forest cannot be kept: %s", exc)
    return predictor


def dataset_directory(side: str, device: str) -> Path:
    """Return where the data sets of a side and device lie: of this very machine, of such a device, or of the CPU."""
    return dataset_directories(side, device)[0]


def dataset_directories(side: str, device: str) -> list[Path]:
    """Return where there are data sets for a side and device, the best first; the CPU's place in any case."""
    places = dict.fromkeys(default_directory(side, name) for name in (*names_of(device), "cpu"))
    return [place for place in places if _kinds_in(place)] or [default_directory(side, "cpu")]


def default_directory(side: str, name: str) -> Path:
    """Return where data sets belong that go by the name of a device, or of a machine: the CPU's in the contract's."""
    return DATASET_DIR / side if name == "cpu" else DATASET_DIR / side / name


def config_path(side: str, device: str = "cpu") -> Path:
    """Return where the linear parameters lie: of this very machine, of such a device, or of the CPU."""
    return config_paths(side, device)[0]


def config_paths(side: str, device: str) -> list[Path]:
    """Return where there are linear parameters for a side and device, the best first; the CPU's in any case."""
    places = dict.fromkeys(parameter_file(side, name) for name in (*names_of(device), "cpu"))
    return [place for place in places if place.exists()] or [parameter_file(side, "cpu")]


def parameter_file(side: str, name: str) -> Path:
    """Return the parameter file that goes by the name of a device, or of a machine; it may not exist."""
    return CONFIG_DIR / side / f"{name}.json"


def names_of(device: str) -> tuple[str, str, str]:
    """Return the names by which data goes: measured on this very machine, on one of its name, on any such device."""
    return name_to_collect(device), file_name(device_name(device)), device


def name_to_collect(device: str) -> str:
    """Return the name for data that is measured here: never that of shipped data, whose machine may be a faster one."""
    return f"own-{file_name(device_name(device))}"


# ---------------------------------------------------------------- forests on disk


def data_digest(directory: Path) -> str:
    """Return what names a fitted forest: its data, its features, its settings and the library that fits it.

    Raises: DataSetError: there is no data.
    """
    kinds = _kinds_in(directory)
    if not kinds:
        raise DataSetError(f"no data sets in {directory}: collect them with python -m predictor.collect")
    rounds = (forest.ROUNDS, forest.LEARNING_RATE, forest.FEW_ROWS, forest.FEW_ROUNDS, forest.FEW_RATE)
    settings = (rounds, forest.LEAVES, forest.L2_PENALTY, forest.MIN_LEAF_ROWS)
    versions = (FEATURES_VERSION, CONFIG_VERSION, importlib.metadata.version("scikit-learn"))
    features = sorted(TREE_COLUMNS.items())
    rows = (HELD_OUT_EVERY, UNDISTURBED, MAX_PACE)
    digest = hashlib.sha256(repr((versions, features, rows, settings)).encode())
    provenance = read_provenance(directory)
    digest.update(repr(sorted((key, str(value)) for key, value in provenance.items())).encode())
    for kind in kinds:
        try:
            content = csv_path(directory, kind).read_bytes()
        except OSError as exc:
            raise DataSetError(f"{csv_path(directory, kind)} cannot be read: {exc.strerror or exc}") from exc
        digest.update(f"{kind} {len(content)} ".encode() + content)
    source = lender(directory, provenance)
    if source is not None:  # kinds with few rows may come from there
        digest.update(repr((MIN_ROWS, COMMON_ROWS, UNMEASURED, data_digest(source))).encode())
    return digest.hexdigest()[:32]


def forest_file(digest: str) -> Path:
    """Return where the forest of that digest is kept.

    Raises: OSError: there is no cache directory.
    """
    return cache_directory() / "forests" / f"{digest}.npz"


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

    Raises: OSError: it was not kept, or cannot be read. DataSetError: the file is damaged.
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


# ---------------------------------------------------------------- linear parameters on disk


def save_predictor(path: Path, predictor: LatencyPredictor, scores: Mapping[LayerKind, Score]) -> None:
    """Write the linear models, their scores and their provenance as JSON."""
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

    Raises: DataSetError: missing, malformed, or written for other features.
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
            raise ValueError("the number of threads is no number of at least 1")
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


def fit_and_save(directory: Path, path: Path) -> dict[str, dict[LayerKind, Score]]:
    """Fit a directory of data sets, write the linear parameters, keep the forest; return the scores of both."""
    linear, linear_scores = fit_directory(directory, "linear")
    say_what_is_borrowed(linear)
    save_predictor(path, linear, linear_scores)
    trees, forest_scores = fit_directory(directory, "forest")
    try:
        save_forest(forest_file(data_digest(directory)), trees)
    except OSError as exc:
        log.warning("the fitted forest cannot be kept: %s", exc)
    return {"linear": linear_scores, "forest": forest_scores}
