"""The features of a layer, used to fit and to predict.

For the linear models the latency of a layer is a fixed cost, plus arithmetic, plus memory traffic, plus a cost for each
window. Every coefficient is a physical rate, so none may be negative. Traffic that leaves the caches has a rate of its
own; arithmetic runs over whole vectors of channels. Units keep the coefficients near ms: GFLOP, MB, millions of
positions.

For the trees a layer is its columns and its work, as logarithms, and the divisibility of its channels: vector units
are efficient at multiples of 16, caches are inefficient at large powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.kernel_flops import FLOAT_BYTES, Work
from neurosurgeon.utils.units import bytes_to_mb

FEATURES_VERSION = 3  # increases whenever a feature changes its meaning: earlier fits are then refused
FEATURE_NAMES = (
    "calls",
    "vector_gflops",
    "input_mb",
    "output_mb",
    "weight_mb",
    "far_weight_mb",
    "far_activation_mb",
    "output_mpixels",
)
VECTOR_FLOATS = 16  # channels that one vector instruction handles (AVX-512; two NEON or AVX2 steps)
NEAR_WEIGHT_MB = 16.0  # about the part of a layer's weights that a shared last-level cache keeps between two runs
NEAR_ACTIVATION_MB = 1.0  # about the size of a core's own cache
MAX_POWER_OF_2 = 7  # exponent of the power of two that divides the channels: beyond 128 the latency stays the same

# The columns of each kind that the trees use beside its work; a missing column has its value in DEFAULTS.
CONV_COLUMNS = ("HW", "kernel", "stride", "padding", "Cin", "Cout", "groups", "bias", "unexplained")
TREE_COLUMNS: Mapping[LayerKind, tuple[str, ...]] = {
    LayerKind.CONV: CONV_COLUMNS,
    LayerKind.DW_CONV: CONV_COLUMNS,
    LayerKind.LINEAR: ("in_features", "out_features", "unexplained"),
    LayerKind.MAXPOOL: ("HW", "kernel", "stride", "padding", "Cin"),
    LayerKind.AVGPOOL: ("HW", "output", "kernel", "Cin"),
    LayerKind.ACTIVATION: ("HW", "Cin", "function", "inplace"),
    LayerKind.ADD: ("HW", "Cin", "broadcast"),
    LayerKind.MULTIPLY: ("HW", "Cin", "broadcast"),
    LayerKind.CONCAT: ("HW", "Cin", "inputs"),
    LayerKind.MATMUL: ("batch", "rows", "inner", "columns", "linear"),
    LayerKind.LAYER_NORM: ("rows", "width"),
    LayerKind.SOFTMAX: ("rows", "width"),
    LayerKind.ATTENTION: ("groups", "tokens", "width", "heads", "windowed"),
}
PLANE_COLUMNS = ("HW", "Cin")  # of all other kinds
DEFAULTS = {
    **{"groups": 1.0, "bias": 1.0, "inplace": 1.0, "inputs": 2.0, "linear": 1.0},
    **dict.fromkeys(("padding", "function", "broadcast", "unexplained", "windowed"), 0.0),
}
SMALLEST_MFLOPS = 1e-3

FloatArray = NDArray[np.float64]
Columns = Mapping[str, float]


def feature_matrix(works: Sequence[Work]) -> FloatArray:
    """Return the features of the linear models, (n, 8), in the order of ``FEATURE_NAMES``."""
    rows = [_features(work) for work in works]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(FEATURE_NAMES))


def _features(work: Work) -> tuple[float, ...]:
    channels = max(work.output_channels, 1)
    vector_fill = channels / (math.ceil(channels / VECTOR_FLOATS) * VECTOR_FLOATS)
    input_mb, output_mb = bytes_to_mb(work.input_bytes), bytes_to_mb(work.output_bytes)
    weight_mb = bytes_to_mb(work.weight_bytes)
    return (
        1.0,
        work.flops / 1e9 / vector_fill,
        input_mb,
        output_mb,
        weight_mb,
        max(weight_mb - NEAR_WEIGHT_MB, 0.0),
        max(input_mb + output_mb - NEAR_ACTIVATION_MB, 0.0),
        output_mb / FLOAT_BYTES / channels,
    )


def tree_matrix(kind: LayerKind, columns: Sequence[Columns], works: Sequence[Work]) -> FloatArray:
    """Return the features of the trees for layers of one kind, (n, features)."""
    names = TREE_COLUMNS.get(kind, PLANE_COLUMNS)
    rows = [_tree_features(kind, names, row, work) for row, work in zip(columns, works, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1)


def _tree_features(kind: LayerKind, names: Sequence[str], row: Columns, work: Work) -> list[float]:
    values = {name: _column(kind, row, name) for name in names}
    groups, kernel = values.get("groups", 1.0), values.get("kernel", 1.0)
    inputs = _first_known(values, ("Cin", "in_features", "inner", "width"), 1.0) / groups
    outputs = _first_known(values, ("Cout", "out_features", "columns"), work.output_channels) / groups
    return [
        *(value if name == "unexplained" else math.log2(1 + value) for name, value in values.items()),
        math.log2(SMALLEST_MFLOPS + work.flops / 1e6),
        *(math.log2(1 + size) for size in (work.input_bytes, work.output_bytes, work.weight_bytes, work.traffic_bytes)),
        math.log2((1 + work.flops) / (1 + work.traffic_bytes)),  # arithmetic intensity
        math.log2(1 + work.output_bytes / FLOAT_BYTES / max(work.output_channels, 1)),  # output positions
        math.log2(1 + inputs * kernel * kernel),  # these two and the output positions: the sizes of the matrix product
        math.log2(1 + outputs),
        inputs % VECTOR_FLOATS,
        outputs % VECTOR_FLOATS,
        _exponent_of_2(inputs),
        _exponent_of_2(outputs),
    ]


def _first_known(values: Columns, names: Sequence[str], default: float) -> float:
    return next((values[name] for name in names if name in values), default)


def _column(kind: LayerKind, row: Columns, name: str) -> float:
    if name in row:
        return float(row[name])
    if kind is LayerKind.DW_CONV and name in ("Cout", "groups"):
        return float(row["Cin"])
    if name == "padding" and kind in (LayerKind.CONV, LayerKind.DW_CONV):
        return float(row["kernel"] // 2)
    if name == "kernel":
        return float(row["HW"]) / float(row["output"])
    return DEFAULTS[name]


def _exponent_of_2(channels: float) -> float:
    """Return the exponent of the largest power of two that divides the channels, at most ``MAX_POWER_OF_2``."""
    whole = max(int(channels), 1)
    return float(min((whole & -whole).bit_length() - 1, MAX_POWER_OF_2))
