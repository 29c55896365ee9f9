"""What a split task costs beyond its parts: total less both partitions and a raw transfer of the same bytes.

    python -m tests.benchmark.overhead

Measured in turn in every round: the task over a session to a cloud process on loopback (which reports the
time of its partition), and, right after another run of the edge partition so that caches are as cold, a raw socket that
sends as many bytes and gets an output's bytes back.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics

from neurosurgeon.cli.parser import DEFAULT_IP
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.edge.task import request_of
from neurosurgeon.engine.torch_engine import use_threads
from neurosurgeon.models.names import ZOO
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.utils.timing import now_ms
from tests.benchmark.common import save
from tests.benchmark.transport import receive_exactly
from tests.networks import cut, load_network, pixels

ROUNDS = 30
WARMUP = 3
ALLOWED_MS, ALLOWED_SHARE = 1.0, 0.03


def echo_size(listener: socket.socket, request_bytes: int, reply_bytes: int) -> None:
    """Read ``request_bytes`` and send ``reply_bytes``, until the peer disconnects."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(bytearray(request_bytes))
    while receive_exactly(sock, memory):
        sock.sendall(bytes(reply_bytes))


def measure_point(session: EdgeSession, model: str, point: int) -> dict[str, float]:
    """Return medians (ms) of the whole task and of its parts."""
    network = load_network(model)
    request = request_of(network.ref, network.graph.edge_nodes(point))
    session.ask_to_prepare(request.preparation)
    session.wait_until_ready(network.ref.weights_digest)
    request_bytes, reply_bytes = network.graph.boundary_bytes[point], network.graph.outputs_bytes
    listener = socket.create_server((DEFAULT_IP, 0))
    peer = multiprocessing.get_context("fork").Process(target=echo_size, args=(listener, request_bytes, reply_bytes))
    peer.start()
    raw = socket.create_connection(listener.getsockname())
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data, answer = bytes(request_bytes), memoryview(bytearray(reply_bytes))
    edge, image = cut(network, point).edge, pixels()
    rows = []
    for _ in range(WARMUP + ROUNDS):
        start_ms = now_ms()
        result = edge.run([image])
        assert result is not None
        remote = session.infer(request, result.arrays)
        total_ms = now_ms() - start_ms
        edge.run([image])
        start_ms = now_ms()
        raw.sendall(data)
        receive_exactly(raw, answer)
        raw_ms = now_ms() - start_ms
        rows.append((total_ms, result.compute_ms, remote.compute_ms, raw_ms))
    raw.close()
    peer.join()
    listener.close()
    kept = rows[WARMUP:]
    overhead_ms = statistics.median(total - edge - cloud - wire for total, edge, cloud, wire in kept)
    medians = [statistics.median(column) for column in zip(*kept, strict=True)]
    return dict(zip(("total", "edge", "cloud", "raw transfer"), medians, strict=True)) | {"overhead": overhead_ms}


def main() -> None:
    use_threads(1)
    results = {}
    print(f"overhead of a split task, ms\n{'model':<12}{'point':>6}", end="")
    print("".join(f"{name:>14}" for name in ("total", "edge", "cloud", "raw transfer", "overhead", "allowed")))
    with ServiceProcess(["cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as cloud:
        for model in ZOO:
            layers = len(load_network(model).graph.layers)
            with EdgeSession.open(DEFAULT_IP, cloud.ports[0]) as session:
                for point in (0, 1, layers // 2, layers - 1):
                    medians = measure_point(session, model, point)
                    medians["allowed"] = max(ALLOWED_MS, ALLOWED_SHARE * medians["total"])
                    results[f"{model} at {point}"] = medians
                    print(f"{model:<12}{point:>6}" + "".join(f"{v:>14.3f}" for v in medians.values()), flush=True)
    save("overhead", {"medians_ms": results})


if __name__ == "__main__":
    main()
