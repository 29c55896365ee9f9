"""A thousand unauthenticated peers that send nothing, and a thousand that send a byte at a time, beside an honest edge.

    python -m tests.attacks.strangers

Each crowd comes all at once, from a process of its own. Shown: when the last of them was gone, and what the honest
edge's round trips and new connections took before and meanwhile.
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
PATIENCE_S = 8.0
DRIP_S = 0.1


def crowd(address: tuple[str, int], count: int, drips: bool, pipe: Pipe) -> None:
    """Tell that we are here, and connect ``count`` times; then tell when the last connection had been closed by the
    server (s from the first), and how many had not."""
    pipe.send("here")
    start_s = time.monotonic()
    selector = selectors.DefaultSelector()
    for _ in range(count):
        sock = socket.create_connection(address)
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ)
    last_s, drip, sent = 0.0, time.monotonic(), 0
    while selector.get_map() and time.monotonic() - start_s < PATIENCE_S:
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


def invade(address: tuple[str, int], count: int, drips: bool, meanwhile: Callable[[], None]) -> tuple[float, int]:
    """Send a crowd, and call ``meanwhile`` as long as it is there; return what `crowd` tells."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=crowd, args=(address, count, drips, theirs))
    process.start()
    ours.recv()  # it is there; what its start took from the machine is no part of the attack
    while not ours.poll():
        meanwhile()
    process.join()
    last_s, left = ours.recv()
    return last_s, left


class Honest:
    """An edge that runs one small task after the other, and another that connects again each time."""

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
        """Run one task, and open one more conversation."""
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
        """Return the median task, the median connect (ms), how many there were, how many failed; and start again."""
        report = statistics.median(self.tasks_ms), statistics.median(self.connects_ms), len(self.tasks_ms), self.refused
        self.tasks_ms, self.connects_ms, self.refused = [], [], 0
        return report

    def close(self) -> None:
        """End the conversation."""
        self._session.close()


def main() -> None:
    with naive() as victim:
        _, left = invade(victim.address, NAIVE_CROWD, False, lambda: time.sleep(0.1))
        print(f"naive server: {left} of {NAIVE_CROWD} silent strangers are still there after {PATIENCE_S:g} s")
    with cloud() as ours, contextlib.closing(Honest(ours)) as honest:
        for _ in range(200):
            honest.once()
        task_ms, connect_ms, _, _ = honest.report()
        print(f"ours: honest task p50 {task_ms:.2f} ms, connect p50 {connect_ms:.2f} ms")
        for drips in (False, True):
            last_s, left = invade(ours.address, CROWD, drips, honest.once)
            crowded_ms, connect_ms, count, refused = honest.report()
            print(
                f"ours, {CROWD} {'dripping' if drips else 'silent'} strangers: last one gone after {last_s:.2f} s, "
                f"{left} left; honest task p50 {crowded_ms:.2f} ms ({crowded_ms / task_ms:.2f}x), "
                f"connect p50 {connect_ms:.2f} ms, {refused} of {count} connects failed"
            )


if __name__ == "__main__":
    main()
