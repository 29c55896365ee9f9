"""The only file that touches sockets: connections of whole messages, with deadlines and typed errors."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import select
import socket
import struct
import sys
import termios
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from neurosurgeon.net.access import OPEN, Access
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
    pack_frame,
    split_body,
    unpack_head,
    unpack_prefix,
)
from neurosurgeon.net.header import (
    TensorSpec,
    check_tensor_specs,
    flat_values,
    pack_header,
    pack_tensor,
    unpack_header,
    unpack_tensor,
)
from neurosurgeon.net.keys import Refusal, refused, tell_refusal
from neurosurgeon.net.memory import UNLIMITED, MemoryLimit
from neurosurgeon.net.messages import Hello, Message, Reply, figures_of, header_values, kind_of, message_of
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.net.tcp_info import PACED, SendState, acked_bytes, send_state
from neurosurgeon.net.wire import HEAD_TIMEOUT_S, Wire, read_all, read_head_unit
from neurosurgeon.utils.errors import (
    AccessError,
    AddressError,
    BusyError,
    ConnectError,
    DeadlineError,
    NeurosurgeonError,
    PeerGoneError,
    PortBusyError,
    ProtocolError,
    UsageError,
)
from neurosurgeon.utils.units import s_to_ms

if TYPE_CHECKING:  # the bandwidth monitor sends no tensors and starts without torch
    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 0.9  # a dead address is reported within a second; a live one answers within one RTT
ACCESS_TIMEOUT_S = 5.0  # TLS and key take four round trips together
# A body for which there is no memory is read away, in pieces; whoever claims a larger one is left: it may never come.
MAX_SKIPPED_BYTES, SKIP_BYTES = 16 * 1024 * 1024, 65_536
RAW_TIMEOUT_S = 2.0  # a bandwidth probe is bounded in time
BODY_BASE_S = 10.0  # a body gets this, and its length at the slowest rate that we serve
SILENCE_S = 4.0  # a cloud that says nothing for so long is gone: it is told of within 5 s
EDGE_SILENCE_S = 30.0  # an edge may lose its radio for a while, or answer behind a long queue of its own tensors
KEEPALIVE_INTERVAL_S = 1
DELIVERY_CHECK_S = 0.005
MIN_RATE_BYTES_PER_S = 50_000  # 0.4 Mbit/s; the slowest link of the field's tables is 3G with 1.1
TIMEVAL = struct.Struct("@ll")  # seconds, microseconds: what SO_RCVTIMEO takes
CHECK_S = 0.2  # how often a call that waits looks at its deadline
ACCEPT_PAUSE_S = 0.05  # out of file descriptors: others must close theirs first
BACKLOG = 1024  # a crowd of strangers leaves room for an edge; the system may allow less
TCP_INFO_BYTES, NAME_BYTES = 256, 16  # the kernel says less where it knows less
SO_MAX_PACING_RATE, UNPACED = 47, 0xFFFF_FFFF  # asm-generic/socket.h; the socket module has no name for it
OVERHEAD, FRAME_ROOM_BYTES = 2, 4096  # the kernel counts its own memory for packets, too
MAX_SEALED_BYTES = 65_536  # sealing more takes as long as waking a thread up that does
KEPT_HEADS = 64  # parsed ones; a cloud serves a few models and cuts at a time
MAX_PIECES = 64  # pieces for one sendmsg, far below the system's limit (IOV_MAX, 1024)


def pack_message(message: Message, tensors: Sequence[Tensor] = (), task: int = 0) -> list[Buffer]:
    """Return the pieces of the frame that carries a message, its tensors in their own memory."""
    packed = list(map(pack_tensor, tensors))
    header = pack_header(header_values(message), [spec for spec, _ in packed])
    return pack_frame(kind_of(message), header, [buffer for _, buffer in packed], task, figures_of(message))


class Outline(NamedTuple):
    """All that a head says but for its task and figures, checked."""

    head: Head
    message: Message | None = None  # None: a reply, whose fields are the figures, or a frame without a pickle
    specs: tuple[TensorSpec, ...] = ()  # of the tensors


def outline_of(data: Buffer, limits: Limits) -> Outline | int:
    """Return what a head says; where ``data`` ends before it does, its length.

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
    """Return `outline_of` for the parts of a head before and after its task and figures; nobody may change it.

    The heads of a stream of tasks differ in nothing else. To parse each of them takes a third of an exchange of 16 KB
    and a quarter of one of 150 KB (``python -m tests.benchmark.transport``).
    """
    return outline_of(start.ljust(FIXED_START, b"\0") + rest, limits)


class Received(NamedTuple):
    """A message and its tensors, which share the memory of its body."""

    message: Message
    tensors: list[Tensor]
    task: int  # the number of the request that it belongs to
    receive_ms: float  # from the first byte to the last
    specs: tuple[TensorSpec, ...] = ()  # of the tensors
    values: Sequence[NDArray[Any]] = ()  # of the tensors, flat (`net.header.flat_values`)
    refusal: BusyError | None = None  # there was no memory for the tensors: they were read, and are gone


class SocketWire:
    """A socket as it is; see `Wire`.

    The system interrupts a call that waits every `CHECK_S`, and its deadline is checked: deadlines are that much late.
    A timeout that is set for each call would cost one system call more, and `settimeout`, which holds for the threads
    of both directions, two: 5 % and more of an exchange of 16 KB (``python -m tests.benchmark.transport``).
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent_bytes = self.received_bytes = 0
        self.latest_s = math.inf  # no deadline is later: how long a peer may take to introduce itself
        self.silence_s = math.inf  # the longest pause between two reads
        try:
            self.peer = format_address(sock.getpeername())
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, TIMEVAL.pack(0, round(1e6 * CHECK_S)))
        except OSError as exc:
            sock.close()
            raise PeerGoneError("the peer left as soon as it had come") from exc
        self._incoming = select.poll()
        self._incoming.register(sock, select.POLLIN)

    def has_bytes(self, wait_s: float) -> bool:
        """Return whether there is something to read; see `Wire`."""
        return len(self._incoming.poll(s_to_ms(wait_s))) > 0

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read at least a byte; see `Wire`."""
        deadline_s = min(deadline_s, self.latest_s, time.monotonic() + self.silence_s)
        while time.monotonic() < deadline_s:
            try:
                count = self.sock.recv_into(view, 0, socket.MSG_WAITALL if fill else 0)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._lost(exc) from exc
            self.received_bytes += count
            return count
        raise DeadlineError(f"{self.peer} sent nothing, or not all of a message, in time")

    def send(self, pieces: Sequence[Buffer], deadline_s: float) -> None:
        """Send the pieces from their own memory; see `Wire`."""
        left_bytes = sum(map(len, pieces))
        while left_bytes:
            if time.monotonic() >= min(deadline_s, self.latest_s):
                raise DeadlineError(f"{self.peer} did not read our message in time")
            try:
                count = self.sock.sendmsg(pieces[:MAX_PIECES])
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._lost(exc) from exc
            self.sent_bytes += count
            left_bytes -= count
            if left_bytes:
                pieces = _behind(pieces, count)

    def _lost(self, exc: OSError) -> PeerGoneError:
        return PeerGoneError(f"connection to {self.peer} lost: {exc.strerror or exc}")


def _behind(pieces: Sequence[Buffer], count: int) -> list[memoryview]:
    """Return what is left of the pieces behind their first ``count`` bytes, fewer than all."""
    left = deque(memoryview(piece) for piece in pieces)
    while count >= len(left[0]):
        count -= len(left.popleft())
    left[0] = left[0][count:]
    return list(left)


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
        self._room_bytes = self._acked_bytes = 0  # of what is sent, when the system was last asked
        self.is_mid_frame = False  # a frame may be out in part: the peer would read the next one as its rest
        self.reading = 0  # the task whose message is being read, or was read last; 0 before its head is there
        self.peer = self._link.peer

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def sent_bytes(self) -> int:
        """How many bytes went out so far."""
        return self._link.sent_bytes

    @property
    def received_bytes(self) -> int:
        """How many bytes came in so far."""
        return self._link.received_bytes

    def close(self) -> None:
        """Close the socket; closing twice is fine."""
        self.sock.close()
        self._room_bytes = 0

    def stop_reading(self) -> None:
        """From another thread: let ``receive`` return what has arrived, then end; answers still go out."""
        with contextlib.suppress(OSError):  # already gone
            self.sock.shutdown(socket.SHUT_RD)

    def wait_until_delivered(self, wait_s: float) -> None:
        """Wait until the peer's machine has all that was sent: closing while it still sends would take it back."""
        deadline_s = time.monotonic() + wait_s
        with contextlib.suppress(OSError):  # already gone, or a system that does not tell
            while _unacknowledged_bytes(self.sock) and time.monotonic() < deadline_s:
                time.sleep(DELIVERY_CHECK_S)

    def break_off(self) -> None:
        """From another thread: end every ``receive`` and ``send`` at once, also one that waits."""
        with contextlib.suppress(OSError):  # already gone
            self.sock.shutdown(socket.SHUT_RDWR)

    def give_up_after(self, silence_s: float) -> None:
        """Let the kernel end the connection when the peer's machine has been silent for so long, idle or not.

        A peer whose kernel answers while its process hangs is not found out this way: see `SocketWire.silence_s`.
        """
        sock = self.sock
        with contextlib.suppress(OSError):  # already gone: the next call tells
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; elsewhere the system's own patience counts
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_INTERVAL_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(s_to_ms(silence_s)))

    # ---------------------------------------------------------------- before the first message

    def let_in(self, access: Access, latest_s: float) -> Hello:
        """As a cloud: return the peer's hello, once it has proved what ``access`` asks for, all by ``latest_s``.

        Raises: AccessError: it has not, and was told. NetworkError: it was too slow, or is a stranger.
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
        """As an edge: prove to ``host`` what it asks for, and let it do the same; give it up when it falls silent.

        Raises: AccessError: one does not accept the other. NetworkError.
        """
        self.give_up_after(SILENCE_S)
        self._link.silence_s = SILENCE_S
        self._wire = access.as_edge(self._link, host, time.monotonic() + ACCESS_TIMEOUT_S)

    # ---------------------------------------------------------------- messages

    def send(self, message: Message, tensors: Sequence[Tensor] = (), task: int = 0, within_s: float = math.inf) -> None:
        """Send a message and its tensors, these from their own memory.

        After any error, `is_mid_frame` says whether the connection is still of use.

        Args:   within_s: less than what a body of this size may take.
        Raises: PeerGoneError, DeadlineError: the peer does not read.
        """
        pieces = pack_message(message, tensors, task)
        deadline_s = min(body_deadline_s(sum(map(len, pieces))), time.monotonic() + within_s)
        self.is_mid_frame = True
        self._wire.send(pieces, deadline_s)
        self.is_mid_frame = False

    def takes_at_once(self, size_bytes: int) -> bool:
        """Return whether `send` would neither wait for the peer nor seal long: the system has room for so much."""
        if self._wire is not self._link and size_bytes > MAX_SEALED_BYTES:
            return False
        if self._has_room(size_bytes):
            return True
        try:
            self._acked_bytes = self.sent_bytes - _unacknowledged_bytes(self.sock)
            self._room_bytes = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)  # it grows with use
        except OSError:  # already gone, or a system that does not tell
            return False
        return self._has_room(size_bytes)

    def _has_room(self, size_bytes: int) -> bool:
        """Return whether there was room when the system was last asked; there may be more by now."""
        unacknowledged_bytes = self.sent_bytes - self._acked_bytes
        return OVERHEAD * (size_bytes + FRAME_ROOM_BYTES + unacknowledged_bytes) <= self._room_bytes

    def has_message(self, wait_s: float) -> bool:
        """Return whether a message, or the end, has begun to come, waiting at most ``wait_s``; for who receives."""
        return self._wire.has_bytes(wait_s)

    def receive(self, wait_s: float) -> Received:
        """Return the next message, waiting at most ``wait_s`` for its first byte.

        The header is checked in full before memory is set aside for the body.

        Raises: PeerGoneError: closed between messages, inside one, or reset.
                DeadlineError: nothing came, or the message did not end in time.
                ProtocolError: the peer broke the protocol.
                BusyError: there is no memory for a large body; where it is smaller, what is returned says so.
                AccessError: the peer does not let us in.
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
            return Received(message, [], task, s_to_ms(time.monotonic() - start_s))
        length = head.body_length
        deadline_s = body_deadline_s(length)
        try:
            memory = self._memory.allocate(self, length)
        except BusyError as exc:
            if length > MAX_SKIPPED_BYTES:
                raise
            self._skip(length, deadline_s)
            return Received(message, [], task, s_to_ms(time.monotonic() - start_s), refusal=exc)
        read_all(self._wire, memory, deadline_s)
        buffers = split_body(memory, head.lengths)
        tensors = list(map(unpack_tensor, specs, buffers))
        values = list(map(flat_values, specs, buffers))
        return Received(message, tensors, task, s_to_ms(time.monotonic() - start_s), specs, values)

    def send_state(self) -> SendState | None:
        """Return what may be sent before the peer is heard from; None where the system does not tell."""
        try:
            data = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            state = send_state(data, self._congestion_control())
        except (OSError, AttributeError):  # the connection is lost, or this is not Linux
            return None
        return state._replace(is_encrypted=self._wire is not self._link) if state else None

    def acked_bytes(self) -> int | None:
        """Return how many bytes the peer's machine has acknowledged so far; None where the system does not tell."""
        try:
            return acked_bytes(self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES))
        except (OSError, AttributeError):  # the connection is lost, or this is not Linux
            return None

    def segment_bytes(self) -> int:
        """Return how many bytes of payload a packet carries."""
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)

    def send_at_most(self, rate_bytes_per_s: float) -> None:
        """Pace packets at no more than this; infinity ends it. One whose congestion control paces none sends as before.

        Asked to pace such a one, the kernel would go on when no limit is left, and spread small tensors over a round
        trip.
        """
        with contextlib.suppress(OSError, AttributeError):  # already gone, or this is not Linux
            if self._congestion_control() in PACED:
                rate = int(min(rate_bytes_per_s, UNPACED))
                self.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("@I", rate))

    def send_windows_at_once(self) -> None:
        """Take a congestion control that does not pace: bbr would spread a probe over the round trip."""
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        except (OSError, AttributeError):  # not this system, or not allowed: the default is used
            log.debug("congestion control of the probe stays the system's")

    def receive_raw(self, size_bytes: int, scratch: memoryview) -> Iterable[tuple[float, int]]:
        """Read ``size_bytes`` bytes that belong to no frame; yield time (s, monotonic) and size of every read."""
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
        """Return what the head says whose first unit has been read; read the rest of a longer one."""
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
        """Return what a frame of the key's handshake means to a side that has no key, or is through with it."""
        if head.kind is Kind.REFUSAL:
            return refused(self.peer, head.header)
        return AccessError(f"{self.peer} wants to prove a key, and we have none", Refusal.NO_KEY_HERE)


def _unacknowledged_bytes(sock: socket.socket) -> int:
    """Return how much of what was sent the peer's machine has not confirmed.

    Raises: OSError: the socket is closed, or the system does not tell.
    """
    try:
        answer = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
    except ValueError as exc:  # it has just been closed
        raise OSError(errno.EBADF, "the socket is closed") from exc
    return int.from_bytes(answer, sys.byteorder)


def body_deadline_s(length: int) -> float:
    """Return the monotonic time (s) by which ``length`` bytes must have crossed."""
    return time.monotonic() + BODY_BASE_S + length / MIN_RATE_BYTES_PER_S


def connect(host: str, port: int, limits: Limits = DEFAULT_LIMITS, access: Access = OPEN) -> Connection:
    """Return a connection to the first address of ``host`` that answers, once each side has let the other in.

    Raises: UsageError: the address makes no sense. ConnectError: nobody answers there. AccessError: not let in.
    """
    sock = _connected(host, port)
    connection = Connection(sock, limits)
    try:
        connection.ask_in(access, host)
    except BaseException:
        connection.close()
        raise
    return connection


def _connected(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), CONNECT_TIMEOUT_S)
    except (socket.gaierror, UnicodeError) as exc:
        raise _unresolved(host) from exc
    except OSError as exc:
        reason = "no answer" if isinstance(exc, TimeoutError) else exc.strerror or str(exc)
        raise ConnectError(f"no service at {format_address((host, port))} ({reason}): is it started there?") from exc


def is_this_machine(host: str) -> bool:
    """Return whether the address of ``host`` is one of this machine's own: nothing is sent to find out."""
    with contextlib.suppress(OSError, UnicodeError):  # no such name, or no way there
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind(address)  # only to one's own
            return True
    return False


def reach(host: str, port: int) -> float:
    """Return how long a bare connection takes to be made, ms.

    Raises: UsageError: the address makes no sense. ConnectError: nobody answers there.
    """
    start_s = time.monotonic()
    with _connected(host, port):
        return s_to_ms(time.monotonic() - start_s)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name.

    Raises: UsageError: it has none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise _unresolved(host) from exc
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _unresolved(host: str) -> AddressError:
    return AddressError(f"address {host!r} cannot be resolved: pass an IP address or a known host name")


def accepted(listener: socket.socket) -> Iterator[tuple[socket.socket, Any]]:
    """Yield connections and their addresses until `stop_accepting`; a failed accept is logged, not fatal."""
    while True:
        try:
            yield listener.accept()
        except OSError as exc:
            if listener.fileno() < 0 or exc.errno == errno.EINVAL:  # closed, or shut down
                return
            log.warning("a connection could not be accepted: %s", exc.strerror or exc)
            time.sleep(ACCEPT_PAUSE_S)


def stop_accepting(listener: socket.socket) -> None:
    """Close a listening socket and wake the thread that waits in it; twice is fine."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # close alone does not wake a waiting accept on Linux
    listener.close()


def bind(host: str, port: int, access: Access = OPEN) -> socket.socket:
    """Return a socket that holds an address but does not listen yet; port 0 takes a free one.

    SO_REUSEADDR lets a server restart at once; SO_REUSEPORT, which would let two servers share a port unnoticed,
    is never set.

    Raises: UsageError: not an address of this machine, or ``access`` does not keep strangers out there.
            PortBusyError: the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as exc:
        raise _unresolved(host) from exc
    access.check_exposure(str(address[0]))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as exc:
        sock.close()
        raise _unusable(host, port, exc) from exc
    return sock


def ephemeral_port(host: str) -> int:
    """Return a port that is free now, for a program that cannot choose one itself."""
    with bind(host, 0) as sock:
        port: int = sock.getsockname()[1]
    return port


def start_listening(sock: socket.socket) -> None:
    """Let a bound socket take connections.

    Raises: PortBusyError: another process was faster.
    """
    try:
        sock.listen(BACKLOG)
    except OSError as exc:
        host, port = sock.getsockname()[:2]
        raise _unusable(host, port, exc) from exc


def listen(host: str, port: int, access: Access = OPEN) -> socket.socket:
    """Return a listening socket; see `bind` and `start_listening`."""
    sock = bind(host, port, access)
    try:
        start_listening(sock)
    except PortBusyError:
        sock.close()
        raise
    return sock


def _unusable(host: str, port: int, exc: OSError) -> NeurosurgeonError:
    if exc.errno == errno.EADDRINUSE:
        return PortBusyError(f"port {port} on {host} is busy: stop what listens there, or choose another port")
    if isinstance(exc, PermissionError):
        return UsageError(f"port {port} needs more rights than this user has: choose one above 1023")
    return UsageError(f"cannot listen on {host}: {exc.strerror or exc}")
