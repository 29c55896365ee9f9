"""Crossovers: the bandwidths at which another cut becomes the best one."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

PRECISION = 1e-6  # relative, of a crossover


Choice = TypeVar("Choice")


@dataclass(frozen=True, slots=True)
class Crossover(Generic[Choice]):
    """A rate, and the best choices below and above it."""

    rate: float
    below: Choice
    above: Choice


def crossovers(
    best_at: Callable[[float], Choice], low: float, high: float, key: Callable[[Choice], Hashable]
) -> list[Crossover[Choice]]:
    """Return every rate from ``low`` to ``high`` at which the best choice changes, by bisection, in order.

    None is missed if each choice costs a constant and a share of 1 / rate, as cuts do on a warm connection. The minimum
    of such lines is concave in 1 / rate, so each is best on one interval. A line that is best at both ends of an
    interval is best inside it.

    Args: key: equal for equal choices.
    """

    def between(low: float, below: Choice, high: float, above: Choice) -> list[Crossover[Choice]]:
        if key(below) == key(above):
            return []
        middle = math.sqrt(low * high)
        if high <= low * (1 + PRECISION):
            return [Crossover(middle, below, above)]
        found = best_at(middle)
        return [*between(low, below, middle, found), *between(middle, found, high, above)]

    return between(low, best_at(low), high, best_at(high))
