"""Crossovers of lines against their intersections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.planner.crossovers import crossovers

Line = tuple[float, float]  # a constant, and a share of 1 / rate

LINES = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6)


def best_of(lines: list[Line], rate: float) -> Line:
    return min(lines, key=lambda line: line[0] + line[1] / rate)


def test_crossovers_are_where_two_lines_meet() -> None:
    found = crossovers(lambda rate: best_of([(10, 0), (0, 10), (6, 2)], rate), 0.01, 100, lambda line: line)
    assert [change.rate for change in found] == [pytest.approx(0.5, rel=1e-6), pytest.approx(4 / 3, rel=1e-6)]
    assert [(change.below, change.above) for change in found] == [((10, 0), (6, 2)), ((6, 2), (0, 10))]


def test_crossovers_of_one_choice_are_none() -> None:
    assert crossovers(lambda rate: 1, 0.1, 10, lambda choice: choice) == []


@given(LINES, st.floats(0.01, 100))
def test_crossovers_have_one_best_line_between_them(lines: list[Line], rate: float) -> None:
    found = crossovers(lambda rate: best_of(lines, rate), 0.01, 100, lambda line: line)
    rates = [change.rate for change in found]
    assert rates == sorted(rates)
    here = best_of(lines, rate)
    known = found[sum(r < rate for r in rates) - 1].above if any(r < rate for r in rates) else best_of(lines, 0.01)
    cost, expected = (line[0] + line[1] / rate for line in (known, here))
    assert cost == pytest.approx(expected, rel=1e-4, abs=1e-9)
