"""Comparison of the outputs of two runs: equal within a tolerance, or how different."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from neurosurgeon.graph.spec import Array, as_floats, dtype_of

TOLERANCE = 1e-4  # of the largest value: what the design promises for every cut
TYPE_TOLERANCES = {"float16": 1e-2, "bfloat16": 6e-2}  # these types have fewer digits, of which the last ones differ


class Difference(NamedTuple):
    """The difference of two arrays."""

    relative: float  # the largest one, as a share of the largest value; of integers, the share of those that differ
    absolute: float


NONE, INFINITE = Difference(0.0, 0.0), Difference(math.inf, math.inf)


def difference(expected: Array, given: Array) -> Difference:
    """Return the difference of two arrays.

    It is infinite if they have another shape or type, or values that are not finite at other places.
    """
    if expected.shape != given.shape or dtype_of(expected) != dtype_of(given):
        return INFINITE
    one, other = (as_floats(array).astype(np.complex128) for array in (expected, given))
    finite = np.isfinite(one)
    if not np.array_equal(finite, np.isfinite(other)) or not np.array_equal(one[~finite], other[~finite], True):
        return INFINITE
    one, other = one[finite], other[finite]
    absolute = float(np.abs(one - other).max(initial=0.0))
    if expected.dtype.kind in "biu" and dtype_of(expected) != "bfloat16":
        return Difference(float(np.mean(one != other)) if one.size else 0.0, absolute)
    largest = float(np.abs(one).max(initial=0.0))
    return Difference(absolute / largest if largest else absolute, absolute)


def largest_difference(expected: Sequence[Array], given: Sequence[Array]) -> Difference:
    """Return the largest difference of the outputs of two runs; infinite if their numbers differ."""
    if len(expected) != len(given):
        return INFINITE
    return max(map(difference, expected, given), default=NONE)


def tolerance_of(types: Sequence[str]) -> float:
    """Return the largest relative difference of equal outputs that are computed in these types."""
    return max((TYPE_TOLERANCES.get(name, TOLERANCE) for name in types), default=TOLERANCE)
