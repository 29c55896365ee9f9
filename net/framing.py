"""Bytes to frames and back; no sockets. Lengths are checked against limits before anything is allocated.

A frame, all integers big-endian:

    offset      size  field
    0           4     magic "NSGN"
    4           1     wire version
    5           1     kind
    6           2     number of buffers, n
    8           4     header length, h
    12          4     reserved, zero
    16          8n    length of each buffer
    16 + 8n     h     header: restricted pickle of plain values
    ...               zeros to the next multiple of 64
    body              the buffers, each followed by zeros to the next multiple of 64

The receiver reads the first 16 bytes, then the rest of the head, then the body: three reads of known length.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from utils.errors import ProtocolError
from utils.units import readable_bytes

MAGIC = b"NSGN"
WIRE_VERSION = 1
ALIGNMENT = 64  # a cache line: tensors that start on one are read at full speed
PREFIX = struct.Struct("!4sBBHII")

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a frame carries; the messages of a conversation (`net.messages`) and of a bandwidth probe."""

    HELLO = 1
    PREPARE = 2
    READY = 3
    REQUEST = 4
    REPLY = 5
    ERROR = 6
    PING = 7
    PONG = 8
    PROBE = 9
    SAMPLES = 10


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may make us allocate with one frame."""

    max_header_bytes: int = 64 * 1024  # plain values only; a real header has a few hundred bytes
    max_buffers: int = 64  # a cut of a DAG crosses with a handful of tensors
    max_body_bytes: int = 256 * 1024 * 1024  # the largest cut of the four networks has 13 MB


DEFAULT_LIMITS = Limits()
SMALL_LIMITS = Limits(max_header_bytes=4096, max_buffers=0, max_body_bytes=0)  # before a peer has said hello


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first 16 bytes of a frame, checked."""

    kind: Kind
    buffer_count: int
    header_length: int

    @property
    def head_length(self) -> int:
        """Bytes between the prefix and the body."""
        unpadded = PREFIX.size + 8 * self.buffer_count + self.header_length
        return unpadded + padding(unpadded) - PREFIX.size


@dataclass(frozen=True, slots=True)
class Head:
    """Everything of a frame but its body."""

    kind: Kind
    header: bytes
    lengths: tuple[int, ...]

    @property
    def body_length(self) -> int:
        """Bytes of the body, paddings included."""
        return sum(length + padding(length) for length in self.lengths)


def padding(length: int) -> int:
    """Return how many zeros follow ``length`` bytes."""
    return -length % ALIGNMENT


def pack_frame(kind: Kind, header: bytes, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the pieces of a frame in sending order; buffers are passed on, not copied."""
    lengths = [len(buffer) for buffer in buffers]
    head = b"".join(
        (
            PREFIX.pack(MAGIC, WIRE_VERSION, kind, len(buffers), len(header), 0),
            struct.pack(f"!{len(lengths)}Q", *lengths),
            header,
        )
    )
    pieces: list[Buffer] = [head + bytes(padding(len(head)))]
    for buffer, length in zip(buffers, lengths, strict=True):
        if length:
            pieces.append(buffer)
        if padding(length):
            pieces.append(bytes(padding(length)))
    return pieces


def unpack_prefix(data: Buffer, limits: Limits = DEFAULT_LIMITS) -> Prefix:
    """Return the checked prefix of a frame from its first 16 bytes.

    Raises: ProtocolError: a stranger, another wire version, an unknown kind, or more than ``limits`` allow.
    """
    magic, version, kind, buffer_count, header_length, reserved = PREFIX.unpack(data)
    if magic != MAGIC:
        raise ProtocolError(f"not our protocol: the peer began with {bytes(data[:8])!r}")
    if version != WIRE_VERSION:
        raise ProtocolError(f"the peer speaks wire version {version}, this side {WIRE_VERSION}: update the older one")
    if kind not in _KINDS or reserved:
        raise ProtocolError(f"unknown kind of frame: {kind}")
    if header_length > limits.max_header_bytes:
        raise ProtocolError(f"header of {header_length} bytes; at most {limits.max_header_bytes} are allowed")
    if buffer_count > limits.max_buffers:
        raise ProtocolError(f"frame of {buffer_count} buffers; at most {limits.max_buffers} are allowed")
    return Prefix(Kind(kind), buffer_count, header_length)


def unpack_head(prefix: Prefix, data: Buffer, limits: Limits = DEFAULT_LIMITS) -> Head:
    """Return the head of a frame from the ``prefix.head_length`` bytes behind its prefix.

    Raises: ProtocolError: the body would be larger than ``limits`` allow.
    """
    lengths = struct.unpack_from(f"!{prefix.buffer_count}Q", data)
    start = 8 * prefix.buffer_count
    head = Head(prefix.kind, bytes(data[start : start + prefix.header_length]), lengths)
    if head.body_length > limits.max_body_bytes:
        raise ProtocolError(
            f"body of {readable_bytes(head.body_length)}; at most {readable_bytes(limits.max_body_bytes)} are allowed"
        )
    return head


def split_body(body: memoryview, lengths: Sequence[int]) -> list[memoryview]:
    """Return the buffers inside a body, without copying."""
    buffers, start = [], 0
    for length in lengths:
        buffers.append(body[start : start + length])
        start += length + padding(length)
    return buffers
