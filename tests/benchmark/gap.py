"""From task to task on loopback: what a queue adds to edge half, cloud half and a raw transfer of the same bytes.

    python -m tests.benchmark.gap

Queues of one network that stays on the edge, or goes to the cloud whole, three rounds in turn; medians. The period is
the time from one start to the next: the median of one task after the other, the mean of many in flight, which come in
bursts. The raw transfer is that of a socket that sends what crosses and gets an output's bytes back. One after the
other, the gap is what the period has beyond the sum of the parts; in flight, beyond the longest of them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import trange

from models.zoo import model_graph
from tests.benchmark.common import interleaved_medians, save
from tests.benchmark.overhead import echo_size
from tests.benchmark.transport import receive_exactly
from tests.faults import write_slow_edge
from utils.cli import DEFAULT_IP, ROOT, ServiceProcess

TASKS = 200
WARMUP = 50
ROUNDS = 3
FIGURES = ("period", "edge", "cloud", "raw", "gap")
CLOUD = ["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"]
FLAGS = ["--no-correction", "--rtt", "0.1", "--tasks", str(TASKS), "--json"]
PLACES = {"edge": ["--bandwidth", "0.0001"], "cloud": ["--bandwidth", "1000"]}
IN_FLIGHT = {"one": ["--in-flight", "1"], "many": []}
CASES = [*itertools.product(("le_net", "mobile_net"), PLACES, IN_FLIGHT)]


def raw_transfer_ms(request_bytes: int, reply_bytes: int) -> float:
    """Return the median time of a raw exchange over loopback."""
    listener = socket.create_server((DEFAULT_IP, 0))
    peer = multiprocessing.get_context("fork").Process(target=echo_size, args=(listener, request_bytes, reply_bytes))
    peer.start()
    with socket.create_connection(listener.getsockname()) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data, answer = bytes(request_bytes), memoryview(bytearray(reply_bytes))

        def exchange() -> None:
            raw.sendall(data)
            receive_exactly(raw, answer)

        median_ms = interleaved_medians({"raw": exchange}, 200)["raw"]
    peer.join()
    listener.close()
    return median_ms


def run_queue(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Return the tasks of a queue once all is warm, as the edge tells them."""
    command = [sys.executable, "tasks_edge_api.py", *FLAGS, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["tasks"][WARMUP:]


def gap(tasks: Sequence[dict[str, Any]], raw_ms: float, *, is_alone: bool) -> dict[str, float]:
    """Return medians (ms) of the period of a queue, of what it is made of, and of the rest."""
    starts = [task["spans_ms"]["edge"][0] for task in tasks]
    middle = statistics.median if is_alone else statistics.mean
    period_ms = middle(after - before for before, after in itertools.pairwise(starts))
    edge_ms = statistics.median(task["measured"]["edge_ms"] for task in tasks)
    clouds = [task["spans_ms"].get("cloud", [0.0, 0.0]) for task in tasks]
    cloud_ms = statistics.median(end - start for start, end in clouds)
    parts_ms = (edge_ms, cloud_ms, raw_ms)
    gap_ms = period_ms - (sum(parts_ms) if is_alone else max(parts_ms))
    return dict(zip(FIGURES, (period_ms, *parts_ms, gap_ms), strict=True))


def measure(model: str, place: str, in_flight: str, address: Sequence[str]) -> dict[str, float]:
    """Return the figures of one queue."""
    graph = model_graph(model)
    tasks = run_queue([*address, *PLACES[place], *IN_FLIGHT[in_flight], "-t", model])
    sent = {task["partition_point"] != len(graph.layers) for task in tasks}
    if sent != {place == "cloud"}:
        raise SystemExit(f"{model}: not all tasks were computed on the {place}")
    raw_ms = raw_transfer_ms(graph.crossing_bytes[0], graph.output.size_bytes) if place == "cloud" else 0.0
    return gap(tasks, raw_ms, is_alone=in_flight == "one")


def main() -> None:
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in CASES}
    with TemporaryDirectory() as folder, ServiceProcess(CLOUD, services=2) as cloud:
        slow = ["--edge-config", str(write_slow_edge(Path(folder) / "slow.json"))]
        address = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1])]
        for _ in trange(ROUNDS, disable=None):
            for case in CASES:
                found[case].append(measure(*case, [*address, *(slow if case[1] == "cloud" else [])]))
    print(f"{'':<12}{'on the':<8}{'in flight':<10}" + "".join(f"{name:>9}" for name in FIGURES) + "  ms, gap of rounds")
    results = {}
    for (model, place, in_flight), rounds in found.items():
        medians = {name: statistics.median(one[name] for one in rounds) for name in FIGURES}
        gaps = ", ".join(f"{one['gap']:.2f}" for one in rounds)
        print(f"{model:<12}{place:<8}{in_flight:<10}" + "".join(f"{medians[name]:>9.3f}" for name in FIGURES), gaps)
        results[f"{model} on the {place}, {in_flight} in flight"] = {**medians, "gaps": [one["gap"] for one in rounds]}
    save("gap", {"medians_ms": results})


if __name__ == "__main__":
    main()
