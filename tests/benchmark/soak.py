"""A long queue against one cloud: memory, threads, file descriptors and processes of both sides, at the start and end.

    python -m tests.benchmark.soak [MINUTES [FAULT_RATE [FLAG ...]]]

The edge is taken to be so slow that every task is sent; flags, such as --in-flight 1, are the edge's. With a rate, such
as 0.01, a proxy delays, cuts, resets, trickles, repeats or changes so many of the pieces that pass. An answer is right
if it has the bits of both partitions run here, with the threads of edge and cloud, or of the edge alone.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.predictor.predictor_utils import SIDES
from neurosurgeon.predictor.store import dataset_threads
from tests.benchmark.common import save
from tests.benchmark.many_edges import resident_mb
from tests.equality import output_digest
from tests.faults import Fault, write_slow_edge
from tests.networks import cut, load_network, model_graph, pixels, run

DEFAULT_MINUTES = 15.0
SETTLED_S = 45.0  # networks are loaded, every cut has run
SAMPLE_S = 5.0


def resources(pid: int) -> dict[str, float]:
    """Return the resources of a process."""
    proc = Path(f"/proc/{pid}")
    children = (proc / "task" / str(pid) / "children").read_text().split()
    return {
        "memory_mb": resident_mb(pid),
        "threads": len(os.listdir(proc / "task")),
        "descriptors": len(os.listdir(proc / "fd")),
        "children": len(children),
    }


@contextmanager
def cloud_and_port(fault_rate: float, key: Path) -> Iterator[tuple[ServiceProcess, int]]:
    """Yield a cloud, and the port by which edges reach it: with faults, that of a proxy. Both sides hold a key.

    Without a key, neither side can detect that bytes were changed on the way.
    """
    key.write_text(secrets.token_hex(32))
    key.chmod(0o600)
    command = ["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0", "--key-file", str(key)]
    with ServiceProcess(command, services=2) as cloud:
        if not fault_rate:
            yield cloud, cloud.ports[0]
            return
        faults = ["--rate", str(fault_rate), "--faults", *(fault for fault in Fault if fault is not Fault.BLACKHOLE)]
        with ServiceProcess(["-m", "tests.faults", "-p", "0", "--to", str(cloud.ports[0]), *faults]) as proxy:
            yield cloud, proxy.ports[0]
        print(proxy.log[-1])


@cache
def right_digests(model: str, point: int) -> set[str]:
    """Return those of a model's answer at a partition point, computed on both sides, and on the edge alone."""
    edge, cloud = cut(load_network(model), point)
    found: set[str] = set()
    edge_threads, cloud_threads = (dataset_threads(side, "cpu") for side in SIDES)
    for threads in (cloud_threads, edge_threads):
        use_threads(edge_threads)
        boundary = run(edge, [pixels()]).arrays
        use_threads(threads)
        is_whole = point == len(model_graph(model).layers)
        found.add(output_digest(boundary[0] if is_whole else run(cloud, boundary).arrays[0]))
    return found


def is_wrong(task: dict[str, Any]) -> bool:
    """Return whether a task has a wrong output."""
    return task["error"] is None and task["output_digest"] not in right_digests(task["model"], task["partition_point"])


def main() -> None:
    numbers, flags = sys.argv[1:3], sys.argv[3:]
    minutes, fault_rate = (float(text) for text in (numbers + [str(DEFAULT_MINUTES), "0"][len(numbers) :]))
    samples: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        key = Path(directory) / "key"
        cloud, port = stack.enter_context(cloud_and_port(fault_rate, key))
        command = [sys.executable, "tasks_edge_api.py", "-p", str(port), "--monitor-port", str(cloud.ports[1])]
        command += ["--tasks", "200000", "--seed", "1", "--json", "--key-file", str(key)]
        slow = write_slow_edge(Path(directory) / "slow.json")
        command += ["--no-correction", "--edge-config", str(slow), "--bandwidth", "1000", "--rtt", "0.1", *flags]
        edge = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        time.sleep(SETTLED_S)
        for _ in tqdm(range(int(minutes * 60 / SAMPLE_S)), unit="sample", disable=None):
            samples.append({"edge": resources(edge.pid), "cloud": resources(cloud.process.pid)})
            time.sleep(SAMPLE_S)
        edge.send_signal(signal.SIGINT)
        output, _ = edge.communicate()
    document = json.loads(output)
    tasks, summary = document["tasks"], document["summary"]["all"]
    errors = {task["error"] for task in tasks} - {None}
    wrong = sum(map(is_wrong, tasks))
    print(f"{len(tasks)} tasks, {summary['failed']} failed, {wrong} wrong, in {minutes:g} minutes; {summary['where']}")
    print(*errors, sep="\n    ")
    print(f"{'side':<8}{'resource':<14}{'first minute':>14}{'last minute':>14}")
    count = int(60 / SAMPLE_S)
    for side in ("edge", "cloud"):
        for what in samples[0][side]:
            first, last = (max(s[side][what] for s in part) for part in (samples[:count], samples[-count:]))
            print(f"{side:<8}{what:<14}{first:>14.0f}{last:>14.0f}")
    result = {"minutes": minutes, "fault_rate": fault_rate, "wrong": wrong, "summary": summary}
    save("soak", {**result, "errors": sorted(errors), "samples": samples})


if __name__ == "__main__":
    main()
