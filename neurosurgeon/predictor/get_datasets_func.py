"""Read data sets: CSV files of measured layers, one for each kind, as features and latencies.

A file has the columns below, then any number of further ones. A file with just these columns loads and trains.
`provenance.json` beside the files names the machine that they were measured on.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import FloatArray, feature_matrix, tree_matrix
from neurosurgeon.predictor.kernel_flops import Work, row_work
from neurosurgeon.predictor.staging import active_directory
from neurosurgeon.utils.errors import DataSetError

MAX_CONTROL_RATIO = 1.5  # control layers / control layers undisturbed: rows beyond are left out
UNDISTURBED_QUANTILE = 0.25  # of the times of the control layers: the device undisturbed
MIN_ROWS = 20  # of a kind that is fitted
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

    def rows(self, selected: BoolArray) -> DataSet:
        """Return the rows that a mask (n,) selects."""
        return DataSet(self.kind, self.features[selected], self.tree_features[selected], self.latency_ms[selected])

    def __len__(self) -> int:
        return len(self.latency_ms)


# ---------------------------------------------------------------- directories


def csv_name(kind: LayerKind) -> str:
    """Return the name of the file with the data set of a kind."""
    return f"{kind}_lat.csv"


def csv_path(directory: Path, kind: LayerKind) -> Path:
    """Return the path of the data set of a kind in a directory of data sets; it may not exist."""
    return active_directory(directory) / csv_name(kind)


def kinds_in(directory: Path) -> list[LayerKind]:
    """Return the kinds that have a data set in a directory."""
    return [kind for kind in COLUMNS if csv_path(directory, kind).exists()]


def measured_kinds(directory: Path) -> list[LayerKind]:
    """Return the kinds that have a data set in a directory, at least one.

    Raises: DataSetError: there is none.
    """
    kinds = kinds_in(directory)
    if not kinds:
        raise DataSetError(f"no data sets in {directory}: collect them with python -m predictor.collect")
    return kinds


def load_datasets(directory: Path, min_rows: int = MIN_ROWS) -> dict[LayerKind, DataSet]:
    """Return every data set of a directory that has enough rows.

    Raises: DataSetError: there is no file, or one is malformed.
    """
    rows = {kind: read_rows(csv_path(directory, kind), kind) for kind in measured_kinds(directory)}
    return {kind: make_dataset(kind, known) for kind, known in rows.items() if len(known) >= min_rows}


def load_dataset(directory: Path, kind: LayerKind) -> DataSet:
    """Return the data set of one kind in a directory.

    Raises: DataSetError: the file is missing, malformed, or has too few rows.
    """
    path = csv_path(directory, kind)
    rows = read_rows(path, kind)
    if len(rows) < MIN_ROWS:
        raise DataSetError(f"{path} has {len(rows)} rows; at least {MIN_ROWS} are needed: collect for longer")
    return make_dataset(kind, rows)


def read_provenance(directory: Path) -> dict[str, Any]:
    """Return the provenance of a directory of data sets: device, threads, versions, collections; empty without a file.

    Raises: DataSetError: the file is damaged.
    """
    path = active_directory(directory) / "provenance.json"
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


# ---------------------------------------------------------------- rows


def read_rows(path: Path, kind: LayerKind) -> list[dict[str, float]]:
    """Return the rows of a data set as numbers; latencies are those of the device undisturbed.

    Raises: DataSetError: a file or column is missing, or a value is not a positive number; the message names file,
            line and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            absent = [name for name in COLUMNS[kind] if name not in header]
            duplicates = [name for index, name in enumerate(header) if name in header[:index]]
            if duplicates:
                raise DataSetError(f"{path}: column {duplicates[0]!r} is there twice")
            if absent:
                raise DataSetError(f"{path}: column {absent[0]!r} is missing; expected {','.join(COLUMNS[kind])}")
            return _without_disturbance([_parse_row(path, kind, reader.line_num, row) for row in reader])
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataSetError(f"{path} cannot be read: {exc}") from exc


def _without_disturbance(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the rows with the latencies of the device undisturbed.

    ``pace_ms`` is the time of the control layers, always the same ones, while a row was measured. Their lower quartile
    is the device undisturbed, and each latency is scaled to it. Rows at less than two thirds of its speed are left
    out: another program had a core to itself, and that slows each layer by a factor of its own. Rows of a file without
    the column stay as they are.
    """
    if not rows or not all(row.get("pace_ms", 0.0) > 0 for row in rows):
        return rows
    undisturbed_ms = float(np.quantile([row["pace_ms"] for row in rows], UNDISTURBED_QUANTILE))
    kept = [row for row in rows if row["pace_ms"] <= MAX_CONTROL_RATIO * undisturbed_ms]
    return [row | {"latency": row["latency"] * undisturbed_ms / row["pace_ms"]} for row in kept]


def _parse_row(
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


def make_dataset(kind: LayerKind, rows: list[dict[str, float]]) -> DataSet:
    """Return the data set of some rows, at least one."""
    works = [row_work(kind, row) for row in rows]
    rows = _with_unexplained_work(rows, works)
    latency_ms = np.array([row["latency"] for row in rows])
    return DataSet(kind, feature_matrix(works), tree_matrix(kind, rows, works), latency_ms)


def _with_unexplained_work(rows: list[dict[str, float]], works: list[Work]) -> list[dict[str, float]]:
    """Return the rows with log2 of the FLOPs that they state over those that their columns explain.

    A file of another project has no columns for groups or padding, but its FLOPs depend on them. The median over its
    rows is the author's way to count: a multiplication and an addition are one operation or two.
    """
    stated = [row.get("FLOPs", 0.0) for row in rows]
    ratios = [math.log2(flops / work.flops) if flops else 0.0 for flops, work in zip(stated, works, strict=True)]
    common = statistics.median(ratios)
    return [row | {"unexplained": ratio - common} for row, ratio in zip(rows, ratios, strict=True)]
