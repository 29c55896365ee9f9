"""Load feedback: an edge beside others that keep the cloud busy, with feedback and without, in turn.

    python -m tests.benchmark.load

Hedging finishes a task of a busy cloud on the edge, which hides the effect of feedback. So it is also measured without
hedging. The edge shares its machine with the cloud and the other edges, so their work slows it down, equally in all
runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neurosurgeon.cli.process import ROOT, ServiceProcess
from tests.benchmark.common import save

ROUNDS = 4
OTHERS = 2
EDGE = ["--tasks", "30", "-t", "alex_net", "mobile_net", "--in-flight", "1", "--no-correction", "--seed", "1"]
OTHER = ["--tasks", "100000", "-t", "vgg_net", "--in-flight", "2", "--no-load-feedback", "--no-correction"]
LINK = ["--bandwidth", "1000", "--rtt", "0.3"]
WAYS = {
    "with feedback": ["--no-hedging"],
    "without": ["--no-load-feedback", "--no-hedging"],
    "without, finishing late tasks here": ["--no-load-feedback"],
}


def command(ports: list[int], *flags: str) -> list[str]:
    """Return the command of one edge."""
    return [sys.executable, "tasks_edge_api.py", "-p", str(ports[0]), "--monitor-port", str(ports[1]), *LINK, *flags]


@contextmanager
def others(ports: list[int]) -> Iterator[None]:
    """Keep the cloud busy: edges that send whole VGGs and never listen."""
    processes = [
        subprocess.Popen(command(ports, *OTHER), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(OTHERS)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_edge(ports: list[int], flags: list[str]) -> dict[str, Any]:
    """Run the edge's queue; return its document."""
    done = subprocess.run(command(ports, *EDGE, *flags, "--json"), cwd=ROOT, capture_output=True, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def main() -> None:
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    with ServiceProcess(["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        with others(cloud.ports):
            run_edge(cloud.ports, [])
            for _ in range(ROUNDS):
                for name, flags in WAYS.items():
                    tasks = run_edge(cloud.ports, flags)["tasks"]
                    mean_ms = statistics.mean(task["measured"]["total_ms"] for task in tasks)
                    rows[name].append((mean_ms, statistics.mean(task["where"] == "edge" for task in tasks)))
    print(f"{'':<36}{'mean latency, ms':>18}{'wholly on the edge':>20}   (medians of {ROUNDS} rounds in turn)")
    for name, runs in rows.items():
        mean_ms, share = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:<36}{mean_ms:>18.1f}{share:>20.0%}")
    save("load", {"runs": rows})


if __name__ == "__main__":
    main()
