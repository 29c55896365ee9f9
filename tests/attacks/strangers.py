"""A thousand peers that send nothing, and a thousand that send a byte at a time; an honest edge goes on meanwhile.

    python -m tests.attacks.strangers

Each thousand connects at once, from a process of its own. Shown: when the last of them was closed, and the honest
edge's round trips and new connections before and meanwhile.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import selectors
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe

from neurosurgeon.net.session import EdgeSession
from neurosurgeon.utils.errors import NetworkError
from tests.attacks.victims import HELLO, Victim, cloud, naive
from tests.net.clouds import boundary_tensors, request_at
from tests.networks import load_network, random_input

CROWD, NAIVE_CROWD = 1000, 200  # the naive server's address space has no room for the threads of more
TIMEOUT_S = 8.0
DRIP_S = 0.1


def crowd(address: tuple[str, int], count: int, drips: bool, pipe: Pipe) -> None:
    """Connect ``count`` times; send when the server had closed the last one (s from the first), and how many are open.

    A first message announces that the process has started.
    """
    pipe.send("here")
    start_s = time.monotonic()
    selector = selectors.DefaultSelector()
    for _ in range(count):
        sock = socket.create_connection(address)
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ)
    last_s, drip, sent = 0.0, time.monotonic(), 0
    while selector.get_map() and time.monotonic() - start_s < TIMEOUT_S:
        for key, _ in selector.select(DRIP_S / 2):
            if is_over(key.fileobj):  # type: ignore[arg-type]
                selector.unregister(key.fileobj)
                last_s = time.monotonic() - start_s
        if drips and time.monotonic() > drip:
            drip += DRIP_S
            for key in list(selector.get_map().values()):
                with contextlib.suppress(OSError):
                    key.fileobj.send(HELLO[sent : sent + 1])  # type: ignore[union-attr]
            sent += 1
    pipe.send((last_s, len(selector.get_map())))


def is_over(sock: socket.socket) -> bool:
    """Return whether a connection that can be read has ended."""
    try:
        return not sock.recv(4096)
    except OSError:
        return True


def attack(address: tuple[str, int], count: int, drips: bool, meanwhile: Callable[[], None]) -> tuple[float, int]:
    """Start a crowd, and call ``meanwhile`` until it ends; return the result of `crowd`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=crowd, args=(address, count, drips, theirs))
    process.start()
    ours.recv()  # it has started: the load of the start is no part of the attack
    while not ours.poll():
        meanwhile()
    process.join()
    last_s, left = ours.recv()
    return last_s, left


class HonestEdge:
    """An edge that runs one small task after the other, and another that opens a new connection each time."""

    def __init__(self, victim: Victim) -> None:
        self._address = victim.address
        network = load_network("le_net")
        self._request, self._arrays = request_at(network, 0), boundary_tensors(network, 0, random_input())
        self._session = EdgeSession.open(*victim.address)
        self._session.ask_to_prepare(self._request.preparation)
        self._session.wait_until_ready(network.ref.weights_digest)
        self.tasks_ms: list[float] = []
        self.connects_ms: list[float] = []
        self.refused = 0

    def once(self) -> None:
        """Run one task, and open one more connection."""
        start_s = time.perf_counter()
        self._session.infer(self._request, self._arrays)
        self.tasks_ms.append((time.perf_counter() - start_s) * 1e3)
        start_s = time.perf_counter()
        try:
            EdgeSession.open(*self._address).close()
        except NetworkError:
            self.refused += 1
        self.connects_ms.append((time.perf_counter() - start_s) * 1e3)

    def report(self) -> tuple[float, float, int, int]:
        """Return the median task and connect (ms), the count, and the failed connects; and reset them."""
        figures = (
            statistics.median(self.tasks_ms),
            statistics.median(self.connects_ms),
            len(self.tasks_ms),
            self.refused,
        )
        self.tasks_ms, self.connects_ms, self.refused = [], [], 0
        return figures

    def close(self) -> None:
        """Close the connection."""
        self._session.close()


def main() -> None:
    with naive() as victim:
        _, left = attack(victim.address, NAIVE_CROWD, False, lambda: time.sleep(0.1))
        print(f"naive server: {left} of {NAIVE_CROWD} silent peers are still connected after {TIMEOUT_S:g} s")
    with cloud() as ours, contextlib.closing(HonestEdge(ours)) as honest:
        for _ in range(200):
            honest.once()
        task_ms, connect_ms, _, _ = honest.report()
        print(f"ours: honest task p50 {task_ms:.2f} ms, connect p50 {connect_ms:.2f} ms")
        for drips in (False, True):
            last_s, left = attack(ours.address, CROWD, drips, honest.once)
            crowded_ms, connect_ms, count, refused = honest.report()
            print(
                f"ours, {CROWD} {'dripping' if drips else 'silent'} peers: last one closed after {last_s:.2f} s, "
                f"{left} left; honest task p50 {crowded_ms:.2f} ms ({crowded_ms / task_ms:.2f}x), "
                f"connect p50 {connect_ms:.2f} ms, {refused} of {count} connects failed"
            )


if __name__ == "__main__":
    main()
