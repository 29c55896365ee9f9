"""What benchmarks share: interleaved rounds, medians, and where results go."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.timing import now_ms

RESULTS = Path(os.environ.get("BENCH_RESULTS", "results"))


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


def kept_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows that earlier runs of a benchmark have written; none where there was no such run."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def save(name: str, document: Mapping[str, Any]) -> None:
    """Write a benchmark's figures and the machine they come from."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, **document}, indent=2) + "\n")
