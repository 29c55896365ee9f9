"""A naive server of pickled tensors: no key, no limits, no deadlines. Every attack here harms it.

    python -m tests.attacks.naive

A message is its length in eight bytes and a pickle; each is answered with one byte. It listens on loopback alone, and
may take 3 GiB of address space, so that it harms itself and not the machine.
"""

from __future__ import annotations

import contextlib
import pickle
import resource
import socket
import struct
import sys
import threading
from collections.abc import Sequence

LENGTH = struct.Struct("!Q")
ADDRESS_SPACE_BYTES = 3 * 2**30


def message(data: bytes) -> bytes:
    """Return the bytes that carry a pickle to the naive server."""
    return LENGTH.pack(len(data)) + data


def serve_one(sock: socket.socket) -> None:
    """Reply to messages until the peer closes the connection."""
    with sock:
        while True:
            (length,) = LENGTH.unpack(read(sock, LENGTH.size))
            pickle.loads(read(sock, length))
            sock.sendall(b"\1")


def read(sock: socket.socket, length: int) -> bytes:
    """Return so many bytes; their memory is allocated before they arrive."""
    data = bytearray(length)
    done = 0
    while done < length:
        count = sock.recv_into(memoryview(data)[done:])
        if not count:
            raise EOFError
        done += count
    return bytes(data)


def main(argv: Sequence[str] | None = None) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"naive listening on 127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve_one, args=(sock,), daemon=True).start()

    threading.excepthook = lambda failed: print(f"ERROR naive: {failed.exc_value!r}", file=sys.stderr)
    threading.Thread(target=accept, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.read()  # until the parent is gone


if __name__ == "__main__":
    main()
