"""Many edges at one cloud, a process each, 40 mixed tasks each: every result, fairness, and the cloud's memory.

    python -m tests.benchmark.many_edges [EDGES [ROUNDS]]

The class of every result is compared with that of the unsplit network here. Fairness is the slowest edge's time over
the median. Tasks/s: all tasks over the longest makespan. The edges do not begin at the same moment, so it is a little
too high.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.models.names import ZOO
from tests.benchmark.common import save
from tests.networks import load_network, random_input, run_whole

TASKS = 40
CUTS = ["--bandwidth", "1000", "--rtt", "0.1"]  # as if the link were perfect: the cloud gets as much as it can take


def start_edge(number: int, ports: list[int]) -> subprocess.Popen[str]:
    """Start an edge with a queue of its own."""
    command = [sys.executable, "tasks_edge_api.py", "-p", str(ports[0]), "--monitor-port", str(ports[1])]
    command += ["--tasks", str(TASKS), "--seed", str(number), "--no-correction", "--json", *CUTS]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def resident_mb(pid: int) -> float:
    """Return the memory of a process, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def one_round(edges: int, ports: list[int]) -> list[dict[str, Any]]:
    """Run all edges at the same time; return their documents."""
    processes = [start_edge(number, ports) for number in range(edges)]
    return [json.loads(process.communicate()[0]) for process in processes]


def main() -> None:
    edges, rounds = (int(text) for text in (sys.argv[1:] + ["8", "3"][len(sys.argv) - 1 :]))
    expected = {name: int(run_whole(load_network(name), random_input()).argmax()) for name in ZOO}
    memory_mb: list[float] = []
    rows: list[dict[str, Any]] = []
    with ServiceProcess(["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        for _ in range(rounds):
            documents = one_round(edges, cloud.ports)
            memory_mb.append(resident_mb(cloud.process.pid))
            tasks = [task for document in documents for task in document["tasks"]]
            makespans = [document["summary"]["makespan_ms"] for document in documents]
            tails = [np.percentile([t["measured"]["total_ms"] for t in d["tasks"]], 95) for d in documents]
            rows.append(
                {
                    "answers": sum(task["error"] is None for task in tasks),
                    "errors": [task["error"] for task in tasks if task["error"]],
                    "wrong": sum(task["top1"] != expected[task["model"]] for task in tasks if task["error"] is None),
                    "digests": {
                        name: len({t["output_digest"] for t in tasks if t["model"] == name}) for name in expected
                    },
                    "retries": sum(task["retries"] for task in tasks),
                    "p95_ms": [round(float(tail), 1) for tail in tails],
                    "fairness": max(makespans) / statistics.median(makespans),
                    "tasks_per_s": len(tasks) / max(makespans) * 1e3,
                }
            )
    print(f"{edges} edges, {TASKS} tasks each")
    for row, memory in zip(rows, memory_mb, strict=True):
        print(
            f"answers {row['answers']}, wrong {row['wrong']}, retries {row['retries']}, slowest edge / median "
            f"{row['fairness']:.2f}, {row['tasks_per_s']:.1f} tasks/s, cloud {memory:.0f} MB\n"
            f"    p95 per edge, ms: {row['p95_ms']}" + "".join(f"\n    {error}" for error in row["errors"])
        )
    save("many_edges", {"edges": edges, "rounds": rows, "cloud_mb": memory_mb})


if __name__ == "__main__":
    main()
