"""A receiver of bytes without sockets: for frames that were mutated, and for a fuzzer."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from neurosurgeon.graph.spec import Array
from neurosurgeon.net.connection import Connection, Received, pack_message
from neurosurgeon.net.frames import HEAD_UNIT, MAGIC, WIRE_VERSION, Buffer, Limits
from neurosurgeon.net.header import ALLOWED_OPCODES, unpack_header
from neurosurgeon.net.memory import UNLIMITED
from neurosurgeon.net.messages import (
    AskLatencies,
    ErrorReply,
    Hello,
    Latencies,
    Message,
    Ping,
    Pong,
    Prepare,
    Probe,
    Ready,
    Reply,
    Request,
    Samples,
)
from neurosurgeon.utils.errors import AccessError, PeerGoneError, ProtocolError

EXPECTED = (ProtocolError, PeerGoneError, AccessError)  # any bytes may raise these, and no others
CORPUS = Path(__file__).parent / "corpus.zip"
LIMITS = Limits(max_body_bytes=1_048_576)
PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None))
RANDOM = np.random.default_rng(0)
SAMPLES: tuple[tuple[Message, list[Array]], ...] = (
    (Hello.of(device="cpu", threads=2, edge=bytes(16)), []),
    (AskLatencies("le_net", "0" * 32), []),
    (Latencies("le_net", "forest", [1.0, 2.5], [0.5, 2.0], [2.0, 3.0], ["features.0"], "data of A"), []),
    (Prepare("le_net", b"\7", "0" * 32), []),
    (Ready("le_net", "0" * 32), []),
    (
        Request("le_net", b"\7", "0" * 32, "1" * 32),
        [RANDOM.random((1, 3, 4, 5), np.float32), np.arange(7, dtype=np.uint8)],
    ),
    (Reply(12.5, 10.0, 1.0, 0.5, 3.0, 2.0), [RANDOM.random((1, 10), np.float32)]),
    (ErrorReply("busy", "the cloud is busy", 20.0), []),
    (Ping(3), []),
    (Pong(3, 1.0, 2.0), []),
    (Probe(16_384), []),
    (Samples([0, 5, 9], [100, 100, 56]), []),
)


class BytesWire:
    """A wire on which given bytes arrive, and then the end."""

    peer = "memory"

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read as many bytes as fit."""
        count = min(len(view), len(self._data))
        view[:count], self._data = self._data[:count], self._data[count:]
        return count

    def send(self, pieces: Sequence[Buffer], deadline_s: float) -> None:
        """Drop it."""


class BytesConnection(Connection):
    """A connection on which given bytes arrive."""

    def __init__(self, data: bytes) -> None:
        self._wire, self.peer, self.limits = BytesWire(data), "memory", LIMITS
        self._head, self._memory = memoryview(bytearray(HEAD_UNIT)), UNLIMITED


def frames() -> list[bytes]:
    """Return a valid frame of every kind of message."""
    return [frame_of(message, arrays) for message, arrays in SAMPLES]


def frame_of(message: Message, arrays: Sequence[Array]) -> bytes:
    """Return the bytes of a message."""
    return b"".join(pack_message(message, arrays))


def decode(data: bytes) -> Received | None:
    """Return the first message in ``data``, checked for consistency, or None if it was refused."""
    try:
        received = BytesConnection(data).receive(1.0)
    except EXPECTED:
        return None
    check_plain(tuple(received.message))
    again = BytesConnection(frame_of(received.message, received.arrays)).receive(1.0)
    assert repr(again.message) == repr(received.message)  # NaN is equal to nothing
    for one, other in zip(received.arrays, again.arrays, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == other.tobytes()
    return received


def decode_header(data: bytes) -> None:
    """Load a header, and check with the standard library's own reader that nothing but plain values was made."""
    try:
        values = unpack_header(data)
    except ProtocolError:
        return
    assert {opcode.code.encode("latin-1")[0] for opcode, _, _ in pickletools.genops(data)} <= ALLOWED_OPCODES
    check_plain(values)


def corpus() -> Iterator[bytes]:
    """Yield the inputs that a fuzzer has found; frames have this wire version, whatever they were found in."""
    with ZipFile(CORPUS) as kept:
        for data in map(kept.read, kept.namelist()):
            is_frame = data[1:5] == MAGIC and len(data) > 5
            yield data[:5] + bytes([WIRE_VERSION]) + data[6:] if is_frame else data


def decode_input(data: bytes) -> None:
    """Decode a fuzzer's input: its first byte says whether the rest is a header alone, or a frame."""
    if data[:1] < b"\x80":
        decode_header(data[1:])
    else:
        decode(data[1:])


def check_plain(value: Any) -> None:
    """Assert that a value holds nothing but plain ones."""
    assert type(value) in PLAIN
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            check_plain(item)
