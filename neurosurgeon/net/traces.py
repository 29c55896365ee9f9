"""Networks over time: recorded ones as CSV files, and synthetic ones for tests.

A trace is a CSV file: seconds, Mbit/s, round trip in ms. Each line holds from its time on, the last one without end.
Lines that start with # are comments, and one line of names may come first:

    seconds,mbit_per_s,rtt_ms
    0,20,10
    5,5,30

A published 4G or 5G trace becomes one by keeping its time, throughput and latency columns.
"""

from __future__ import annotations

import bisect
import csv
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from neurosurgeon.utils.errors import UsageError, writing
from neurosurgeon.utils.units import mbit_per_s_to_bytes_per_s

NAMES = ("seconds", "mbit_per_s", "rtt_ms")
MAX_ROWS = 1_000_000
MAX_RTT_MS = 3_000.0  # beyond, timeouts end connections; those of the bandwidth service already after 1 s
STEP_S, LENGTH_S = 0.5, 30.0


class Condition(NamedTuple):
    """The rate and round trip of a network from some time on."""

    time_s: float
    rate_mbit: float
    rtt_ms: float


class Trace:
    """A network over time."""

    def __init__(self, conditions: Sequence[Condition]) -> None:
        self.conditions = conditions
        self._times_s = [condition.time_s for condition in conditions]

    def at(self, time_s: float) -> Condition:
        """Return the condition at a time; before the first one, the first."""
        return self.conditions[self._index(time_s)]

    def transfer_s(self, start_s: float, size_bytes: float) -> float:
        """Return the duration (s) of a transfer that starts at ``start_s``, at all rates that it meets."""
        time_s, left_bytes, index = start_s, size_bytes, self._index(start_s)
        for end_s in [*self._times_s[index + 1 :], math.inf]:
            rate_bytes_per_s = mbit_per_s_to_bytes_per_s(self.conditions[index].rate_mbit)
            if left_bytes <= rate_bytes_per_s * (end_s - time_s):
                break
            left_bytes -= rate_bytes_per_s * (end_s - time_s)
            time_s, index = end_s, index + 1
        return time_s + left_bytes / rate_bytes_per_s - start_s

    def _index(self, time_s: float) -> int:
        return max(bisect.bisect_right(self._times_s, time_s) - 1, 0)


def read_trace(path: Path) -> Trace:
    """Return the trace in a file.

    Raises: UsageError: it cannot be read, or a line is wrong; the message names the line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return Trace(_conditions(path, csv.reader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise UsageError(f"trace {path} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc


def _conditions(path: Path, rows: Iterable[Sequence[str]]) -> list[Condition]:
    conditions: list[Condition] = []
    is_first = True
    for number, row in enumerate(rows, 1):
        if not row or row[0].lstrip().startswith("#"):
            continue
        are_names, is_first = is_first and not _is_number(row[0]), False
        if are_names:
            continue
        if len(conditions) >= MAX_ROWS:
            raise UsageError(f"{path}: more than {MAX_ROWS} lines: cut it, or keep every tenth")
        try:
            conditions.append(_condition(row, conditions[-1].time_s if conditions else -math.inf))
        except ValueError as exc:
            raise UsageError(f"{path}, line {number}: {exc}") from exc
    if not conditions:
        raise UsageError(f"{path}: no line of {', '.join(NAMES)}")
    return conditions


def _condition(row: Sequence[str], before_s: float) -> Condition:
    if len(row) != len(NAMES) or not all(map(_is_number, row)):
        raise ValueError(f"{','.join(row)[:60]!r} is not three numbers: {', '.join(NAMES)}")
    condition = Condition(*map(float, row))
    if condition.time_s < 0:
        raise ValueError(f"time {condition.time_s:g} s is negative")
    if condition.time_s <= before_s:
        raise ValueError(f"time {condition.time_s:g} s does not come after {before_s:g} s: sort the lines by time")
    check_condition(condition.rate_mbit, condition.rtt_ms)
    return condition


def check_condition(rate_mbit: float, rtt_ms: float) -> None:
    """Check that bytes arrive, and before the timeouts of a connection.

    Raises: ValueError: they do not.
    """
    if not 0 < rate_mbit < math.inf:
        raise ValueError(f"rate {rate_mbit:g} Mbit/s: nothing would ever arrive; write an outage as 0.01")
    if not 0 <= rtt_ms <= MAX_RTT_MS:
        raise ValueError(f"round trip {rtt_ms:g} ms is not between 0 and {MAX_RTT_MS:g}: connections would time out")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---------------------------------------------------------------- synthetic traces


def stepped(time_s: float, draw: random.Random) -> tuple[float, float]:
    """A link whose rate jumps every 6 s."""
    return (40.0, 4.0, 12.0, 2.0, 40.0)[int(time_s // 6) % 5], 10.0


def sinusoidal(time_s: float, draw: random.Random) -> tuple[float, float]:
    """A link that swings slowly between 3 and 48 Mbit/s."""
    return 12.0 * 4.0 ** math.sin(2 * math.pi * time_s / 15), 20.0


def outage(time_s: float, draw: random.Random) -> tuple[float, float]:
    """A link with an outage of 4 s: 0.1 Mbit/s."""
    return (0.1, 60.0) if 12 <= time_s < 16 else (25.0, 15.0)


def hand_over(time_s: float, draw: random.Random) -> tuple[float, float]:
    """From Wi-Fi to a mobile cell, with a second at the edge of both, and back."""
    phase = time_s % 15
    return (50.0, 5.0) if phase < 7 else (1.0, 80.0) if phase < 8 else (8.0, 45.0)


def random_walk(time_s: float, draw: random.Random) -> tuple[float, float]:
    """A link whose rate is a random walk."""
    return math.exp(draw.gauss(0.0, 0.25)), 25.0  # the factor of the next step; `made_up` bounds the rate


Shape = Callable[[float, random.Random], tuple[float, float]]  # from the time (s): Mbit/s, round trip (ms)
SHAPES: dict[str, Shape] = {shape.__name__: shape for shape in (stepped, sinusoidal, random_walk, outage, hand_over)}


def made_up(name: str, seed: int = 1) -> Trace:
    """Return the synthetic trace of that name; the same seed gives the same trace."""
    draw, conditions, walk_mbit = random.Random(seed), [], 10.0  # noqa: S311  # no secret
    for index in range(round(LENGTH_S / STEP_S)):
        rate_mbit, rtt_ms = SHAPES[name](index * STEP_S, draw)
        if name == "random_walk":
            walk_mbit = rate_mbit = min(max(walk_mbit * rate_mbit, 1.0), 60.0)
        conditions.append(Condition(index * STEP_S, round(rate_mbit, 3), rtt_ms))
    return Trace(conditions)


def write_trace(path: Path, trace: Trace, comment: str) -> None:
    """Write a trace to a file, and of equal conditions in a row only the first.

    Raises: UsageError: the file cannot be written.
    """
    lines, last = [f"# {comment}", ",".join(NAMES)], None
    for condition in trace.conditions:
        if condition[1:] != last:
            lines.append(",".join(f"{value:g}" for value in condition))
        last = condition[1:]
    with writing(path):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
