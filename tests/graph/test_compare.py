"""The comparison of outputs: how large a difference is, and when two outputs cannot be compared."""

from __future__ import annotations

import math

import numpy as np
import pytest

from neurosurgeon.graph.compare import TOLERANCE, difference, largest_difference, tolerance_of
from neurosurgeon.graph.spec import Array

INF, NAN = np.inf, np.nan


def floats(*values: float, dtype: str = "float32") -> Array:
    return np.array(values, dtype)


def bfloat16(*values: float) -> Array:
    """Return the bits of values, as this project keeps this type."""
    return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("expected", "given", "relative", "absolute"),
    [
        (floats(1, -4), floats(1, -4), 0.0, 0.0),
        (floats(1, -4), floats(3, -4), 0.5, 2.0),
        (floats(0, 0), floats(0, 0.25), 0.25, 0.25),  # without a largest value, the difference itself
        (floats(), floats(), 0.0, 0.0),
        (np.array([3 + 4j]), np.array([3 + 9j]), 1.0, 5.0),
        (bfloat16(1, 2), bfloat16(1, 1), 0.5, 1.0),
        (floats(1, INF, -INF, NAN), floats(3, INF, -INF, NAN), 2.0, 2.0),
        (floats(6e4, 0, dtype="float16"), floats(-6e4, 0, dtype="float16"), 2.0, 1.2e5),  # above its largest value
        (np.array([0, 255], np.uint8), np.array([1, 255], np.uint8), 0.5, 1.0),  # integers: the share that differs
        (np.array([0, 255], np.uint8), np.array([255, 255], np.uint8), 0.5, 255.0),
        (np.array([True, False]), np.array([True, True]), 0.5, 1.0),
        (np.array([], np.int64), np.array([], np.int64), 0.0, 0.0),
    ],
)
def test_the_difference_is_a_share_of_the_largest_value(
    expected: Array, given: Array, relative: float, absolute: float
) -> None:
    found = difference(expected, given)
    assert found.relative == pytest.approx(relative)
    assert found.absolute == pytest.approx(absolute)


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        (floats(1, 2), floats(1)),
        (floats(1, 2), floats(1, 2)[None]),
        (floats(1), floats(1, dtype="float64")),
        (bfloat16(1), floats(1, dtype="float16")),
        (floats(1, NAN), floats(1, 2)),
        (floats(1, 2), floats(1, NAN)),
        (floats(1, INF), floats(1, -INF)),
        (floats(1, INF), floats(1, NAN)),
        (floats(INF, 1), floats(1, INF)),
    ],
)
def test_other_shapes_types_and_places_that_are_not_finite_differ_infinitely(expected: Array, given: Array) -> None:
    assert difference(expected, given) == (math.inf, math.inf)


def test_the_largest_difference_of_several_outputs_counts() -> None:
    one = [floats(1, 1), floats(100, 0)]
    assert largest_difference(one, one).relative == 0.0
    assert largest_difference(one, [floats(1, 1.5), floats(110, 0)]) == (0.5, 0.5)
    assert largest_difference([], []).relative == 0.0
    assert largest_difference(one, one[:1]).relative == math.inf
    assert largest_difference(one[:1], one).relative == math.inf


def test_types_with_few_digits_have_a_larger_tolerance() -> None:
    assert tolerance_of([]) == tolerance_of(["float32", "int64"]) == TOLERANCE
    assert TOLERANCE < tolerance_of(["float32", "float16"]) < tolerance_of(["float16", "bfloat16"])
