"""Bytes to frames and back; no sockets. Lengths are checked against limits before anything is allocated.

A frame, all integers big-endian:

    offset      size  field
    0           4     magic "NSGN"
    4           1     wire version
    5           1     kind
    6           2     number of buffers, n
    8           4     header length, h
    12          4     task: the request that the frame belongs to, counted by the edge; else zero
    16          48    six figures, float64: durations and load of a reply; else zero
    64          8n    length of each buffer
    64 + 8n     h     header: restricted pickle of plain values
    ...               zeros to the next multiple of 512
    body              the buffers, each followed by zeros to the next multiple of 64

The receiver reads 512 bytes, which is the whole head of any ordinary frame, then the rest of a longer head, then the
body. All reads have a known length, and none includes a byte of the next frame. The heads of a stream of tasks differ
only in task and figures, so a head whose other bytes are known need not be parsed again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from neurosurgeon.utils.errors import ProtocolError, VersionError
from neurosurgeon.utils.units import readable_bytes

MAGIC = b"NSGN"
WIRE_VERSION = 4
ALIGNMENT = 64  # a cache line: tensors that start on one are read at full speed
HEAD_UNIT = 512  # one read, and one page of room for a request's header
TLS_HANDSHAKE, TLS_ALERT = b"\x16", b"\x15"  # first byte of a TLS connection, and of its refusal
PREFIX = struct.Struct("!4sBBHII")
CHANGING = struct.Struct("!I6d")  # task and figures
CHANGING_START, FIXED_START = 12, 64  # offsets of their first byte, and of the first after them
NO_FIGURES = (0.0,) * 6

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """The content of a frame; the messages (`net.messages`) and the handshake of keys (`net.keys`)."""

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
    ASK_LATENCIES = 11
    LATENCIES = 12
    ASK_TICKET = 20
    TICKET = 21
    TRAIN = 22
    ASK_TRAIN = 23
    KEY_START = 128  # this and higher: the header is no pickle, but 32 raw bytes of the handshake in net.keys
    KEY_CHALLENGE = 129
    KEY_PROOF = 130
    KEY_ACCEPTED = 131
    REFUSAL = 132  # one raw byte: the reason


RAW_KINDS = frozenset(kind for kind in Kind if kind >= Kind.KEY_START)
_KINDS = {int(kind): kind for kind in Kind}


class Limits(NamedTuple):
    """The limits of one frame: no peer can make this side allocate more."""

    max_header_bytes: int = 64 * 1024  # plain values only; a real header has a few hundred bytes
    max_buffers: int = 64  # a cut of a DAG has a few boundary tensors
    max_body_bytes: int = 256 * 1024 * 1024  # the largest cut of the four networks has 13 MB


DEFAULT_LIMITS = Limits()
HEADER_LIMITS = Limits(max_buffers=0, max_body_bytes=0)  # for the bandwidth service, whose samples are many
SMALL_LIMITS = Limits(max_header_bytes=4096, max_buffers=0, max_body_bytes=0)  # for unauthenticated peers


class Prefix(NamedTuple):
    """The first 16 bytes of a head, checked."""

    kind: Kind
    buffer_count: int
    header_length: int
    task: int
    head_length: int  # bytes before the body


class Head(NamedTuple):
    """Everything of a frame but its body."""

    kind: Kind
    task: int
    header: bytes
    lengths: tuple[int, ...]
    body_length: int  # bytes of the body, zeros included


def padding(length: int) -> int:
    """Return the number of zeros after a buffer of ``length`` bytes."""
    return -length % ALIGNMENT


def head_length(buffer_count: int, header_length: int) -> int:
    """Return the bytes of a head, its zeros included."""
    unpadded = FIXED_START + 8 * buffer_count + header_length
    return unpadded + -unpadded % HEAD_UNIT


def pack_head(kind: Kind, header: bytes, lengths: Sequence[int]) -> bytes:
    """Return the head of a frame with buffers of these lengths; its task and figures are still zero."""
    prefix = PREFIX.pack(MAGIC, WIRE_VERSION, kind, len(lengths), len(header), 0).ljust(FIXED_START, b"\0")
    head = prefix + struct.pack(f"!{len(lengths)}Q", *lengths) + header
    return head.ljust(head_length(len(lengths), len(header)), b"\0")


def frame_pieces(
    head: bytes, buffers: Sequence[Buffer], task: int = 0, figures: Sequence[float] = NO_FIGURES
) -> list[Buffer]:
    """Return the pieces of a frame in sending order, its task and figures set; buffers are not copied."""
    changed = bytearray(head)
    CHANGING.pack_into(changed, CHANGING_START, task, *figures)
    pieces: list[Buffer] = [changed]
    for buffer in buffers:
        pieces.append(buffer)
        if len(buffer) % ALIGNMENT:
            pieces.append(bytes(padding(len(buffer))))
    return pieces


def pack_frame(
    kind: Kind, header: bytes, buffers: Sequence[Buffer] = (), task: int = 0, figures: Sequence[float] = NO_FIGURES
) -> list[Buffer]:
    """Return the pieces of a frame; see `frame_pieces`."""
    return frame_pieces(pack_head(kind, header, list(map(len, buffers))), buffers, task, figures)


def check_magic(data: Buffer) -> None:
    """Refuse a peer whose first bytes, however few, are not those of our protocol.

    Raises: ProtocolError.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC[: len(data)]:
        raise ProtocolError(f"not our protocol: {describe_first_bytes(data)}")


def describe_first_bytes(data: Buffer) -> str:
    """Return the first 8 bytes of a peer of another protocol as text, and the likely name of that protocol."""
    first = bytes(data[:8])
    known = {
        b"GET ": "an HTTP request",
        b"POST": "an HTTP request",
        b"HEAD": "an HTTP request",
        b"HTTP": "an HTTP reply",
        b"SSH-": "SSH",
        TLS_HANDSHAKE + b"\x03": "TLS on a port without it",
        TLS_ALERT + b"\x03": "a TLS alert: pass --tls-ca, TLS is required there",
        b"\x80": "a bare pickle",
    }
    names = [f" ({name})" for start, name in known.items() if first.startswith(start)]
    return f"the first bytes of the peer are {first!r}{''.join(names)}"


def unpack_prefix(data: Buffer, limits: Limits = DEFAULT_LIMITS) -> Prefix:
    """Return the checked prefix of a frame from its first bytes, at least 16; later bytes are not read.

    Raises: ProtocolError: another protocol or wire version, an unknown kind, or more than ``limits`` allow.
    """
    _, version, kind, buffer_count, header_length, task = PREFIX.unpack_from(data)
    check_magic(data)
    if version != WIRE_VERSION:
        raise VersionError(f"the peer has wire version {version}, this side {WIRE_VERSION}: update the older one")
    known = _KINDS.get(kind)
    if known is None:
        raise ProtocolError(f"unknown kind of frame: {kind}")
    if header_length > limits.max_header_bytes:
        raise ProtocolError(f"header of {header_length} bytes: expected at most {limits.max_header_bytes}")
    if buffer_count > limits.max_buffers:
        raise ProtocolError(f"frame of {buffer_count} buffers: expected at most {limits.max_buffers}")
    return Prefix(known, buffer_count, header_length, task, head_length(buffer_count, header_length))


def unpack_head(prefix: Prefix, data: Buffer, limits: Limits = DEFAULT_LIMITS) -> Head:
    """Return the head of a frame from its first ``prefix.head_length`` bytes.

    Raises: ProtocolError: the body would be larger than ``limits`` allow.
    """
    start = FIXED_START + 8 * prefix.buffer_count
    lengths = struct.unpack_from(f"!{prefix.buffer_count}Q", data, FIXED_START)
    body_length = sum(length + padding(length) for length in lengths)
    if body_length > limits.max_body_bytes:
        most = readable_bytes(limits.max_body_bytes)
        raise ProtocolError(f"body of {readable_bytes(body_length)}: expected at most {most}")
    header = bytes(data[start : start + prefix.header_length])
    return Head(prefix.kind, prefix.task, header, lengths, body_length)


def split_body(body: memoryview, lengths: Sequence[int]) -> list[memoryview]:
    """Return the buffers inside a body, without copying."""
    buffers, start = [], 0
    for length in lengths:
        buffers.append(body[start : start + length])
        start += length + padding(length)
    return buffers
