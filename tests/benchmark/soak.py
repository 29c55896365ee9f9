"""A long queue against one cloud: memory, threads, file descriptors and processes of both sides, at the start and end.

python -m tests.benchmark.soak [MINUTES]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from tests.benchmark.common import save
from tests.benchmark.many_edges import resident_mb
from utils.cli import ROOT, ServiceProcess

DEFAULT_MINUTES = 15.0
SETTLED_S = 45.0  # networks are loaded, every cut has run
SAMPLE_S = 5.0


def resources(pid: int) -> dict[str, float]:
    """Return what a process holds."""
    proc = Path(f"/proc/{pid}")
    children = (proc / "task" / str(pid) / "children").read_text().split()
    return {
        "memory_mb": resident_mb(pid),
        "threads": len(os.listdir(proc / "task")),
        "descriptors": len(os.listdir(proc / "fd")),
        "children": len(children),
    }


def main() -> None:
    minutes = float(sys.argv[1]) if sys.argv[1:] else DEFAULT_MINUTES
    samples: list[dict[str, dict[str, float]]] = []
    with ServiceProcess(["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        command = [
            sys.executable,
            "tasks_edge_api.py",
            "-p",
            str(cloud.ports[0]),
            "--monitor-port",
            str(cloud.ports[1]),
        ]
        edge = subprocess.Popen(
            [*command, "--tasks", "200000", "--seed", "1", "--json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        time.sleep(SETTLED_S)
        for _ in tqdm(range(int(minutes * 60 / SAMPLE_S)), unit="sample", disable=None):
            samples.append({"edge": resources(edge.pid), "cloud": resources(cloud.process.pid)})
            time.sleep(SAMPLE_S)
        edge.send_signal(signal.SIGINT)
        output, _ = edge.communicate()
    document = json.loads(output)
    summary, errors = document["summary"]["all"], {task["error"] for task in document["tasks"]} - {None}
    print(f"{summary['tasks']} tasks, {summary['failed']} failed, in {minutes:g} minutes", *errors, sep="\n    ")
    print(f"{'side':<8}{'what':<14}{'first minute':>14}{'last minute':>14}")
    count = int(60 / SAMPLE_S)
    for side in ("edge", "cloud"):
        for what in samples[0][side]:
            first, last = (max(s[side][what] for s in part) for part in (samples[:count], samples[-count:]))
            print(f"{side:<8}{what:<14}{first:>14.0f}{last:>14.0f}")
    save("soak", {"minutes": minutes, "summary": summary, "errors": sorted(errors), "samples": samples})


if __name__ == "__main__":
    main()
