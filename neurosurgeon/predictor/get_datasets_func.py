"""Data sets: CSV files of measured layers, to works and latencies, per kind.

Each kind has one file with the columns below, then any number of further ones. A file with just these columns
loads and trains.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import FloatArray, feature_matrix, tree_matrix
from neurosurgeon.predictor.kernel_flops import Work, row_work
from neurosurgeon.predictor.staging import in_effect
from neurosurgeon.utils.errors import DataSetError
from neurosurgeon.utils.files import data_directory

DATASET_DIR = data_directory() / "dataset"
MAX_PACE = 1.5  # times that of the device undisturbed
UNDISTURBED = 0.25  # this share of the time a device is at its best pace, or near it
MIN_ROWS = 20  # fewer say nothing about a kind
MIN_VALUE, MAX_VALUE = 1e-9, 1e15  # a layer outside has no width, no channels, or more FLOPs than a day of a GPU

COLUMNS: Mapping[LayerKind, tuple[str, ...]] = {
    LayerKind.CONV: ("HW", "kernel", "stride", "Cin", "Cout", "FLOPs", "latency"),
    LayerKind.DW_CONV: ("HW", "kernel", "stride", "Cin", "FLOPs", "latency"),
    LayerKind.LINEAR: ("in_features", "out_features", "FLOPs", "latency"),
    LayerKind.MAXPOOL: ("HW", "kernel", "stride", "Cin", "latency"),
    LayerKind.AVGPOOL: ("HW", "output", "Cin", "latency"),
    LayerKind.BATCHNORM: ("HW", "Cin", "latency"),
    LayerKind.ACTIVATION: ("HW", "Cin", "latency"),
    LayerKind.ADD: ("HW", "Cin", "latency"),
    LayerKind.MULTIPLY: ("HW", "Cin", "latency"),
    LayerKind.CONCAT: ("HW", "Cin", "latency"),
    LayerKind.DROPOUT: ("HW", "Cin", "latency"),
    LayerKind.FLATTEN: ("HW", "Cin", "latency"),
    LayerKind.SHUFFLE: ("HW", "Cin", "latency"),
    LayerKind.MATMUL: ("batch", "rows", "inner", "columns", "FLOPs", "latency"),
    LayerKind.LAYER_NORM: ("rows", "width", "latency"),
    LayerKind.SOFTMAX: ("rows", "width", "latency"),
    LayerKind.ATTENTION: ("groups", "tokens", "width", "heads", "FLOPs", "latency"),
}


BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class DataSet:
    """Measured layers of one kind: features of both models (n, features) and latencies (n,), ms."""

    kind: LayerKind
    features: FloatArray
    tree_features: FloatArray
    latency_ms: FloatArray

    def rows(self, which: slice | BoolArray) -> DataSet:
        """Return some of the rows."""
        return DataSet(self.kind, self.features[which], self.tree_features[which], self.latency_ms[which])

    def __len__(self) -> int:
        return len(self.latency_ms)


def csv_name(kind: LayerKind) -> str:
    """Return the name of the file with the data set of a kind."""
    return f"{kind}_lat.csv"


def csv_path(directory: Path, kind: LayerKind) -> Path:
    """Return where the data set of a kind lies."""
    return in_effect(directory) / csv_name(kind)


def read_rows(path: Path, kind: LayerKind) -> list[dict[str, float]]:
    """Return the rows of a data set as numbers, latencies at the pace that the device has undisturbed.

    Raises: DataSetError: missing file or column, or no positive number where one should be; names file, row, column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            absent = [name for name in COLUMNS[kind] if name not in header]
            if len(set(header)) < len(header):
                raise DataSetError(f"{path}: column {_first_double(header)!r} is there twice")
            if absent:
                raise DataSetError(f"{path}: column {absent[0]!r} is missing; expected {','.join(COLUMNS[kind])}")
            return _at_one_pace([_numbers(path, kind, reader.line_num, row) for row in reader])
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataSetError(f"{path} cannot be read: {exc}") from exc


def _at_one_pace(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the rows as if the device had always been as fast as in its better moments.

    ``pace_ms`` is what layers that are always the same took while a row was measured; the lower quartile is the
    device undisturbed. Rows at less than two thirds of its pace are left out: something else had a core to itself, and
    that slows each layer by a factor of its own. Rows from elsewhere have no pace, and stay as they are.
    """
    if not rows or not all(row.get("pace_ms", 0.0) > 0 for row in rows):
        return rows
    undisturbed_ms = float(np.quantile([row["pace_ms"] for row in rows], UNDISTURBED))
    kept = [row for row in rows if row["pace_ms"] <= MAX_PACE * undisturbed_ms]
    return [row | {"latency": row["latency"] * undisturbed_ms / row["pace_ms"]} for row in kept]


def _first_double(names: list[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])


def _numbers(
    path: Path, kind: LayerKind, line: int, row: Mapping[str | None, str | list[str] | None]
) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for column, text in row.items():
        if column is None:
            raise DataSetError(f"{path}, line {line}: more values than columns")
        try:
            numbers[column] = float(text)  # type: ignore[arg-type]
        except (TypeError, ValueError) as exc:
            raise DataSetError(f"{path}, line {line}, column {column!r}: {text!r} is not a number") from exc
        in_contract = column in COLUMNS[kind] and column != "FLOPs"
        low = MIN_VALUE if in_contract else 0.0
        if not low <= numbers[column] <= MAX_VALUE:  # false for NaN, too
            bound = "above 0" if in_contract else "at least 0"
            raise DataSetError(f"{path}, line {line}, column {column!r}: {text!r} is not a sensible number {bound}")
    return numbers


def load_dataset(directory: Path, kind: LayerKind) -> DataSet:
    """Return the data set of one kind from a directory of CSV files.

    Raises: DataSetError.
    """
    path = csv_path(directory, kind)
    rows = read_rows(path, kind)
    if len(rows) < MIN_ROWS:
        raise DataSetError(f"{path} has {len(rows)} rows; at least {MIN_ROWS} are needed: collect for longer")
    return dataset_of(kind, rows)


def dataset_of(kind: LayerKind, rows: list[dict[str, float]]) -> DataSet:
    """Return the data set of some rows, at least one."""
    works = [row_work(kind, row) for row in rows]
    rows = _with_unexplained_work(rows, works)
    latency_ms = np.array([row["latency"] for row in rows])
    return DataSet(kind, feature_matrix(works), tree_matrix(kind, rows, works), latency_ms)


def _with_unexplained_work(rows: list[dict[str, float]], works: list[Work]) -> list[dict[str, float]]:
    """Return the rows with log2 of the FLOPs that they state over those that their columns explain.

    A file from elsewhere says nothing of groups or padding, but its FLOPs do. What most of its rows have in common
    is how its author counts (a multiplication and an addition as one or as two).
    """
    stated = [row.get("FLOPs", 0.0) for row in rows]
    ratios = [math.log2(flops / work.flops) if flops else 0.0 for flops, work in zip(stated, works, strict=True)]
    common = statistics.median(ratios)
    return [row | {"unexplained": ratio - common} for row, ratio in zip(rows, ratios, strict=True)]
