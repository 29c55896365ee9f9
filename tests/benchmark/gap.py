"""From task to task on loopback: the time that a queue adds to both partitions and a raw transfer of the same bytes.

    python -m tests.benchmark.gap [--cloud-threads N]

Queues of one network that stays on the edge, or goes to the cloud whole, three rounds in turn; medians. The period is
the time from one start to the next; of many in flight, which come in bursts, all is given as means. The raw transfer is
the time of a plain socket that sends the same bytes to a server that only reads, runs the same partition and sends its
output, beyond that partition: right after a network nothing is in the caches. One after the other, the gap is what the
period has beyond the sum of the parts; in flight, beyond the longest of them.

On two cores, a cloud with two threads computes on the core that the edge needs to plan, send and read, and an OpenMP
thread spins there. With --cloud-threads 1 each side has a core of its own, as on two machines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import socket
import statistics
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import trange

from neurosurgeon.cli.parser import DEFAULT_IP
from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.predictor.store import dataset_threads
from neurosurgeon.utils.timing import now_ms
from tests.benchmark.common import save
from tests.benchmark.transport import receive_exactly
from tests.faults import write_slow_edge
from tests.networks import cut, load_network, model_graph, pixels

TASKS = 200
WARMUP = 50
ROUNDS = 3
TOOK_MS = struct.Struct("=d")
FIGURES = ("period", "edge", "cloud", "raw", "gap")
CLOUD = ["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"]
FLAGS = ["--no-correction", "--rtt", "0.1", "--tasks", str(TASKS), "--json"]
PLACES = {"edge": ["--bandwidth", "0.0001"], "cloud": ["--bandwidth", "1000"]}
IN_FLIGHT = {"one": ["--in-flight", "1"], "many": []}
CASES = [*itertools.product(("le_net", "mobile_net"), PLACES, IN_FLIGHT)]


def compute_bare(listener: socket.socket, model: str, threads: int) -> None:
    """Read a network's input, reply with its compute time (ms) and its output, until the peer leaves."""
    use_threads(threads)
    network = load_network(model)
    image = pixels(network.graph.inputs[0].shape)
    memory = image.transpose(0, 2, 3, 1).reshape(-1).data  # channels-last: a view, no copy
    partition = cut(network, 0).cloud
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while receive_exactly(sock, memory):
        result = partition.run([image])
        assert result is not None
        sock.sendall(TOOK_MS.pack(result.compute_ms) + result.arrays[0].tobytes())


def raw_transfer_ms(model: str, threads: int) -> float:
    """Return the median time of an exchange with `compute_bare`, less its compute time, ms."""
    graph = model_graph(model)
    listener = socket.create_server((DEFAULT_IP, 0))
    peer = multiprocessing.get_context("spawn").Process(target=compute_bare, args=(listener, model, threads))
    peer.start()
    data, answer = bytes(graph.boundary_bytes[0]), memoryview(bytearray(TOOK_MS.size + graph.outputs_bytes))
    found_ms: list[float] = []
    with socket.create_connection(listener.getsockname()) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(TASKS):
            start_ms = now_ms()
            raw.sendall(data)
            receive_exactly(raw, answer)
            found_ms.append(now_ms() - start_ms - TOOK_MS.unpack_from(answer)[0])
    peer.join()
    listener.close()
    return statistics.median(found_ms[WARMUP:])


def run_queue(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Return the tasks of a queue after the warm-up, as in the JSON of the edge."""
    command = [sys.executable, "tasks_edge_api.py", *FLAGS, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tasks: list[dict[str, Any]] = json.loads(done.stdout)["tasks"]
    return tasks[WARMUP:]


def gap(tasks: Sequence[dict[str, Any]], raw_ms: float, *, is_alone: bool) -> dict[str, float]:
    """Return the period (ms) of a queue, its parts, and the rest: medians, or means of many in flight.

    A mean of periods less a median of the longest part would take the machine's slow moments for a gap.
    """
    starts = [task["spans_ms"]["edge"][0] for task in tasks]
    middle = statistics.median if is_alone else statistics.mean
    period_ms: float = middle(after - before for before, after in itertools.pairwise(starts))
    edge_ms = middle(task["measured"]["edge_ms"] for task in tasks)
    clouds = [task["spans_ms"].get("cloud", [0.0, 0.0]) for task in tasks]
    cloud_ms = middle(end - start for start, end in clouds)
    parts_ms = (edge_ms, cloud_ms, raw_ms)
    gap_ms = period_ms - (sum(parts_ms) if is_alone else max(parts_ms))
    return dict(zip(FIGURES, (period_ms, *parts_ms, gap_ms), strict=True))


def measure(model: str, place: str, in_flight: str, address: Sequence[str], threads: int) -> dict[str, float]:
    """Return the figures of one queue."""
    graph = model_graph(model)
    tasks = run_queue([*address, *PLACES[place], *IN_FLIGHT[in_flight], "-t", model])
    sent = {task["partition_point"] != len(graph.layers) for task in tasks}
    if sent != {place == "cloud"}:
        raise SystemExit(f"{model}: not all tasks were computed on the {place}")
    raw_ms = raw_transfer_ms(model, threads) if place == "cloud" else 0.0
    return gap(tasks, raw_ms, is_alone=in_flight == "one")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cloud-threads", type=int, default=dataset_threads("cloud", "cpu"))
    threads = parser.parse_args().cloud_threads
    command = [*CLOUD, "--threads", str(threads)]
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {case: [] for case in CASES}
    with TemporaryDirectory() as folder, ServiceProcess(command, services=2) as cloud:
        slow = ["--edge-config", str(write_slow_edge(Path(folder) / "slow.json"))]
        address = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1])]
        for _ in trange(ROUNDS, disable=None):
            for case in CASES:
                flags = [*address, *(slow if case[1] == "cloud" else [])]
                found[case].append(measure(*case, flags, threads))
    print(f"{'':<12}{'on the':<8}{'in flight':<10}" + "".join(f"{name:>9}" for name in FIGURES) + "  ms, gap of rounds")
    results = {}
    for (model, place, in_flight), rounds in found.items():
        medians = {name: statistics.median(one[name] for one in rounds) for name in FIGURES}
        gaps = ", ".join(f"{one['gap']:.2f}" for one in rounds)
        print(f"{model:<12}{place:<8}{in_flight:<10}" + "".join(f"{medians[name]:>9.3f}" for name in FIGURES), gaps)
        results[f"{model} on the {place}, {in_flight} in flight"] = {**medians, "gaps": [one["gap"] for one in rounds]}
    save("gap", {"cloud_threads": threads, "medians_ms": results})


if __name__ == "__main__":
    main()
