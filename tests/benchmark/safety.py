"""The cost of safety: a tensor over loopback, rebuilt and acknowledged, plain, sealed with a key, and under TLS 1.3.

    python -m tests.benchmark.safety

A process for each side; the three take turns in one run. Also: one pass of the hashes that could seal records, and the
check of every tensor for NaN and infinite values.
"""

from __future__ import annotations

import hashlib
import hmac
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neurosurgeon.cli.certs import make_ca, make_certificate
from neurosurgeon.cli.parser import DEFAULT_IP
from neurosurgeon.cloud.conversation import is_finite
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import DEFAULT_LIMITS
from neurosurgeon.net.messages import Hello, Pong, Request
from neurosurgeon.net.sockets import connect, listen
from neurosurgeon.net.tls import cloud_tls, edge_tls
from neurosurgeon.utils.errors import PeerGoneError
from tests.benchmark.common import interleaved_medians, save

ROUNDS = {602_112: 200, 12_845_056: 30}
CALLS_A_TURN = 5
WAIT_S = 60.0
KEY = b"0123456789abcdef0123456789abcdef"
HASHES: dict[str, Callable[[bytes], object]] = {
    "hmac-sha256": lambda data: hmac.digest(KEY, data, "sha256"),
    "blake2b": lambda data: hashlib.blake2b(data, key=KEY).digest(),
    "blake2s": lambda data: hashlib.blake2s(data, key=KEY).digest(),
}


def sides(directory: Path) -> dict[str, tuple[Access, Access]]:
    """Return the access of the cloud and of the edge in each mode."""
    make_ca(directory)
    make_certificate(directory, "cloud", [DEFAULT_IP])
    cloud = cloud_tls(directory / "cloud.pem", directory / "cloud.key", None)
    edge = edge_tls(directory / "ca.pem", None, None)
    return {"plain": (OPEN, OPEN), "key": (Access(KEY), Access(KEY)), "TLS": (Access(tls=cloud), Access(tls=edge))}


def serve(listener: socket.socket, access: Access) -> None:
    """Take tensors from one edge until it leaves."""
    with Connection(listener.accept()[0]) as connection:
        connection.let_in(access, time.monotonic() + WAIT_S)
        connection.send(Hello.of())
        try:
            while True:
                connection.receive(WAIT_S)
                connection.send(Pong(0))
        except PeerGoneError:
            return


def exchange(connection: Connection, array: Array) -> Callable[[], object]:
    """Return the call that sends a tensor and waits for its acknowledgement."""

    def once() -> None:
        connection.send(Request("alex_net", b"\1", "0" * 32, "0" * 32), [array])
        connection.receive(WAIT_S)

    return once


def measure_modes(modes: dict[str, tuple[Access, Access]]) -> dict[int, dict[str, float]]:
    """Return median times (ms) for every size and mode."""
    context = multiprocessing.get_context("fork")
    connections, processes = {}, []
    for name, (cloud, edge) in modes.items():
        listener = listen(DEFAULT_IP, 0)
        processes.append(context.Process(target=serve, args=(listener, cloud), daemon=True))
        processes[-1].start()
        connections[name] = connect(*listener.getsockname(), DEFAULT_LIMITS, edge)
        connections[name].send(Hello.of())
        connections[name].receive(WAIT_S)
        listener.close()
    medians = {}
    for size_bytes, rounds in ROUNDS.items():
        array = np.random.default_rng(0).random(size_bytes // 4, dtype=np.float32)
        calls = {name: exchange(connection, array) for name, connection in connections.items()}
        medians[size_bytes] = interleaved_medians(calls, rounds, calls=CALLS_A_TURN)
    for connection in connections.values():
        connection.close()
    for process in processes:
        process.join()
    return medians


def measure_passes(size_bytes: int) -> dict[str, float]:
    """Return what one pass over so many bytes takes (ms)."""
    data, array = bytes(size_bytes), np.random.default_rng(0).random(size_bytes // 4, dtype=np.float32)
    calls: dict[str, Callable[[], object]] = {name: lambda h=h: h(data) for name, h in HASHES.items()}  # type: ignore[misc]
    return interleaved_medians({**calls, "is_finite": lambda: is_finite(array)}, 30)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        modes = measure_modes(sides(Path(directory)))
    passes = {size_bytes: measure_passes(size_bytes) for size_bytes in ROUNDS}
    print("a tensor to the cloud, acknowledged")
    for size_bytes, medians in modes.items():
        for name, median_ms in medians.items():
            rate = size_bytes / median_ms / 1e6
            print(f"{size_bytes:>12} bytes  {name:<12}{median_ms:>9.3f} ms {rate:>7.2f} GB/s", flush=True)
    print("one pass over its bytes")
    for size_bytes, medians in passes.items():
        for name, median_ms in medians.items():
            print(f"{size_bytes:>12} bytes  {name:<12}{median_ms:>9.3f} ms {size_bytes / median_ms / 1e6:>7.2f} GB/s")
    save("safety", {"transfers_ms": modes, "passes_ms": passes})


if __name__ == "__main__":
    main()
