"""The only file that touches sockets: connections of whole frames, with deadlines and typed errors."""

from __future__ import annotations

import mmap
import select
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from net.framing import (
    DEFAULT_LIMITS,
    PREFIX,
    Buffer,
    Head,
    Kind,
    Limits,
    pack_frame,
    split_body,
    unpack_head,
    unpack_prefix,
)
from net.net_utils import format_address
from net.pickling import check_tensor_specs, pack_header, unpack_header
from utils.errors import ConnectError, DeadlineError, PeerGoneError, PortBusyError, UsageError
from utils.units import s_to_ms

CONNECT_TIMEOUT_S = 0.9  # a dead address is reported within a second; a live one answers within one RTT
HEAD_TIMEOUT_S = 5.0  # first byte to last byte of a head, at most 64 KiB
BODY_BASE_S = 10.0  # a body gets this, and its length at the slowest rate that we serve
MIN_RATE_BYTES_PER_S = 50_000  # 0.4 Mbit/s; the slowest link of the field's tables is 3G with 1.1
BACKLOG = 64
MAX_PIECES = 64  # pieces for one sendmsg, far below the system's limit (IOV_MAX, 1024)


@dataclass(frozen=True, slots=True)
class Frame:
    """A received frame. The buffers are views of the connection's memory, valid until its next ``receive``."""

    kind: Kind
    header: dict[str, Any]
    buffers: list[memoryview]
    receive_ms: float  # from the first byte to the last


class Connection:
    """Whole frames over one TCP connection; after an error the connection is of no more use."""

    def __init__(self, sock: socket.socket, limits: Limits = DEFAULT_LIMITS) -> None:
        self.sock = sock
        self.limits = limits
        self.sent_bytes = 0
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = format_address(sock.getpeername())

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; closing twice is fine."""
        self.sock.close()

    def shutdown(self) -> None:
        """End the conversation from another thread: a waiting ``receive`` returns at once with an error."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already gone

    def send(self, kind: Kind, header: Mapping[str, Any], buffers: Iterable[Buffer] = ()) -> None:
        """Send one frame; buffers go out from their own memory.

        Raises: PeerGoneError, DeadlineError: the peer does not read.
        """
        pieces = pack_frame(kind, pack_header(header), list(buffers))
        length = sum(len(piece) for piece in pieces)
        self._send_pieces(pieces, body_deadline(length))
        self.sent_bytes += length

    def receive(self, wait_s: float) -> Frame:
        """Return the next frame, waiting at most ``wait_s`` for its first byte.

        Raises: PeerGoneError: closed between frames, inside one, or reset.
                DeadlineError: nothing came, or the frame did not end in time.
                ProtocolError: the peer broke the protocol.
        """
        prefix_data = bytearray(PREFIX.size)
        self.wait(wait_s)
        start_s = time.monotonic()
        self._read(memoryview(prefix_data), start_s + HEAD_TIMEOUT_S, at_boundary=True)
        prefix = unpack_prefix(prefix_data, self.limits)
        head_data = bytearray(prefix.head_length)
        self._read(memoryview(head_data), start_s + HEAD_TIMEOUT_S)
        head = unpack_head(prefix, head_data, self.limits)
        header = unpack_header(head.header)
        if head.lengths:
            check_tensor_specs(header.get("tensors"), head.lengths)
        buffers = self._receive_body(head)
        return Frame(head.kind, header, buffers, s_to_ms(time.monotonic() - start_s))

    def wait(self, wait_s: float) -> None:
        """Wait at most ``wait_s`` for the first byte of a frame, or for the end of the connection.

        Raises: DeadlineError: nothing came. PeerGoneError: the connection is closed on this side.
        """
        poller = select.poll()
        try:
            poller.register(self.sock, select.POLLIN)
        except ValueError as exc:
            raise PeerGoneError("the connection is closed") from exc
        if not poller.poll(s_to_ms(wait_s)):
            raise DeadlineError(f"{self.peer} sent nothing for {wait_s:g} s")

    def receive_raw(self, size_bytes: int, scratch: memoryview) -> Iterable[tuple[float, int]]:
        """Read ``size_bytes`` bytes that belong to no frame; yield time (s, monotonic) and size of every read."""
        deadline_s = body_deadline(size_bytes)
        while size_bytes:
            count = self._read_some(scratch[:size_bytes], deadline_s)
            if not count:
                raise PeerGoneError(f"{self.peer} closed the connection inside a probe")
            yield time.monotonic(), count
            size_bytes -= count

    def send_raw(self, data: Buffer) -> None:
        """Send bytes that belong to no frame (a bandwidth probe)."""
        self._send_pieces([data], body_deadline(len(data)))
        self.sent_bytes += len(data)

    def _receive_body(self, head: Head) -> list[memoryview]:
        length = head.body_length
        if length > len(self._memory):
            self._memory = mmap.mmap(-1, length)  # page-aligned; reused, so its pages are touched for the first time once
        body = memoryview(self._memory)[:length]
        self._read(body, body_deadline(length))
        return split_body(body, head.lengths)

    def _read(self, view: memoryview, deadline_s: float, *, at_boundary: bool = False) -> None:
        length = len(view)
        while view:
            count = self._read_some(view, deadline_s)
            if not count:
                where = "the connection" if at_boundary and len(view) == length else "the connection inside a frame"
                raise PeerGoneError(f"{self.peer} closed {where}")
            view = view[count:]

    def _read_some(self, view: memoryview, deadline_s: float) -> int:
        try:
            self._set_deadline(deadline_s)
            return self.sock.recv_into(view)
        except TimeoutError as exc:
            raise DeadlineError(f"{self.peer} did not finish its message in time") from exc
        except OSError as exc:
            raise PeerGoneError(f"connection to {self.peer} lost: {exc.strerror or exc}") from exc

    def _send_pieces(self, pieces: list[Buffer], deadline_s: float) -> None:
        views = [memoryview(piece) for piece in pieces]
        try:
            while views:
                self._set_deadline(deadline_s)
                count = self.sock.sendmsg(views[:MAX_PIECES])
                while views and count >= len(views[0]):
                    count -= len(views.pop(0))
                if count:
                    views[0] = views[0][count:]
        except TimeoutError as exc:
            raise DeadlineError(f"{self.peer} did not read our message in time") from exc
        except OSError as exc:
            raise PeerGoneError(f"connection to {self.peer} lost: {exc.strerror or exc}") from exc

    def _set_deadline(self, deadline_s: float) -> None:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        self.sock.settimeout(remaining_s)


def body_deadline(length: int) -> float:
    """Return the monotonic time (s) by which ``length`` bytes must have crossed."""
    return time.monotonic() + BODY_BASE_S + length / MIN_RATE_BYTES_PER_S


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return family and socket address of a host name or IP address.

    Raises: UsageError: it cannot be resolved.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"address {host!r} cannot be resolved: pass an IP address or a known host name") from exc
    return family, address


def connect(host: str, port: int, limits: Limits = DEFAULT_LIMITS) -> Connection:
    """Return a connection.

    Raises: UsageError: the address makes no sense. ConnectError: nobody answers there.
    """
    family, address = resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(CONNECT_TIMEOUT_S)
    try:
        sock.connect(address)
    except OSError as exc:
        sock.close()
        reason = "no answer" if isinstance(exc, TimeoutError) else exc.strerror or str(exc)
        raise ConnectError(f"no service at {format_address(address)} ({reason}): is it started there?") from exc
    return Connection(sock, limits)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    SO_REUSEADDR lets a server restart at once; SO_REUSEPORT, which would let two servers share a port unnoticed,
    is never set.

    Raises: UsageError: not an address of this machine. PortBusyError: the port is taken.
    """
    family, address = resolve(host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
    except PermissionError as exc:
        sock.close()
        raise UsageError(f"port {port} needs more rights than this user has: choose one above 1023") from exc
    except OSError as exc:
        sock.close()
        if exc.errno == 98 or "in use" in str(exc):
            raise PortBusyError(f"port {port} on {host} is busy: stop what listens there, or choose another -p") from exc
        raise UsageError(f"cannot listen on {host}: {exc.strerror or exc}") from exc
    return sock

