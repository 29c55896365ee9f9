"""A proxy that does to a TCP connection what networks and machines do to it, at random or when a test says so.

    python -m tests.faults --to 9999 -p 0 --faults reset delay --rate 0.01

Each time a piece of a stream comes by, one of the faults happens to it with the probability ``rate``; with
``after_bytes`` one happens for certain to the piece with that byte of what the edge sends. A line on stdin (with
--until-stdin-closes) sets both: ``0.01 reset cut``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType

from neurosurgeon.cli.parser import address_parser, port_number
from neurosurgeon.cli.process import end_with_parent, listening_line, run_main, stop_event
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.net.sockets import accepted, listen, stop_accepting
from neurosurgeon.predictor.places import config_path

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PIECE_BYTES = 65_536
DELAY_S = 0.2
TRICKLE_BYTES, TRICKLE_S = 1_024, 0.002
MAX_TRICKLED_BYTES = 65_536
NO_LINGER = struct.pack("ii", 1, 0)  # close resets


class Fault(StrEnum):
    """A fault of a piece of a stream."""

    DELAY = "delay"  # it comes later
    CUT = "cut"  # a half of it comes, then the connection is closed
    RESET = "reset"  # a half of it comes, then the connection is reset
    TRICKLE = "trickle"  # it comes little by little
    DUPLICATE = "duplicate"  # it comes twice
    CORRUPT = "corrupt"  # a bit of it is another one
    BLACKHOLE = "blackhole"  # neither it nor anything else arrives on this connection, without an error


BREAKING = (Fault.CUT, Fault.RESET)


class FaultProxy:
    """Passes connections on to a port of this machine, with faults, during a ``with`` block."""

    def __init__(
        self,
        target_port: int,
        faults: Sequence[Fault] = (),
        rate: float = 1.0,
        *,
        after_bytes: int | None = None,
        seed: int = 0,
        port: int = 0,
    ) -> None:
        self.target_port = target_port
        self.faults, self.rate, self.after_bytes = tuple(faults), rate, after_bytes
        self.happened: Counter[Fault] = Counter()
        self.most: int | None = None  # faults in all; None: without end
        self.flows = threading.Event()  # cleared: the bytes of the edge wait here, without an error
        self.flows.set()
        self._draw = random.Random(seed)
        self._lock = threading.Lock()
        self._pairs: set[_Pair] = set()
        self._listener = listen(LOOPBACK, port)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._accepting.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        stop_accepting(self._listener)
        self._accepting.join()
        self.flows.set()
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.close()
            pair.join()

    def set_faults(self, rate: float, faults: Sequence[Fault]) -> None:
        """Change rate and faults."""
        self.rate, self.faults = rate, tuple(faults)

    def reset_all(self) -> None:
        """Reset every connection that is open."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.close(resets=True)

    def fault_of(self, start: int, end: int, *, is_upward: bool) -> Fault | None:
        """Return the fault of the bytes from ``start`` to ``end`` of one direction of a connection, or None."""
        with self._lock:
            if not self.faults or self.most is not None and self.happened.total() >= self.most:
                return None
            if self.after_bytes is None:
                happens = self._draw.random() < self.rate
            else:
                happens = is_upward and start <= self.after_bytes < end
            fault = self._draw.choice(self.faults) if happens else None
            if fault:
                self.happened[fault] += 1
            return fault

    def forget(self, pair: _Pair) -> None:
        """Drop a connection that has ended."""
        with self._lock:
            self._pairs.discard(pair)

    def _accept(self) -> None:
        for near, _ in accepted(self._listener):
            try:
                far = socket.create_connection((LOOPBACK, self.target_port))
            except OSError:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(self, near, far)
            with self._lock:
                self._pairs.add(pair)
            pair.start()


class _Pair:
    """One connection: a thread for each direction."""

    def __init__(self, proxy: FaultProxy, near: socket.socket, far: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = (near, far)
        self._is_dark = False
        self._over = threading.Event()
        self._running = 2
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._pump, args=ends, daemon=True) for ends in ((near, far), (far, near))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def close(self, *, resets: bool = False) -> None:
        """End both directions; the threads, which may wait in these sockets, close them."""
        self._over.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                if resets:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                    sock.shutdown(socket.SHUT_RD)  # wakes the thread; the close resets
                else:
                    sock.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        position, is_upward = 0, source is self._sockets[0]
        try:
            while data := source.recv(PIECE_BYTES):
                if is_upward:
                    self._proxy.flows.wait()
                if self._over.is_set():
                    break
                fault = self._proxy.fault_of(position, position + len(data), is_upward=is_upward)
                position += len(data)
                self._pass_on(data, target, fault)
            if not self._is_dark:
                target.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
        with self._lock:
            self._running -= 1
            is_last = self._running == 0
        if is_last:
            for sock in self._sockets:
                sock.close()
            self._proxy.forget(self)

    def _pass_on(self, data: bytes, target: socket.socket, fault: Fault | None) -> None:
        self._is_dark |= fault is Fault.BLACKHOLE
        if self._is_dark:
            return
        if fault is Fault.TRICKLE:
            self._trickle(data, target)
            return
        if fault is Fault.DELAY:
            self._over.wait(DELAY_S)
        if fault is Fault.CORRUPT:
            data = _corrupted(data)
        target.sendall(data[: len(data) // 2] if fault in BREAKING else data)
        if fault is Fault.DUPLICATE:
            target.sendall(data)
        if fault in BREAKING:
            self.close(resets=fault is Fault.RESET)

    def _trickle(self, data: bytes, target: socket.socket) -> None:
        for start in range(0, min(len(data), MAX_TRICKLED_BYTES), TRICKLE_BYTES):
            target.sendall(data[start : start + TRICKLE_BYTES])
            self._over.wait(TRICKLE_S)


def _corrupted(data: bytes) -> bytes:
    where = len(data) // 3
    return data[:where] + bytes([data[where] ^ 0x40]) + data[where + 1 :]


def write_slow_edge(path: Path, factor: float = 1_000.0) -> Path:
    """Write parameters of an edge so slow that every task is run wholly in the cloud; for --edge-config."""
    parameters = json.loads(config_path("edge").read_text())
    for kind in parameters["kinds"].values():
        kind["coefficients_ms"] = [factor * value for value in kind["coefficients_ms"]]
    path.write_text(json.dumps(parameters))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = address_parser("faults.py", __doc__)
    parser.add_argument("--to", type=port_number, required=True, help="port of this machine to pass connections on to")
    parser.add_argument("--faults", nargs="*", type=Fault, default=[], help="faults that may happen (default: none)")
    parser.add_argument("--rate", type=float, default=0.01, help="probability of a fault of each piece (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and their times (default: 0)")
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    with FaultProxy(args.to, args.faults, args.rate, seed=args.seed, port=args.port) as proxy:
        if args.until_stdin_closes:
            end_with_parent(stop, lambda line: _obey(proxy, line))
        log.info(listening_line("fault proxy", format_address((LOOPBACK, proxy.port))))
        stop.wait()
        log.info("faults: %s", dict(proxy.happened))
    return 0


def _obey(proxy: FaultProxy, line: str) -> None:
    rate, *faults = line.split()
    proxy.set_faults(float(rate), [Fault(fault) for fault in faults])


if __name__ == "__main__":
    sys.exit(main())
