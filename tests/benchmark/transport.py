"""Send a tensor, rebuild it, send an output back: this project, multiprocessing and pyzmq against a raw socket.

    python -m tests.benchmark.transport [--huge]

"ours" is a session of an edge that sends a request and reads a reply; the other side parses the request and makes the
reply. All contenders send the same bytes of a tensor, and those of an output of 1000 classes back. The raw socket
receives into preallocated buffers and knows all sizes beforehand: the fastest way in Python. Shares are raw /
contender, of medians of rounds in turn in one run: 1 is as fast as raw. A turn is five exchanges in a row, as of a
repeated task. CPU: the cost of an exchange in each of the two processes, the mean over all turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import random
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import numpy as np

from neurosurgeon.cli.parser import DEFAULT_IP
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.messages import Hello, Reply, Request
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.utils.errors import NetworkError
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import s_to_ms
from tests.benchmark.common import save

ROUNDS = {16_384: 200, 150_528: 200, 602_112: 200, 12_845_056: 20}  # by size in bytes
HUGE_ROUNDS = {100_000_000: 5}
WARMUP = 2  # rounds that do not count
CALLS_A_TURN = 5
CLASSES = 1000
OUTPUT_BYTES = 4 * CLASSES
REQUEST = Request("alex_net", b"\1\0\0", "0" * 32, "0" * 32)
WAIT_S = 60.0


def process_cpu_s(pid: int) -> float:
    """Return the CPU time of all threads of a process so far, s (Linux: the clock that clock_getcpuclockid names)."""
    return time.clock_gettime((~pid << 3) | 2)


# ---------------------------------------------------------------- the side of the cloud


def _listen() -> socket.socket:
    return socket.create_server((DEFAULT_IP, 0))


def _accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def receive_exactly(sock: socket.socket, view: memoryview) -> bool:
    """Fill ``view``; return whether the peer sent enough bytes before it closed."""
    while view:
        count = sock.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def serve_raw(listener: socket.socket, size_bytes: int) -> None:
    memory, output = bytearray(size_bytes), bytes(OUTPUT_BYTES)
    with _accept(listener) as sock:
        while receive_exactly(sock, memoryview(memory)):
            np.frombuffer(memory, np.float32)
            sock.sendall(output)


def serve_ours(listener: socket.socket, size_bytes: int) -> None:
    output = np.zeros((1, CLASSES), np.float32)
    with Connection(_accept(listener)) as connection, suppress(NetworkError):
        connection.receive(WAIT_S)
        connection.send(Hello.of(device="cpu", threads=1))
        while True:
            received = connection.receive(WAIT_S)
            connection.send(Reply(0.0, 0.0, 0.0, received.receive_ms), [output], received.task)


def serve_multiprocessing(listener: socket.socket, size_bytes: int) -> None:
    output = bytes(OUTPUT_BYTES)
    with multiprocessing.connection.Connection(_accept(listener).detach()) as connection, suppress(EOFError):
        while True:
            np.frombuffer(bytearray(connection.recv_bytes()), np.float32)
            connection.send_bytes(output)


def serve_zmq(listener: socket.socket, size_bytes: int) -> None:
    import zmq

    socket_ = zmq.Context().socket(zmq.REP)
    port = listener.getsockname()[1]
    socket_.setsockopt(zmq.USE_FD, listener.detach())
    socket_.bind(f"tcp://{DEFAULT_IP}:{port}")
    output = bytes(OUTPUT_BYTES)
    while True:
        np.frombuffer(socket_.recv(copy=False).buffer, np.float32)
        socket_.send(output)


# ---------------------------------------------------------------- the side of the edge


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection((DEFAULT_IP, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def raw_client(port: int, array: Array, stack: ExitStack) -> Callable[[], object]:
    sock, output = stack.enter_context(_connect(port)), np.empty((1, CLASSES), np.float32)
    data, view = array.data.cast("B"), output.data.cast("B")

    def once() -> None:
        sock.sendall(data)
        receive_exactly(sock, view)

    return once


def our_client(port: int, array: Array, stack: ExitStack) -> Callable[[], object]:
    session = stack.enter_context(EdgeSession.open(DEFAULT_IP, port))

    def once() -> None:
        (output,) = session.infer(REQUEST, [array]).arrays
        assert output.shape == (1, CLASSES)

    return once


def multiprocessing_client(port: int, array: Array, stack: ExitStack) -> Callable[[], object]:
    connection = stack.enter_context(multiprocessing.connection.Connection(_connect(port).detach()))

    def once() -> None:
        connection.send_bytes(array.data.cast("B"))
        np.frombuffer(bytearray(connection.recv_bytes()), np.float32)

    return once


def zmq_client(port: int, array: Array, stack: ExitStack) -> Callable[[], object]:
    import zmq

    socket_ = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.REQ))
    socket_.setsockopt(zmq.LINGER, 0)
    socket_.connect(f"tcp://{DEFAULT_IP}:{port}")

    def once() -> None:
        socket_.send(array.data, copy=False)
        np.frombuffer(socket_.recv(copy=False).buffer, np.float32)

    return once


Serve = Callable[[socket.socket, int], None]
Client = Callable[[int, Array, ExitStack], Callable[[], object]]
RAW = "raw socket"
CONTENDERS: Mapping[str, tuple[Serve, Client]] = {
    RAW: (serve_raw, raw_client),
    "ours": (serve_ours, our_client),
    "multiprocessing": (serve_multiprocessing, multiprocessing_client),
    "pyzmq": (serve_zmq, zmq_client),
}


# ---------------------------------------------------------------- both


@dataclass(slots=True)
class Exchange:
    """One contender: its call, the process at the other end, and the times of its exchanges."""

    call: Callable[[], object]
    pid: int
    wall_ms: list[float] = field(default_factory=list)
    edge_cpu_s: float = 0.0
    cloud_cpu_s: float = 0.0

    def take_turn(self, *, counts: bool) -> None:
        """Make the exchanges of a turn."""
        edge_s, cloud_s = time.process_time(), process_cpu_s(self.pid)
        times_ms = []
        for _ in range(CALLS_A_TURN):
            start_ms = now_ms()
            self.call()
            times_ms.append(now_ms() - start_ms)
        if counts:
            self.wall_ms += times_ms
            self.edge_cpu_s += time.process_time() - edge_s
            self.cloud_cpu_s += process_cpu_s(self.pid) - cloud_s

    def figures(self) -> dict[str, float]:
        """Return the median of an exchange, and the CPU time that it cost each side, ms."""
        return {
            "median": statistics.median(self.wall_ms),
            "edge_cpu": s_to_ms(self.edge_cpu_s) / len(self.wall_ms),
            "cloud_cpu": s_to_ms(self.cloud_cpu_s) / len(self.wall_ms),
        }


def measure_size(size_bytes: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures of every contender, of rounds in turn."""
    context = multiprocessing.get_context("fork")
    array = np.random.default_rng(0).random(size_bytes // 4, dtype=np.float32)
    exchanges: dict[str, Exchange] = {}
    with ExitStack() as stack:
        for name, (serve, client) in CONTENDERS.items():
            listener = _listen()
            process = context.Process(target=serve, args=(listener, size_bytes), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            port = listener.getsockname()[1]
            listener.close()  # the child has it
            assert process.pid is not None
            exchanges[name] = Exchange(client(port, array, stack), process.pid)
        for number in range(WARMUP + rounds):
            for name in random.sample(list(exchanges), len(exchanges)):
                exchanges[name].take_turn(counts=number >= WARMUP)
    return {name: exchange.figures() for name, exchange in exchanges.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.transport")
    parser.add_argument("--huge", action="store_true", help="100 MB, too (default: off)")
    rounds = ROUNDS | (HUGE_ROUNDS if parser.parse_args().huge else {})
    results = {}
    print("transport: of a raw preallocated socket (1 = as fast); CPU of edge + cloud, ms an exchange")
    shown = [name for name in CONTENDERS if name != RAW]
    heads = [*(f"{name:>17}" for name in shown), f"{'CPU:':>7}", *(f"{name:>18}" for name in CONTENDERS)]
    print(f"{'bytes':>11}{'raw, ms':>10}" + "".join(heads))
    for size_bytes, count in rounds.items():
        results[size_bytes] = found = measure_size(size_bytes, count)
        raw_ms = found[RAW]["median"]
        shares = "".join(f"{raw_ms / found[name]['median']:>17.2f}" for name in shown)
        cpu = "".join(f"{one['edge_cpu']:>9.3f} +{one['cloud_cpu']:>7.3f}" for one in found.values())
        print(f"{size_bytes:>11}{raw_ms:>10.3f}{shares}{'':>7}{cpu}", flush=True)
    save("transport", {"ms": results})


if __name__ == "__main__":
    main()
