"""Which filter follows a rate best: the median of three, an exponential mean, or the project's, on the shipped traces.

    python -m tests.benchmark.rate_filter

A sample every quarter of a second, with noise of 7 %; one in twenty is an outlier by a factor of two. Error: of the
rate, median and mean over time. Lag: samples until the error is below 15 % after a step of more than 1.5, or until the
next step or the end where it never is; of the longest of each run the 95th percentile.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Callable

from neurosurgeon.net.bandwidth import Rate
from neurosurgeon.net.rate_filter import RateFilter, TransferSample
from neurosurgeon.net.traces import SHAPES, Trace, made_up
from tests.benchmark.common import save

PERIOD_S, LENGTH_S, NOISE, OUTLIERS, SEEDS = 0.25, 30.0, 0.07, 0.05, 20
GOOD, STEP, GATE = 0.15, 1.5, 0.35

Follow = Callable[[float], float]  # from a sample to the estimate after it


def median_of_three(first: float) -> Follow:
    kept = deque([first], maxlen=3)

    def follow(sample: float) -> float:
        kept.append(sample)
        return statistics.median(kept)

    return follow


def exponential(gain: float, rejects: bool) -> Callable[[float], Follow]:
    def start(first: float) -> Follow:
        known, refused = math.log(first), 0

        def follow(sample: float) -> float:
            nonlocal known, refused
            innovation = math.log(sample) - known
            if rejects and abs(innovation) > GATE and refused < 2:
                refused += 1
            else:
                known += innovation if refused >= 2 else gain * innovation
                refused = 0
            return math.exp(known)

        return follow

    return start


def ours(first: float) -> Follow:
    known, times_s = RateFilter(Rate(first, NOISE)), itertools.count(1)

    def follow(sample: float) -> float:
        known.update(TransferSample(Rate(sample, NOISE)), PERIOD_S * next(times_s))
        return known.rate.bytes_per_s

    return follow


FILTERS: dict[str, Callable[[float], Follow]] = {
    "median of 3": median_of_three,
    "exponential 0.2": exponential(0.2, False),
    "exponential 0.5": exponential(0.5, False),
    "0.2, rejecting": exponential(0.2, True),
    "0.5, rejecting": exponential(0.5, True),
    "Kalman, jumping": ours,
}


def errors_of(start: Callable[[float], Follow], trace: Trace, seed: int) -> tuple[list[float], int]:
    """Return the relative errors after each sample, and the longest lag after a step, in samples."""
    draw = random.Random(seed)
    follow, errors, lags, lag, before = start(trace.at(0.0).rate_mbit), [], [0], None, trace.at(0.0).rate_mbit
    for index in range(round(LENGTH_S / PERIOD_S)):
        true = trace.at(index * PERIOD_S).rate_mbit
        factor = 2.0 ** draw.choice((-1, 1)) if draw.random() < OUTLIERS else 1.0
        errors.append(abs(follow(true * factor * math.exp(draw.gauss(0.0, NOISE))) / true - 1))
        if not 1 / STEP < true / before < STEP:
            lags += [] if lag is None else [lag]
            lag = 0
        if lag is not None:
            lag += 1
            if errors[-1] < GOOD:
                lags.append(lag)
                lag = None
        before = true
    return errors, max([*lags, lag or 0])


def main() -> None:
    rows = {}
    print(f"{'error, %: median / mean; lag':<28}" + "".join(f"{name:>20}" for name in SHAPES))
    for name, start in FILTERS.items():
        line = f"{name:<28}"
        for shape in SHAPES:
            found = [errors_of(start, made_up(shape), seed) for seed in range(SEEDS)]
            errors = list(itertools.chain.from_iterable(one for one, _ in found))
            lag = statistics.quantiles([lag for _, lag in found], n=20)[-1]
            row = {"median": statistics.median(errors), "mean": statistics.fmean(errors), "lag": lag}
            rows[f"{name}, {shape}"] = row
            line += f"{100 * row['median']:>9.1f}/{100 * row['mean']:>5.1f};{lag:>4.1f}"
        print(line)
    save("rate_filter", {"rows": rows})


if __name__ == "__main__":
    main()
