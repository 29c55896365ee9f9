"""Peers of other protocols: HTTP, TLS on a plain port, random bytes, a bare pickle. Each is refused at once.

python -m tests.attacks.knocks
"""

from __future__ import annotations

import random
import ssl
import statistics
import time
from pathlib import Path

from tests.attacks.naive import message
from tests.attacks.pickles import long_binput
from tests.attacks.victims import Victim, cloud, naive, wait_until_closed

ROUNDS = 20
TIMEOUT_S = 1.0


def client_hello() -> bytes:
    """Return the first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="cloud.example")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


OTHER_PROTOCOLS = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: cloud.example\r\n\r\n",
    "HTTP, three bytes": b"GET",
    "TLS on a plain port": client_hello(),
    "random bytes": random.Random(1).randbytes(1000),
    "one byte": b"\x00",
    "bare pickle": long_binput(Path()),
    "pickle with a length": message(long_binput(Path())),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
}


def closed_after_ms(victim: Victim, data: bytes) -> float | None:
    """Return the time (ms) after which a server closed the connection, or None if it did not."""
    with victim.connect(TIMEOUT_S) as sock:
        start_s = time.perf_counter()
        sock.sendall(data)
        try:
            wait_until_closed(sock)
        except TimeoutError:
            return None
        return (time.perf_counter() - start_s) * 1e3


def main() -> None:
    print(f"{'first bytes':<22}{'naive':>14}{'ours, median':>15}{'worst':>10}   log lines each")
    with naive() as victim, cloud() as ours:
        for name, data in OTHER_PROTOCOLS.items():
            naively_ms = closed_after_ms(victim, data)
            lines = len(ours.lines())
            times_ms = [closed_after_ms(ours, data) or float("inf") for _ in range(ROUNDS)]
            time.sleep(0.1)
            each = (len(ours.lines()) - lines) / ROUNDS
            said = f"{naively_ms:.1f} ms" if naively_ms else "stays open"
            print(f"{name:<22}{said:>14}{statistics.median(times_ms):>12.2f} ms{max(times_ms):>7.1f} ms{each:>10g}")


if __name__ == "__main__":
    main()
