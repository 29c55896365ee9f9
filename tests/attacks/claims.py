"""Claims of memory that never comes: lengths of up to 2^64, and a hundred messages of 256 MiB each.

python -m tests.attacks.claims
"""

from __future__ import annotations

import contextlib
import struct
import time

from neurosurgeon.net.frames import FIXED_START, MAGIC, PREFIX, WIRE_VERSION, Kind, head_length
from neurosurgeon.net.header import pack_header
from neurosurgeon.net.messages import Request
from tests.attacks.naive import LENGTH
from tests.attacks.victims import HELLO, MB, Victim, cloud, naive

CLAIMS = 100
MIB = 2**20
SETTLE_S = 0.5
CLOSED_S = 20.0  # in which a cloud, however busy, closes a connection


def head(header: bytes, *lengths: int, buffers: int | None = None, header_length: int | None = None) -> bytes:
    """Return the head of a request whose counts and lengths may be wrong."""
    count = len(lengths) if buffers is None else buffers
    length = len(header) if header_length is None else header_length
    data = PREFIX.pack(MAGIC, WIRE_VERSION, Kind.REQUEST, count, length, 1).ljust(FIXED_START, b"\0")
    data += struct.pack(f"!{len(lengths)}Q", *lengths) + header
    return data.ljust(head_length(len(lengths), len(header)), b"\0")


def request(size_bytes: int) -> bytes:
    """Return the head of a request with one tensor of so many bytes, well described."""
    described = [("uint8", (size_bytes,), False)]
    return head(pack_header(tuple(Request("le_net", b"\1", "0" * 32, "0" * 32)), described), size_bytes)


LIES = {
    "header of 2^32 - 1": head(b"", header_length=2**32 - 1),
    "buffer of 2^60": request(2**60),
    "buffer of 2^63 + 1": request(2**63 + 1),
    "65,535 buffers": head(b"", buffers=65_535),
    "64 buffers of 2^58": head(b"", *[2**58] * 64),
}


def claim_from_cloud(victim: Victim, frame: bytes, count: int, closed: int) -> int:
    """Make a claim on many connections at once; return how many were closed, as soon as ``closed`` of them are."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(contextlib.closing(victim.connect())) for _ in range(count)]
        for sock in socks:
            sock.sendall(HELLO)
            with contextlib.suppress(ConnectionError):
                sock.sendall(frame)
        deadline_s = time.monotonic() + CLOSED_S
        while (found := sum(is_closed(sock) for sock in socks)) < closed and time.monotonic() < deadline_s:
            pass
        if found < count:
            time.sleep(SETTLE_S)  # for the others to take memory
        return found


def is_closed(sock: object) -> bool:
    """Return whether the peer has closed a connection; all bytes that it sent are read."""
    sock.settimeout(0.01)  # type: ignore[attr-defined]
    try:
        while sock.recv(65_536):  # type: ignore[attr-defined]
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def claim_from_naive(victim: Victim, size_bytes: int, count: int) -> None:
    """Make claims on the naive server, and wait until it takes no more memory."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(contextlib.closing(victim.connect())).sendall(LENGTH.pack(size_bytes))
        taken = -1
        while victim.peak_bytes != taken:
            taken = victim.peak_bytes
            time.sleep(SETTLE_S)


def main() -> None:
    with naive() as victim, cloud() as ours:
        before = victim.peak_bytes
        claim_from_naive(victim, 256 * MIB, 3)
        print(f"naive server, 3 claims of 256 MiB: {(victim.peak_bytes - before) / MB:+.0f} MB")
        claim_from_naive(victim, 2**60, 1)
        print(f"naive server, a claim of 2^60: {victim.lines()[-1]}")
        claim_from_cloud(ours, request(1), 1, 0)  # a first request loads modules, which is no part of the attack
        for name, frame in LIES.items():
            ours.forget_peak()
            before = ours.peak_bytes
            closed = claim_from_cloud(ours, frame, 1, 1)
            print(f"ours, {name}: {'closed' if closed else 'OPEN'}, {(ours.peak_bytes - before) / MB:+.1f} MB")
        for size_mib in (256, 200):
            ours.forget_peak()
            before = ours.peak_bytes
            closed = claim_from_cloud(ours, request(size_mib * MIB), CLAIMS, CLAIMS)
            grown_mb = (ours.peak_bytes - before) / MB
            print(f"ours, {CLAIMS} claims of {size_mib} MiB at once: {closed} closed, {grown_mb:+.1f} MB")


if __name__ == "__main__":
    main()
