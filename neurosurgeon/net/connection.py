"""Connections of whole messages, with deadlines and typed errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import socket
import struct
import sys
import termios
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from neurosurgeon.net.access import Access
from neurosurgeon.net.frames import (
    CHANGING,
    CHANGING_START,
    DEFAULT_LIMITS,
    FIXED_START,
    HEAD_UNIT,
    RAW_KINDS,
    Buffer,
    Head,
    Kind,
    Limits,
    frame_pieces,
    pack_head,
    split_body,
    unpack_head,
    unpack_prefix,
)
from neurosurgeon.net.header import (
    WireSpec,
    check_tensor_specs,
    pack_array,
    pack_header,
    unpack_array,
    unpack_header,
)
from neurosurgeon.net.keys import Refusal, refused, tell_refusal
from neurosurgeon.net.memory import UNLIMITED, MemoryLimit
from neurosurgeon.net.messages import Hello, Message, Reply, Request, figures_of, header_values, kind_of, message_of
from neurosurgeon.net.tcp_info import PACED, SendState, acked_bytes, send_state
from neurosurgeon.net.wire import HEAD_TIMEOUT_S, SocketWire, Wire, read_all, read_head_unit
from neurosurgeon.utils.errors import AccessError, BusyError, PeerGoneError, ProtocolError
from neurosurgeon.utils.units import s_to_ms

if TYPE_CHECKING:  # the bandwidth monitor sends no arrays, and must start without numpy
    from neurosurgeon.graph.spec import Array

log = logging.getLogger(__name__)

ACCESS_TIMEOUT_S = 5.0  # TLS and key take four round trips together
# A body without memory for it is read and dropped; a larger one ends the connection, as it may never arrive.
MAX_SKIPPED_BYTES, SKIP_BYTES = 16 * 1024 * 1024, 65_536
RAW_TIMEOUT_S = 2.0  # a bandwidth probe is bounded in time
BODY_BASE_S = 10.0  # timeout of a body, besides its length at the slowest rate that is served
SILENCE_S = 4.0  # a cloud without a heartbeat for so long is disconnected: reported within 5 s
EDGE_SILENCE_S = 30.0  # an edge may lose its radio for a while, or reply after a long queue of its own tensors
KEEPALIVE_INTERVAL_S = 1
DELIVERY_CHECK_S = 0.005
MIN_RATE_BYTES_PER_S = 50_000  # 0.4 Mbit/s; the slowest link of the field's tables is 3G with 1.1
TCP_INFO_BYTES, NAME_BYTES = 256, 16  # an older kernel returns fewer
SO_MAX_PACING_RATE, UNPACED = 47, 0xFFFF_FFFF  # asm-generic/socket.h; the socket module has no name for it
KEPT_HEADS = 64  # known ones; a cloud serves a few models and cuts at a time


def pack_message(message: Message, arrays: Sequence[Array] = (), task: int = 0) -> list[Buffer]:
    """Return the pieces of the frame that carries a message, its arrays in their own memory."""
    specs, buffers = zip(*map(pack_array, arrays), strict=True) if arrays else ((), ())
    make = known_head if isinstance(message, Request | Reply) else head_of
    head = make(kind_of(message), header_values(message), specs, tuple(map(len, buffers)))
    return frame_pieces(head, buffers, task, figures_of(message))


def head_of(kind: Kind, values: tuple[Any, ...], specs: tuple[WireSpec, ...], lengths: tuple[int, ...]) -> bytes:
    """Return the head of a message's frame, without its task and figures."""
    return pack_head(kind, pack_header(values, list(specs)), lengths)


# The heads of a stream of tasks differ in nothing else. To pack each of them again takes a fifth of an exchange of
# 16 KB (``python -m tests.benchmark.transport``).
known_head = lru_cache(KEPT_HEADS)(head_of)


class Outline(NamedTuple):
    """The fields of a head without its task and figures, checked."""

    head: Head
    message: Message | None = None  # None: a reply, whose fields are the figures, or a frame without a pickle
    specs: tuple[WireSpec, ...] = ()  # of the arrays


def outline_of(data: Buffer, limits: Limits) -> Outline | int:
    """Return the fields of a head, or its length if ``data`` ends before it does.

    Raises: ProtocolError.
    """
    prefix = unpack_prefix(data, limits)
    if prefix.head_length > len(data):
        return prefix.head_length
    head = unpack_head(prefix, data, limits)
    if head.kind in RAW_KINDS:
        return Outline(head)
    parts = unpack_header(head.header)
    if len(parts) != 2:
        raise ProtocolError(f"header of {len(parts)} parts")
    values, specs = parts
    message = message_of(head.kind, values)
    check_tensor_specs(specs, head.lengths)
    return Outline(head, message, tuple(specs))


@lru_cache(KEPT_HEADS)
def known_outline(start: bytes, rest: bytes, limits: Limits) -> Outline | int:
    """Return `outline_of` for the parts of a head before and after its task and figures; no caller may change it.

    The heads of a stream of tasks differ in nothing else. To parse each of them takes a third of an exchange of 16 KB
    and a quarter of one of 150 KB (``python -m tests.benchmark.transport``).
    """
    return outline_of(start.ljust(FIXED_START, b"\0") + rest, limits)


class Received(NamedTuple):
    """A message and its arrays, which share the memory of its body."""

    message: Message
    arrays: tuple[Array, ...]
    task: int  # the number of the request that it belongs to
    receive_ms: float  # from the first byte to the last
    refusal: BusyError | None = None  # there was no memory for the arrays: they were read, and are gone


class Connection:
    """Whole messages over one TCP connection; after an error the connection is of no more use.

    One thread may send while another receives; two that send, or two that receive, would mix their frames.
    """

    def __init__(self, sock: socket.socket, limits: Limits = DEFAULT_LIMITS, memory: MemoryLimit = UNLIMITED) -> None:
        self.sock = sock
        self.limits = limits
        self._link = SocketWire(sock)
        self._wire: Wire = self._link
        self._head = memoryview(bytearray(HEAD_UNIT))
        self._memory = memory
        self.is_mid_frame = False  # a frame may be out in part: the peer would read the next one as its rest
        self.reading = 0  # the task whose message is being read, or was read last; 0 before its head is there
        self.peer = self._link.peer

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def sent_bytes(self) -> int:
        """The bytes sent so far."""
        return self._link.sent_bytes

    @property
    def received_bytes(self) -> int:
        """The bytes received so far."""
        return self._link.received_bytes

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self.sock.close()

    def stop_reading(self) -> None:
        """Let ``receive`` return the messages that have arrived, then end; replies are still sent. Any thread."""
        with contextlib.suppress(OSError):  # already gone
            self.sock.shutdown(socket.SHUT_RD)

    def wait_until_delivered(self, wait_s: float) -> None:
        """Block until the peer's kernel has acknowledged all bytes: an earlier close could discard some."""
        deadline_s = time.monotonic() + wait_s
        with contextlib.suppress(OSError):  # already closed, or a system without this count
            while _unacknowledged_bytes(self.sock) and time.monotonic() < deadline_s:
                time.sleep(DELIVERY_CHECK_S)

    def break_off(self) -> None:
        """End every ``receive`` and ``send`` at once, also a blocked one. Any thread."""
        with contextlib.suppress(OSError):  # already gone
            self.sock.shutdown(socket.SHUT_RDWR)

    def give_up_after(self, silence_s: float) -> None:
        """Let the kernel end the connection if the peer's kernel is silent for so long, idle or not.

        This does not detect a process that hangs while its kernel acknowledges: see `SocketWire.silence_s`.
        """
        sock = self.sock
        with contextlib.suppress(OSError):  # already closed: the next call raises
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere the system's default holds
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_INTERVAL_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(s_to_ms(silence_s)))

    # ---------------------------------------------------------------- before the first message

    def let_in(self, access: Access, latest_s: float) -> Hello:
        """As a cloud: authenticate the peer as ``access`` asks, and return its hello. Blocks until ``latest_s``.

        Raises: AccessError: it was refused, and has the reason. NetworkError: a timeout, or another protocol.
        """
        self._link.latest_s = latest_s
        self._wire = access.as_cloud(self._link, latest_s)
        try:
            hello = self.receive(math.inf).message
        except AccessError as exc:
            tell_refusal(self._wire, exc, latest_s)
            raise
        if not isinstance(hello, Hello):
            raise ProtocolError(f"{self.peer} did not say hello")
        self._link.latest_s = math.inf
        return hello

    def ask_in(self, access: Access, host: str) -> None:
        """As an edge: authenticate both sides, and set the timeout of a silent cloud. May block.

        Raises: AccessError: one side does not accept the other. NetworkError.
        """
        self.give_up_after(SILENCE_S)
        self._link.silence_s = SILENCE_S
        self._wire = access.as_edge(self._link, host, time.monotonic() + ACCESS_TIMEOUT_S)

    # ---------------------------------------------------------------- messages

    def send(self, message: Message, arrays: Sequence[Array] = (), task: int = 0) -> None:
        """Send a message and its arrays, these from their own memory.

        After any error, `is_mid_frame` is whether the connection can no longer be used.

        Raises: PeerGoneError, DeadlineError: the peer does not read.
        """
        pieces = pack_message(message, arrays, task)
        self.is_mid_frame = True
        self._wire.send(pieces, body_deadline_s(sum(map(len, pieces))))
        self.is_mid_frame = False

    def receive(self, wait_s: float) -> Received:
        """Return the next message, waiting at most ``wait_s`` for its first byte.

        The header is checked in full before memory is allocated for the body.

        Raises: PeerGoneError: closed between messages, inside one, or reset.
                DeadlineError: no message, or no end of one, in time.
                ProtocolError: the peer broke the protocol.
                BusyError: there is no memory for a large body; for a smaller one, see `Received.refusal`.
                AccessError: the peer refused this side.
        """
        self.reading = 0
        start_s = read_head_unit(self._wire, self._head, time.monotonic() + wait_s)
        task, *figures = CHANGING.unpack_from(self._head, CHANGING_START)
        self.reading = task
        head, message, specs = self._read_outline(start_s)
        if message is None:
            if head.kind is not Kind.REPLY:
                raise self._out_of_place(head)
            message = Reply._make(figures)
        if not head.lengths:
            return Received(message, (), task, s_to_ms(time.monotonic() - start_s))
        length = head.body_length
        deadline_s = body_deadline_s(length)
        try:
            memory = self._memory.allocate(self, length)
        except BusyError as exc:
            if length > MAX_SKIPPED_BYTES:
                raise
            self._skip(length, deadline_s)
            return Received(message, (), task, s_to_ms(time.monotonic() - start_s), exc)
        read_all(self._wire, memory, deadline_s)
        arrays = tuple(map(unpack_array, specs, split_body(memory, head.lengths)))
        return Received(message, arrays, task, s_to_ms(time.monotonic() - start_s))

    def send_state(self) -> SendState | None:
        """Return the bytes that may be sent before an acknowledgement, or None if the system does not report them."""
        try:
            data = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            state = send_state(data, self._congestion_control())
        except (OSError, AttributeError):  # the connection is lost, or this is not Linux
            return None
        return state._replace(is_encrypted=self._wire is not self._link) if state else None

    def acked_bytes(self) -> int | None:
        """Return the bytes that the peer's kernel has acknowledged, or None if the system does not report them."""
        try:
            return acked_bytes(self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES))
        except (OSError, AttributeError):  # the connection is lost, or this is not Linux
            return None

    def segment_bytes(self) -> int:
        """Return the payload bytes of a packet."""
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)

    def send_at_most(self, rate_bytes_per_s: float) -> None:
        """Pace packets at no more than this rate; infinity ends it. Without a pacing congestion control, do nothing.

        Otherwise the kernel would continue to pace without a limit, and spread small tensors over a round trip.
        """
        with contextlib.suppress(OSError, AttributeError):  # already gone, or this is not Linux
            if self._congestion_control() in PACED:
                rate = int(min(rate_bytes_per_s, UNPACED))
                self.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("@I", rate))

    def send_windows_at_once(self) -> None:
        """Use a congestion control that does not pace: bbr would spread a probe over the round trip."""
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        except (OSError, AttributeError):  # not this system, or not allowed: the default is used
            log.debug("congestion control of the probe stays the system's")

    def receive_raw(self, size_bytes: int, scratch: memoryview) -> Iterable[tuple[float, int]]:
        """Read ``size_bytes`` bytes that belong to no frame; yield time (s, monotonic) and bytes of every read."""
        deadline_s = time.monotonic() + RAW_TIMEOUT_S
        while size_bytes:
            count = self._wire.read_some(scratch[:size_bytes], deadline_s)
            if not count:
                raise PeerGoneError(f"{self.peer} closed the connection inside a probe")
            yield time.monotonic(), count
            size_bytes -= count

    def send_raw(self, data: Buffer) -> None:
        """Send bytes that belong to no frame (a bandwidth probe)."""
        self._wire.send([data], time.monotonic() + RAW_TIMEOUT_S)

    def _congestion_control(self) -> str:
        name = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES)
        return name.partition(b"\0")[0].decode(errors="replace")

    def _read_outline(self, start_s: float) -> Outline:
        """Return the fields of the head whose first unit has been read; read the rest of a longer one."""
        data = self._head
        outline = known_outline(bytes(data[:CHANGING_START]), bytes(data[FIXED_START:]), self.limits)
        while isinstance(outline, int):
            data = memoryview(bytearray(outline))
            data[:HEAD_UNIT] = self._head
            read_all(self._wire, data[HEAD_UNIT:], start_s + HEAD_TIMEOUT_S)
            outline = outline_of(data, self.limits)
        return outline

    def _skip(self, length: int, deadline_s: float) -> None:
        scratch = memoryview(bytearray(min(length, SKIP_BYTES)))
        while length:
            read_all(self._wire, scratch[: min(length, SKIP_BYTES)], deadline_s)
            length -= min(length, SKIP_BYTES)

    def _out_of_place(self, head: Head) -> AccessError:
        """Return the error for a frame of the key's handshake, on a side without a key, or after the handshake."""
        if head.kind is Kind.REFUSAL:
            return refused(self.peer, head.header)
        return AccessError(f"{self.peer} wants to prove a key, and we have none", Refusal.NO_KEY_HERE)


def _unacknowledged_bytes(sock: socket.socket) -> int:
    """Return the sent bytes that the peer's kernel has not acknowledged.

    Raises: OSError: the socket is closed, or the system does not report them.
    """
    try:
        answer = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
    except ValueError as exc:  # it has just been closed
        raise OSError(errno.EBADF, "the socket is closed") from exc
    return int.from_bytes(answer, sys.byteorder)


def body_deadline_s(length: int) -> float:
    """Return the monotonic time (s) by which ``length`` bytes must have been transferred."""
    return time.monotonic() + BODY_BASE_S + length / MIN_RATE_BYTES_PER_S
