"""Survival: killed and silent clouds, edges that are killed while they send, and a stop with tasks in flight.

    python -m tests.benchmark.survival [KILLS [EDGE_KILLS [SILENCES]]]

A queue runs while its cloud is killed at random moments and started again; while the cloud is stopped, so that its
kernel still acknowledges and only the missing heartbeat shows it; and while the link loses everything (needs root, and
the tool that LINK_TOOL names). The result of a task in flight may come later than the edge alone would have had it, by
0.5 s after a kill and 5 s after a silence. A number of 0 leaves its part out.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.connection import SILENCE_S, Connection
from neurosurgeon.net.messages import Hello, Reply, Request
from neurosurgeon.net.session import EdgeSession, new_edge_id
from neurosurgeon.net.sockets import connect
from neurosurgeon.utils.errors import NetworkError
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S
from tests.benchmark.common import save
from tests.benchmark.links import CLOUD_IP, TOOL, change_link, emulated_link, on_cloud_side, why_not
from tests.benchmark.soak import resources
from tests.equality import are_equal, output_digest
from tests.faults import write_slow_edge
from tests.net.test_connection import frame_of
from tests.networks import Network, load_network, random_input, run_whole

MODEL = "alex_net"
KILLS, EDGE_KILLS, SILENCES = 100, 200, 10
CLOUD = ["tasks_cloud_api.py", "--models", MODEL, "--monitor-port", "0", "-p"]
LATE_AFTER_KILL_MS, LATE_AFTER_SILENCE_MS = 500.0, 5_000.0  # over the time of the edge alone
SILENT_S = SILENCE_S + 2.0
LINK = (100.0, 10.0)  # Mbit/s, RTT in ms
IDLE_S = 5.0
DYING_EDGE = """
import socket, sys, time
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(open(sys.argv[2], "rb").read())
print("sent", flush=True)
time.sleep(60)
"""


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


# ---------------------------------------------------------------- killed and silent clouds


class Queue:
    """An edge process with an endless queue, one task at a time, each sent to the cloud whole."""

    def __init__(self, host: str, port: int, prefix: Sequence[str] = ()) -> None:
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name)
        command = [*prefix, sys.executable, "tasks_edge_api.py", "-i", host, "-p", str(port), "--monitor-port", "1"]
        command += ["-t", MODEL, "--tasks", "1000000", "--in-flight", "1", "--bandwidth", "1000", "--rtt", "0.1"]
        command += ["--no-correction", "--edge-config", str(write_slow_edge(path / "slow.json")), "--json"]
        self._log = path / "edge.log"
        with self._log.open("w") as file:
            self._edge = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
        while "start inference tasks" not in self._log.read_text() and self._edge.poll() is None:
            time.sleep(0.05)

    def end(self) -> list[dict[str, Any]]:
        """Stop the queue a second from now; return its tasks."""
        time.sleep(1.0)
        self._edge.send_signal(signal.SIGINT)
        output, _ = self._edge.communicate()
        log = self._log.read_text()
        self._directory.cleanup()
        if not output:
            raise RuntimeError(log)
        tasks: list[dict[str, Any]] = json.loads(output)["tasks"]
        return tasks


def lose_clouds(times: int, number: signal.Signals) -> dict[str, Any]:
    """Send a signal to the cloud ``times`` times at random moments; return the outcome of the edge's tasks."""
    draw, port, start_ms = random.Random(0), free_port(), now_ms()
    queue: Queue | None = None
    for _ in tqdm(range(times), desc=number.name, unit="loss", disable=None):
        with ServiceProcess([*CLOUD, str(port)], services=2) as cloud:
            queue = queue or Queue("127.0.0.1", port)
            wait_for_use(cloud)
            time.sleep(draw.uniform(0.0, 1.0))
            cloud.process.send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(SILENT_S)
            cloud.process.kill()
    assert queue is not None
    late_ms = LATE_AFTER_SILENCE_MS if number == signal.SIGSTOP else LATE_AFTER_KILL_MS
    return {"times": times, **verdict_on(queue.end(), late_ms), "took_s": (now_ms() - start_ms) / MS_PER_S}


def lose_links(times: int) -> dict[str, Any]:
    """Let the link lose everything ``times`` times at random moments; return the outcome of the edge's tasks."""
    draw, port, start_ms = random.Random(0), free_port(), now_ms()
    with emulated_link(*LINK), on_cloud_side([*CLOUD, str(port)]) as cloud:
        queue = Queue(CLOUD_IP, port, [str(TOOL), "edge"])
        for _ in tqdm(range(times), desc="link lost", unit="loss", disable=None):
            wait_for_use(cloud)
            time.sleep(draw.uniform(0.0, 1.0))
            change_link(*LINK, loss_ppm=1_000_000)
            time.sleep(SILENT_S)
            change_link(*LINK)
        wait_for_use(cloud)
        tasks = queue.end()
    return {"times": times, **verdict_on(tasks, LATE_AFTER_SILENCE_MS), "took_s": (now_ms() - start_ms) / MS_PER_S}


def wait_for_use(cloud: ServiceProcess) -> None:
    """Wait until the cloud has computed for another 0.3 s: an edge uses it."""
    start_s = cpu_s(cloud.process.pid)
    while cpu_s(cloud.process.pid) < start_s + 0.3:
        time.sleep(0.01)


def verdict_on(tasks: list[dict[str, Any]], late_ms: float) -> dict[str, Any]:
    """Return how many tasks were answered, rightly, and how long those took that the cloud was lost with.

    Args: late_ms: a task is late if it takes longer than the edge alone by more than this.
    """
    network = load_network(MODEL)
    right = set()
    for threads in (1, 2):  # of the edge, and of the cloud
        use_threads(threads)
        right.add(output_digest(run_whole(network, random_input())))
    lost = [task for task in tasks if task["where"] == "edge" and task["partition_point"] == 0]
    alone = [task["elapsed_ms"] for task in tasks if task["partition_point"] == len(network.graph.layers)]
    local_ms = statistics.median(alone) if alone else 0.0
    elapsed_ms = [task["elapsed_ms"] for task in tasks if task["error"] is None]
    return {
        "tasks": len(tasks),
        "unanswered": sum(task["error"] is not None for task in tasks),
        "wrong": sum(task["output_digest"] not in right for task in tasks if task["error"] is None),
        "in_the_cloud": sum(task["where"] == "cloud" for task in tasks),
        "lost_with_the_cloud": len(lost),
        "local_ms": local_ms,
        "longest_beyond_local_ms": max((task["elapsed_ms"] - local_ms for task in lost), default=None),
        "longest_of_all_ms": max(elapsed_ms),
        "late": sum(time_ms > local_ms + late_ms for time_ms in elapsed_ms),
    }


# ---------------------------------------------------------------- edges die while they send


def cpu_s(pid: int) -> float:
    """Return the time that a process has computed, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def threads_of(pid: int) -> int:
    """Return how many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def kill_edges(kills: int) -> dict[str, Any]:
    """Kill edges in the middle of a tensor; return the resources of the cloud before and after."""
    request = frame_of(request_of(load_network(MODEL)), [random_input()])
    with (
        tempfile.NamedTemporaryFile() as file,
        ServiceProcess([*CLOUD, "0"], services=2) as cloud,
    ):
        file.write(frame_of(Hello.of(edge=new_edge_id()), []) + request[: len(request) // 2])
        file.flush()
        pid, freed_ms = cloud.process.pid, []
        before: dict[str, float] = {}
        for number in range(kills + 5):
            if number == 5:  # the first ones make caches
                before = resources(pid)
            idle = threads_of(pid)
            edge = subprocess.Popen(
                [sys.executable, "-c", DYING_EDGE, str(cloud.ports[0]), file.name], stdout=subprocess.PIPE, text=True
            )
            assert edge.stdout and edge.stdout.readline() == "sent\n"
            while threads_of(pid) < idle + 2:
                time.sleep(0.0005)
            start_ms = now_ms()
            edge.kill()
            while threads_of(pid) > idle:
                time.sleep(0.0005)
            freed_ms.append(now_ms() - start_ms)
            edge.wait()
            edge.stdout.close()
        start_s = cpu_s(pid)
        time.sleep(IDLE_S)
        percent = (cpu_s(pid) - start_s) / IDLE_S * 100
        after = resources(pid)
    return {
        "kills": kills,
        "slot_free_median_ms": statistics.median(freed_ms),
        "slot_free_longest_ms": max(freed_ms),
        "idle_cpu_percent": percent,
        "before": before,
        "after": after,
    }


# ---------------------------------------------------------------- a stop with tasks in flight


def request_of(network: Network) -> Request:
    """Return the message that asks the cloud for the whole network."""
    graph = network.graph
    return Request(network.ref.name, pack_nodes(graph, graph.edge_nodes(0)), graph.digest, network.ref.weights_digest)


def stop_with_tasks(edges: int = 2, tasks: int = 10) -> dict[str, Any]:
    """Ask a cloud to stop while it has tasks of several edges."""
    network = load_network(MODEL)
    right = run_whole(network, random_input())
    with ServiceProcess([*CLOUD, "0"], services=2) as cloud:
        connections = [connect("127.0.0.1", cloud.ports[0]) for _ in range(edges)]
        for connection in connections:
            session = EdgeSession(connection)
            session.ask_to_prepare(request_of(network).preparation)
            session.wait_until_ready(network.ref.weights_digest)
        for connection in connections:
            for task in range(1, tasks + 1):
                connection.send(request_of(network), [random_input()], task)
        for connection in connections:
            connection.wait_until_delivered(5.0)
        start_ms = now_ms()
        cloud.process.terminate()
        while accepts(cloud.ports[0]):
            time.sleep(0.002)
        closed_ms = now_ms() - start_ms
        answers = [answer for connection in connections for answer in answers_of(connection, tasks)]
        code = cloud.process.wait()
        stopped_ms = now_ms() - start_ms
        for connection in connections:
            connection.close()
    return {
        "answers": len(answers),
        "wrong": sum(not are_equal(answer, right, same_setup=False) for answer in answers),
        "accepts_no_more_after_ms": closed_ms,
        "exit_code": code,
        "stopped_after_s": stopped_ms / MS_PER_S,
    }


def answers_of(connection: Connection, count: int) -> list[Array]:
    """Return the outputs of so many tasks, or of fewer where the cloud ends before."""
    outputs: list[Array] = []
    with contextlib.suppress(NetworkError):
        while len(outputs) < count:
            received = connection.receive(20.0)
            outputs += [received.arrays[0].copy()] if isinstance(received.message, Reply) else []
    return outputs


def accepts(port: int) -> bool:
    """Return whether the port accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def main() -> None:
    given = [int(text) for text in sys.argv[1:]]
    kills, edge_kills, silences = (given + [KILLS, EDGE_KILLS, SILENCES][len(given) :])[:3]
    parts: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
        "cloud killed": (kills, lambda: lose_clouds(kills, signal.SIGKILL)),
        "cloud silent (stopped)": (silences, lambda: lose_clouds(silences, signal.SIGSTOP)),
        "link silent (everything lost)": (silences, lambda: lose_links(silences)),
        "edge killed while it sends": (edge_kills, lambda: kill_edges(edge_kills)),
        "SIGTERM with 20 tasks": (1, stop_with_tasks),
    }
    missing = why_not()
    if missing:
        print(f"without the link: {missing}")
        del parts["link silent (everything lost)"]
    results: dict[str, Any] = {}
    for name, (times, run) in parts.items():
        if not times:
            continue
        results[name] = run()
        print(f"{name}:", flush=True)
        for what, value in results[name].items():
            print(f"    {what:<28}{value:.1f}" if isinstance(value, float) else f"    {what:<28}{value}", flush=True)
    save("survival", results)


if __name__ == "__main__":
    main()
