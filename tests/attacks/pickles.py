"""Pickles that run code, crash the process, or take memory without end, from nine bytes on.

python -m tests.attacks.pickles
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from neurosurgeon.net.frames import Kind, pack_frame
from tests.attacks.naive import message
from tests.attacks.victims import HELLO, MB, Victim, cloud, naive, wait_until_closed

ALLOWED_BYTES = 50 * MB
CLAIM_BYTES = 400 * MB
SETTLE_S = 0.3  # a server is given the time to do itself harm
HARM_S = 20.0  # in which the naive server, however slow, has done it


class _MakeDirectory:
    """Makes a directory where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def code(path: Path) -> bytes:
    """Return a pickle that runs code: it makes a directory."""
    return pickle.dumps(_MakeDirectory(path), protocol=5)


def long_binput(path: Path) -> bytes:
    """Return a pickle that stores None at place 80,000,000 of the memo, which grows to 1.2 GB for it."""
    return b"\x80\x05Nr" + struct.pack("<I", 80_000_000) + b"."


def global_call(path: Path) -> bytes:
    """Return a pickle that calls bytearray(400,000,000)."""
    return b"\x80\x05cbuiltins\nbytearray\nJ" + struct.pack("<i", CLAIM_BYTES) + b"\x85R."


def bytearray8(path: Path) -> bytes:
    """Return a pickle that claims 400 MB of bytes, and brings none."""
    return b"\x80\x05\x96" + struct.pack("<Q", CLAIM_BYTES) + b"."


def nested(path: Path) -> bytes:
    """Return a pickle of 200,000 tuples, one in the other, as a key: hashing it overflows the stack of C."""
    return b"\x80\x05})" + b"\x85" * 200_000 + b"Ns."


def frame_claim(path: Path) -> bytes:
    """Return a pickle whose frame says that it is 2^60 bytes long."""
    return b"\x80\x05\x95" + struct.pack("<Q", 2**60) + b"N."


ATTACKS: tuple[Callable[[Path], bytes], ...] = (code, long_binput, global_call, bytearray8, nested, frame_claim)


def harm(
    victim: Victim, attack: Callable[[Victim, bytes], None], make: Callable[[Path], bytes], within_s: float = SETTLE_S
) -> set[str]:
    """Return the harm of an attack to a server after ``SETTLE_S``, or as soon as there is any within ``within_s``."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "made by the attack"
        victim.forget_peak()
        resident, virtual, errors = victim.peak_bytes, victim.virtual_bytes, victim.errors()
        attack(victim, make(path))
        deadline_s = time.monotonic() + within_s
        while True:
            time.sleep(SETTLE_S)
            done = harm_seen(victim, path, resident, virtual, errors)
            if done or time.monotonic() > deadline_s:
                return done


def harm_seen(victim: Victim, path: Path, resident: int, virtual: int, errors: int) -> set[str]:
    """Return the harm to a server since it had so much memory and so many errors."""
    done = {"ran code"} if path.exists() else set()
    if not victim.is_alive():
        return done | {"crashed"}
    if victim.peak_bytes - resident > ALLOWED_BYTES:
        done.add(f"took {(victim.peak_bytes - resident) / MB:.0f} MB")
    elif not done and victim.virtual_bytes - virtual >= CLAIM_BYTES:
        done.add(f"set {(victim.virtual_bytes - virtual) / MB:.0f} MB aside")
    return done | ({"unhandled exception"} if victim.errors() > errors else set())


def attack_naive(victim: Victim, data: bytes) -> None:
    """Send a pickle to the naive server."""
    with victim.connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(message(data))
        sock.settimeout(SETTLE_S)
        with contextlib.suppress(TimeoutError):
            sock.recv(1)


def attack_cloud(victim: Victim, data: bytes) -> None:
    """Send a pickle to a cloud: bare, as a hello, and as the header of a request after a good hello."""
    for attempt in (data, b"".join(pack_frame(Kind.HELLO, data)), HELLO + b"".join(pack_frame(Kind.REQUEST, data))):
        with victim.connect() as sock, contextlib.suppress(ConnectionError):
            sock.sendall(attempt)
            wait_until_closed(sock)


def main() -> None:
    print(f"{'pickle':<14}{'bytes':>9}  {'naive server':<34}ours")
    with cloud() as ours:
        for make in ATTACKS:
            with naive() as victim:
                naively = harm(victim, attack_naive, make, HARM_S)
            really = harm(ours, attack_cloud, make)
            size = len(make(Path("x")))
            print(f"{make.__name__:<14}{size:>9}  {', '.join(sorted(naively)):<34}{', '.join(really) or 'refused'}")
        print(f"the cloud still serves, with {ours.threads} threads")


if __name__ == "__main__":
    main()
