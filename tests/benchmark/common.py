"""Functions of several benchmarks: interleaved rounds, medians, and files of results."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import s_to_ms

RESULTS = Path(os.environ.get("BENCH_RESULTS", "results"))
STOLEN_SHARE = 0.02  # of a measurement's time: times are wrong while the host runs other machines
STOLEN_FIELD = 8  # of the first line of /proc/stat (man 5 proc): clock ticks of all cores
MAX_TRIES = 5
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    pass
"""
AWAKE = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))" + BUSY

Measured = TypeVar("Measured")


def interleaved_medians(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, warmup: int = 2, calls: int = 1
) -> dict[str, float]:
    """Return the median time (ms) of a call of every contender.

    Every round gives each a turn of ``calls`` calls, in random order; the first ``warmup`` rounds do not count.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for round_number in range(warmup + rounds):
        random.shuffle(order)
        for name in order:
            for _ in range(calls):
                start_ms = now_ms()
                contenders[name]()
                if round_number >= warmup:
                    samples[name].append(now_ms() - start_ms)
    return {name: statistics.median(values) for name, values in samples.items()}


def undisturbed(measure: Callable[[], Measured]) -> Measured:
    """Return a measurement during which this machine had its cores, or the last of some tries."""
    for _ in range(MAX_TRIES):
        start_ms, stolen_ms = now_ms(), _stolen_ms()
        measured = measure()
        if _stolen_ms() - stolen_ms <= STOLEN_SHARE * (now_ms() - start_ms):
            break
    return measured


@contextmanager
def cores_awake() -> Iterator[None]:
    """Keep every core awake during the block: the host of a virtual core wakes it up late.

    A process of the scheduler's idle class spins on each core; any other process preempts it at once.
    """
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", AWAKE]))
            stack.callback(process.kill)
        yield


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep ``count`` other processes computing during the block. Each ends if this process ends."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(process.kill)
        yield


def environment_without(*names: str) -> dict[str, str]:
    """Return the environment of this process for a child, less some variables."""
    return {name: value for name, value in os.environ.items() if name not in names}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of one or more values, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _stolen_ms() -> float:
    """Return the time that the host took from this machine's cores, ms; 0 if the system does not report it."""
    try:
        ticks = Path("/proc/stat").read_text().split()[STOLEN_FIELD]
    except OSError:
        return 0.0
    return s_to_ms(int(ticks) / os.sysconf("SC_CLK_TCK"))


def kept_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of earlier runs of a benchmark; none without such a run."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def save(name: str, document: Mapping[str, Any]) -> None:
    """Write a benchmark's figures and their machine to a JSON file."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, **document}, indent=2) + "\n")
