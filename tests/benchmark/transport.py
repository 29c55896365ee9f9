"""Send a tensor, rebuild it, acknowledge with 8 bytes: ours against a raw socket, multiprocessing and pyzmq.

    python -m tests.benchmark.transport

The raw socket receives into one preallocated buffer and knows the size beforehand: the fastest that Python can do.
The acknowledgement is the same 8 raw bytes for all who let it be. Ratios are medians of interleaved rounds in one
run, raw / contender: 1 is as fast as raw. A turn is five exchanges in a row, as a repeated task makes them.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import socket
from collections.abc import Callable
from typing import Any

import torch

from net.messages import Request
from net.transport import Connection
from tests.benchmark.common import interleaved_medians, save

SIZES_BYTES = (150_528, 602_112, 3_211_264, 12_845_056, 100_000_000)
ROUNDS = {150_528: 200, 602_112: 200, 3_211_264: 60, 12_845_056: 20, 100_000_000: 5}
CALLS_A_TURN = 5
ACK = b"received"
WAIT_S = 60.0


def _listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def _accept(listener: socket.socket) -> socket.socket:
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def receive_exactly(sock: socket.socket, view: memoryview) -> bool:
    while view:
        count = sock.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def serve_raw(listener: socket.socket, size_bytes: int) -> None:
    sock = _accept(listener)
    memory = torch.empty(size_bytes, dtype=torch.uint8)
    while receive_exactly(sock, memoryview(memory.numpy())):
        memory.view(torch.float32)
        sock.sendall(ACK)


def serve_ours(listener: socket.socket, size_bytes: int) -> None:
    with Connection(_accept(listener)) as connection:
        try:
            while True:
                received = connection.receive(WAIT_S)
                connection.sock.sendall(ACK)
                connection.recycle(received)
                connection.make_ready()
        except Exception:
            return


def serve_multiprocessing(listener: socket.socket, size_bytes: int) -> None:
    connection = multiprocessing.connection.Connection(_accept(listener).detach())
    try:
        while True:
            torch.frombuffer(bytearray(connection.recv_bytes()), dtype=torch.float32)
            connection.send_bytes(ACK)
    except EOFError:
        return


def serve_zmq(ports: Any, size_bytes: int) -> None:
    import zmq

    socket_ = zmq.Context().socket(zmq.REP)
    ports.send(socket_.bind_to_random_port("tcp://127.0.0.1"))
    while True:
        message = socket_.recv(copy=False)
        if len(message.buffer) < len(ACK) + 1:
            return
        torch.frombuffer(message.buffer, dtype=torch.float32)
        socket_.send(ACK)


def _connect(listener: socket.socket) -> socket.socket:
    sock = socket.create_connection(listener.getsockname())
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def raw_client(listener: socket.socket, tensor: torch.Tensor) -> Callable[[], object]:
    sock, data, ack = _connect(listener), memoryview(tensor.view(torch.uint8).numpy()), memoryview(bytearray(len(ACK)))

    def once() -> None:
        sock.sendall(data)
        receive_exactly(sock, ack)

    return once


def our_client(listener: socket.socket, tensor: torch.Tensor) -> Callable[[], object]:
    connection = Connection(_connect(listener))
    ack, tasks = memoryview(bytearray(len(ACK))), itertools.count(1)

    def once() -> None:
        connection.send(Request("alex_net", b"\1\0\0", "0" * 32, "0" * 32), [tensor], next(tasks))
        receive_exactly(connection.sock, ack)

    return once


def multiprocessing_client(listener: socket.socket, tensor: torch.Tensor) -> Callable[[], object]:
    connection = multiprocessing.connection.Connection(_connect(listener).detach())

    def once() -> None:
        connection.send_bytes(tensor.view(torch.uint8).numpy())
        connection.recv_bytes()

    return once


def zmq_client(port: int, tensor: torch.Tensor) -> Callable[[], object]:
    import zmq

    socket_ = zmq.Context.instance().socket(zmq.REQ)
    socket_.setsockopt(zmq.LINGER, 0)
    socket_.connect(f"tcp://127.0.0.1:{port}")

    def once() -> None:
        socket_.send(tensor.view(torch.uint8).numpy(), copy=False)
        socket_.recv()

    return once


TCP_CONTENDERS = {
    "raw socket": (serve_raw, raw_client),
    "ours": (serve_ours, our_client),
    "multiprocessing": (serve_multiprocessing, multiprocessing_client),
}


def measure_size(size_bytes: int) -> dict[str, float]:
    """Return the median time (ms) of one exchange for every contender."""
    context = multiprocessing.get_context("fork")
    tensor = torch.rand(size_bytes // 4)
    clients: dict[str, Callable[[], object]] = {}
    processes = []
    for name, (serve, client) in TCP_CONTENDERS.items():
        listener = _listen()
        processes.append(context.Process(target=serve, args=(listener, size_bytes), daemon=True))
        processes[-1].start()
        clients[name] = client(listener, tensor)
    ours, theirs = context.Pipe()
    processes.append(context.Process(target=serve_zmq, args=(theirs, size_bytes), daemon=True))
    processes[-1].start()
    clients["pyzmq"] = zmq_client(ours.recv(), tensor)
    try:
        return interleaved_medians(clients, ROUNDS[size_bytes], calls=CALLS_A_TURN)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    names = [*TCP_CONTENDERS, "pyzmq"]
    print("transport: raw / contender (1 = as fast as a raw preallocated socket)")
    print(f"{'size':>12}{'raw, ms':>10}" + "".join(f"{name:>17}" for name in names[1:]))
    for size_bytes in SIZES_BYTES:
        medians = measure_size(size_bytes)
        results[str(size_bytes)] = medians
        ratios = "".join(f"{medians['raw socket'] / medians[name]:>17.2f}" for name in names[1:])
        print(f"{size_bytes:>12}{medians['raw socket']:>10.3f}{ratios}", flush=True)
    save("transport", {"medians_ms": results})


if __name__ == "__main__":
    main()
