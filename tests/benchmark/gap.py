"""From task to task on loopback: what a queue adds to edge half, cloud half and a raw transfer of the same bytes.

    python -m tests.benchmark.gap

A queue of one network; the period is the time from one start to the next: the median of one task after the other, the
mean of many in flight, which come in bursts. The raw transfer is that of a socket that sends what crosses and gets an
output's bytes back. One after the other, the gap is what the period has beyond the sum of the parts; in flight, beyond
the longest of them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys

from models.zoo import model_graph
from tests.benchmark.common import interleaved_medians, save
from tests.benchmark.overhead import echo_size
from tests.benchmark.transport import receive_exactly
from utils.cli import DEFAULT_IP, ROOT, ServiceProcess

TASKS = 200
WARMUP = 50
FLAGS = ["--no-correction", "--bandwidth", "1000", "--rtt", "0.1"]
IN_FLIGHT = {"one": ["--in-flight", "1"], "many": []}


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


def measure(model: str, ports: list[int], in_flight: str) -> dict[str, float]:
    """Return medians (ms) of the period of a queue and of what it is made of."""
    command = [sys.executable, "tasks_edge_api.py", "-p", str(ports[0]), "--monitor-port", str(ports[1]), *FLAGS]
    command += ["--tasks", str(TASKS), "-t", model, "--json", *IN_FLIGHT[in_flight]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tasks = json.loads(done.stdout)["tasks"][WARMUP:]
    starts = [task["spans_ms"]["edge"][0] for task in tasks]
    middle = statistics.median if in_flight == "one" else statistics.mean
    period_ms = middle(after - before for before, after in itertools.pairwise(starts))
    edge_ms = statistics.median(task["measured"]["edge_ms"] for task in tasks)
    clouds = [task["spans_ms"].get("cloud", [0.0, 0.0]) for task in tasks]
    cloud_ms = statistics.median(end - start for start, end in clouds)
    graph, point = model_graph(model), tasks[-1]["partition_point"]
    crossing = graph.crossing_bytes[point]
    raw_ms = raw_transfer_ms(crossing, graph.output.size_bytes) if crossing else 0.0
    parts_ms = (edge_ms, cloud_ms, raw_ms)
    gap_ms = period_ms - (sum(parts_ms) if in_flight == "one" else max(parts_ms))
    return {"point": point, "period": period_ms, "edge": edge_ms, "cloud": cloud_ms, "raw": raw_ms, "gap": gap_ms}


def main() -> None:
    results = {}
    print(
        f"{'':<12}{'in flight':<10}"
        + "".join(f"{name:>10}" for name in ("point", "period", "edge", "cloud", "raw", "gap"))
        + "  ms"
    )
    with ServiceProcess(["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        for model, in_flight in itertools.product(("le_net", "mobile_net"), IN_FLIGHT):
            figures = results[f"{model}, {in_flight} in flight"] = measure(model, cloud.ports, in_flight)
            print(f"{model:<12}{in_flight:<10}" + "".join(f"{value:>10.3f}" for value in figures.values()), flush=True)
    save("gap", {"medians_ms": results})


if __name__ == "__main__":
    main()
