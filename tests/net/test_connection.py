"""Connections over real sockets: whole messages from bytes in any pieces, limits, deadlines and typed errors."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from neurosurgeon.graph.spec import Array, channels_last
from neurosurgeon.net import connection, wire
from neurosurgeon.net.connection import Connection, pack_message
from neurosurgeon.net.frames import FIXED_START, HEAD_UNIT, PREFIX, SMALL_LIMITS, WIRE_VERSION, Kind, Limits, pack_frame
from neurosurgeon.net.header import pack_header
from neurosurgeon.net.memory import MemoryLimit
from neurosurgeon.net.messages import Hello, Message, Ping, Prepare, Reply, Request
from neurosurgeon.net.wire import SocketWire
from neurosurgeon.utils.errors import AccessError, BusyError, DeadlineError, PeerGoneError, ProtocolError

Wires = tuple[socket.socket, socket.socket]
Pair = tuple[Connection, Connection]

WAIT_S = 5.0  # far longer than loopback takes
NOW_S = 0.02  # a deadline that a test waits for
REQUEST = Request("le_net", b"\7", "89abcdef", "0123abcd")
ARRAYS: list[Array] = [
    np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4),
    channels_last(np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)),
    np.array(True),
    np.empty((0, 3), np.int64),
    np.arange(5, dtype=np.uint8),
]


class TrickleSocket(socket.socket):
    """A socket that moves one byte at a time, as a very slow link may."""

    reads = 0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.reads += 1
        return super().recv_into(buffer[:1], 0, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(data[:1])

    def sendmsg(self, buffers: Any, *args: Any) -> int:
        return super().send(buffers[0][:1])


def read_bytes(sock: socket.socket, count: int) -> None:
    """Read so many bytes away."""
    while count:
        count -= len(sock.recv(min(count, 1_000_000)))


def trickling(sock: socket.socket) -> TrickleSocket:
    """Return the same connection as a socket that moves byte after byte."""
    return TrickleSocket(fileno=sock.detach())


def frame_of(message: Message, arrays: list[Array]) -> bytes:
    """Return the bytes of a message."""
    return b"".join(pack_message(message, arrays))


def assert_received(connection: Connection, message: Message, arrays: list[Array]) -> None:
    """Receive one message, and compare it with what was sent."""
    received = connection.receive(WAIT_S)
    assert received.message == message
    assert [array.dtype for array in received.arrays] == [array.dtype for array in arrays]
    assert len(received.arrays) == len(arrays) and all(map(np.array_equal, received.arrays, arrays))


def send_in_background(connection: Connection, message: Message, arrays: list[Array]) -> threading.Thread:
    """Send what no socket buffer can hold."""
    thread = threading.Thread(target=connection.send, args=(message, arrays), daemon=True)
    thread.start()
    return thread


def reset(sock: socket.socket) -> None:
    """End a connection as a crashed peer does: reset, not closed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# ---------------------------------------------------------------- messages arrive


def test_a_message_arrives_with_all_its_arrays(pair: Pair) -> None:
    pair[0].send(REQUEST, ARRAYS)
    assert_received(pair[1], REQUEST, ARRAYS)


def test_many_messages_follow_on_one_connection(pair: Pair) -> None:
    for number in range(100):
        arrays = [np.full(number, number)] if number % 2 else []
        pair[0].send(Prepare("le_net", bytes([number]), "89abcdef"), arrays)
        assert_received(pair[1], Prepare("le_net", bytes([number]), "89abcdef"), arrays)


def test_messages_that_wait_in_the_socket_are_read_one_by_one(pair: Pair) -> None:
    for number in range(10):
        pair[0].send(Ping(number), [np.array(number)])
    for number in range(10):
        assert_received(pair[1], Ping(number), [np.array(number)])


def test_both_sides_can_talk(pair: Pair) -> None:
    pair[0].send(REQUEST, ARRAYS)
    pair[1].send(Hello.of(device="cpu"))
    assert_received(pair[0], Hello.of(device="cpu"), [])
    assert_received(pair[1], REQUEST, ARRAYS)


@pytest.mark.parametrize("count", [64_000, 1_000_003])
def test_a_large_array_arrives(pair: Pair, count: int) -> None:
    arrays: list[Array] = [np.arange(count, dtype=np.int32), np.ones(3)]
    sender = send_in_background(pair[0], REQUEST, arrays)
    assert_received(pair[1], REQUEST, arrays)
    sender.join()


def test_a_frame_of_more_pieces_than_one_call_may_take_arrives(pair: Pair) -> None:
    arrays = [np.array([number], np.int16) for number in range(64)]  # 129 pieces
    pair[0].send(REQUEST, arrays)
    assert_received(pair[1], REQUEST, arrays)


def test_a_head_longer_than_one_read_arrives(pair: Pair) -> None:
    hello = Hello.of(comment="x" * 3 * HEAD_UNIT)
    pair[0].send(hello, ARRAYS)
    assert_received(pair[1], hello, ARRAYS)


def test_sent_bytes_are_counted(pair: Pair) -> None:
    pair[0].send(REQUEST, ARRAYS)
    assert pair[0].sent_bytes == len(frame_of(REQUEST, ARRAYS))


# ---------------------------------------------------------------- however the bytes arrive


@pytest.mark.parametrize("arrays", [[], ARRAYS], ids=["without arrays", "with arrays"])
def test_a_frame_read_byte_by_byte_is_the_same_frame(wires: Wires, arrays: list[Array]) -> None:
    frame = frame_of(REQUEST, arrays)
    wires[0].sendall(frame)
    with trickling(wires[1]) as sock:
        assert_received(Connection(sock), REQUEST, arrays)
        assert sock.reads == len(frame)


def test_a_frame_written_byte_by_byte_is_the_same_frame(wires: Wires) -> None:
    with trickling(wires[0]) as sock:
        Connection(sock).send(REQUEST, ARRAYS)
    assert_received(Connection(wires[1]), REQUEST, ARRAYS)


def test_bytes_of_the_next_frame_are_left_to_it(wires: Wires) -> None:
    first, second = frame_of(REQUEST, ARRAYS), frame_of(Ping(2), [])
    receiver = Connection(wires[1])
    wires[0].sendall(first + second[:100])
    assert_received(receiver, REQUEST, ARRAYS)
    wires[0].sendall(second[100:])
    assert_received(receiver, Ping(2), [])


def test_a_raw_probe_ends_where_it_was_announced(wires: Wires) -> None:
    sender, receiver = Connection(wires[0]), Connection(wires[1])
    sender.send_raw(bytes(1000))
    sender.send(Ping(1))
    scratch = memoryview(bytearray(300))
    assert sum(count for _, count in receiver.receive_raw(1000, scratch)) == 1000
    assert_received(receiver, Ping(1), [])


def test_the_figures_of_a_reply_travel_outside_its_header(pair: Pair) -> None:
    for reply in (Reply(1.5, 1.0, 0.25, 0.125, 3.0, 2.0), Reply(0.5, 0.0, 0.0, 0.0, 0.0, 0.0)):
        pair[0].send(reply, ARRAYS, task=7)
        assert_received(pair[1], reply, ARRAYS)


# ---------------------------------------------------------------- memory


def test_a_body_without_memory_for_it_is_skipped(wires: Wires) -> None:
    sender, receiver = Connection(wires[0]), Connection(wires[1], memory=MemoryLimit(8192, 8192))
    held = []
    for _ in range(2):
        sender.send(REQUEST, [np.ones(1024, np.float32)])
        held.append(receiver.receive(WAIT_S))
    for number in range(2):
        sender.send(REQUEST, [np.ones(1024, np.float32)], number)
        received = receiver.receive(WAIT_S)
        assert (received.message, received.arrays, received.task) == (REQUEST, (), number)
        assert isinstance(received.refusal, BusyError)
    held.clear()
    sender.send(REQUEST, [np.ones(1024, np.float32)])
    assert_received(receiver, REQUEST, [np.ones(1024, np.float32)])


def test_a_large_body_without_memory_for_it_is_an_error(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_SKIPPED_BYTES", 4_000)
    sender, receiver = Connection(wires[0]), Connection(wires[1], memory=MemoryLimit(4096, 4096))
    sender.send(REQUEST, [np.ones(1024, np.float32)])
    held = receiver.receive(WAIT_S)
    sender.send(REQUEST, [np.ones(1024, np.float32)])
    with pytest.raises(BusyError):
        receiver.receive(WAIT_S)
    assert held.arrays


def test_messages_keep_their_arrays(pair: Pair) -> None:
    sent = [np.full(100, float(number)) for number in range(10)]
    held = []
    for array in sent:
        pair[0].send(REQUEST, [array])
        held.append(pair[1].receive(WAIT_S))
    assert all(np.array_equal(received.arrays[0], array) for received, array in zip(held, sent, strict=True))


def test_break_off_from_another_thread_ends_a_send_that_waits(pair: Pair) -> None:
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(pair[0].send, REQUEST, [np.zeros(32_000_000, np.uint8)])
        pair[0].break_off()
        with pytest.raises(PeerGoneError):
            sending.result(WAIT_S)


def test_a_larger_body_gets_new_memory_and_leaves_older_arrays_alone(pair: Pair) -> None:
    small, large = np.ones(10), np.zeros(10_000)
    pair[0].send(REQUEST, [small])
    held = pair[1].receive(WAIT_S).arrays[0]
    pair[0].send(REQUEST, [large])
    assert_received(pair[1], REQUEST, [large])
    assert np.array_equal(held, small)


def test_received_arrays_start_on_a_cache_line(pair: Pair) -> None:
    pair[0].send(REQUEST, [np.ones(1, np.float32), np.ones(17, np.float32), np.ones(3, np.uint8)])
    assert [array.ctypes.data % 64 for array in pair[1].receive(WAIT_S).arrays] == [0, 0, 0]


# ---------------------------------------------------------------- the peer goes


def test_an_end_between_messages_is_a_closed_connection(wires: Wires) -> None:
    receiver = Connection(wires[1])
    wires[0].sendall(frame_of(REQUEST, ARRAYS))
    wires[0].close()
    assert_received(receiver, REQUEST, ARRAYS)
    with pytest.raises(PeerGoneError, match="closed the connection$"):
        receiver.receive(WAIT_S)


@pytest.mark.parametrize("sent", [1, 15, 16, HEAD_UNIT - 1, HEAD_UNIT, HEAD_UNIT + 1, -1])
def test_the_end_inside_a_message_says_so(wires: Wires, sent: int) -> None:
    wires[0].sendall(frame_of(REQUEST, ARRAYS)[:sent])
    wires[0].close()
    with pytest.raises(PeerGoneError, match="closed the connection inside a message$"):
        Connection(wires[1]).receive(WAIT_S)


def test_an_end_inside_a_long_head_is_named(wires: Wires) -> None:
    wires[0].sendall(frame_of(Hello.of(comment="x" * 1000), [])[: HEAD_UNIT + 1])
    wires[0].close()
    with pytest.raises(PeerGoneError, match="inside a message$"):
        Connection(wires[1]).receive(WAIT_S)


def test_an_end_inside_a_probe_is_named(wires: Wires) -> None:
    wires[0].sendall(bytes(10))
    wires[0].close()
    with pytest.raises(PeerGoneError, match="inside a probe$"):
        list(Connection(wires[1]).receive_raw(11, memoryview(bytearray(64))))


def test_a_reset_is_a_lost_connection(wires: Wires) -> None:
    receiver = Connection(wires[1])
    reset(wires[0])
    with pytest.raises(PeerGoneError, match="lost"):
        receiver.receive(WAIT_S)


def test_sending_to_a_closed_peer_is_a_lost_connection(wires: Wires) -> None:
    sender = Connection(wires[1])
    reset(wires[0])
    with pytest.raises(PeerGoneError, match="lost"):
        sender.send(REQUEST, ARRAYS)


def test_stop_reading_from_another_thread_ends_a_waiting_receive(pair: Pair) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pair[1].receive, 60.0)
        pair[1].stop_reading()
        with pytest.raises(PeerGoneError):
            waiting.result(WAIT_S)


def test_stop_reading_returns_what_has_arrived_and_lets_answers_out(pair: Pair) -> None:
    pair[0].send(REQUEST, ARRAYS)
    pair[1].stop_reading()
    assert_received(pair[1], REQUEST, ARRAYS)
    pair[1].send(Ping(1), ARRAYS)
    assert_received(pair[0], Ping(1), ARRAYS)
    with pytest.raises(PeerGoneError):
        pair[1].receive(WAIT_S)


def test_a_second_close_does_nothing(pair: Pair) -> None:
    for _ in range(2):
        pair[0].close()
        pair[0].stop_reading()
    with pytest.raises(PeerGoneError):
        pair[0].receive(WAIT_S)


# ---------------------------------------------------------------- limits, before memory is set aside


@pytest.fixture
def no_body_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which memory is set aside for a body."""
    monkeypatch.setattr(MemoryLimit, "allocate", lambda *arguments: pytest.fail(f"set aside: {arguments}"))


def head_of(specs: Any, *lengths: int, values: Any = tuple(REQUEST)) -> bytes:
    """Return the head of a request that claims buffers of these lengths."""
    header = pack_header(values, specs)
    head = PREFIX.pack(b"NSGN", WIRE_VERSION, Kind.REQUEST, len(lengths), len(header), 0).ljust(FIXED_START, b"\0")
    return (head + struct.pack(f"!{len(lengths)}Q", *lengths) + header).ljust(HEAD_UNIT, b"\0")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"GET / HTTP/1.1\r\n".ljust(HEAD_UNIT), "not our protocol"),
        (pickle.dumps(bytes(HEAD_UNIT)), "not our protocol"),
        (PREFIX.pack(b"NSGN", 99, 1, 0, 0, 0).ljust(HEAD_UNIT), "wire version 99"),
        (PREFIX.pack(b"NSGN", WIRE_VERSION, 99, 0, 0, 0).ljust(HEAD_UNIT), "unknown kind"),
        (PREFIX.pack(b"NSGN", WIRE_VERSION, 4, 0, 2**32 - 1, 0).ljust(HEAD_UNIT), "header of"),
        (PREFIX.pack(b"NSGN", WIRE_VERSION, 4, 2**16 - 1, 0, 0).ljust(HEAD_UNIT), "65535 buffers"),
        (head_of([("uint8", (2**39,), False)], 2**39), "body of"),
        (head_of([("uint8", (2,), False)], 1), "does not fill"),
        (head_of([], 1), "one description each"),
        (head_of([], values=("task",)), "fields of Request"),
        (pack_frame(Kind.HELLO, b"\x80\x05NR.")[0], "not allowed"),
        (pack_frame(Kind.HELLO, b"\x80\x05N\x85.")[0], "1 parts"),
    ],
)
@pytest.mark.usefixtures("no_body_memory")
def test_a_bad_head_is_refused_before_allocation(wires: Wires, head: bytes, reason: str) -> None:
    wires[0].sendall(head)
    with pytest.raises(ProtocolError, match=reason):
        Connection(wires[1]).receive(WAIT_S)


@pytest.mark.parametrize("length", [32, 4000])
def test_a_handshake_without_our_key_is_refused(wires: Wires, length: int) -> None:
    wires[0].sendall(pack_frame(Kind.KEY_PROOF, bytes(length))[0])
    with pytest.raises(AccessError, match="wants to prove a key"):
        Connection(wires[1]).receive(WAIT_S)


@pytest.mark.usefixtures("no_body_memory")
def test_a_peer_that_has_not_said_hello_brings_no_arrays(pair: Pair) -> None:
    pair[1].limits = SMALL_LIMITS
    pair[0].send(REQUEST, [np.ones(1, np.float32)])
    with pytest.raises(ProtocolError, match="1 buffers: expected at most 0"):
        pair[1].receive(WAIT_S)


def test_limits_can_be_raised_on_a_running_connection(pair: Pair) -> None:
    pair[1].limits = SMALL_LIMITS
    pair[0].send(Ping(1))
    assert_received(pair[1], Ping(1), [])
    pair[1].limits = Limits()
    pair[0].send(REQUEST, ARRAYS)
    assert_received(pair[1], REQUEST, ARRAYS)


# ---------------------------------------------------------------- deadlines


def test_a_silent_peer_meets_the_deadline(pair: Pair) -> None:
    with pytest.raises(DeadlineError):
        pair[1].receive(NOW_S)


def test_a_longer_timeout_replaces_a_shorter_one(wires: Wires) -> None:
    near, far = SocketWire(wires[0]), memoryview(bytearray(1))
    with pytest.raises(DeadlineError):
        near.read_some(far, time.monotonic() + NOW_S)
    sending = threading.Timer(3 * NOW_S, wires[1].sendall, [b"x"])
    sending.start()
    assert near.read_some(far, time.monotonic() + WAIT_S) == 1
    sending.join()
    data = [bytes(32_000_000)]  # more than the system takes
    with pytest.raises(DeadlineError):
        near.send(data, time.monotonic() + NOW_S)
    reading = threading.Timer(3 * NOW_S, read_bytes, [wires[1], near.sent_bytes + len(data[0])])
    reading.start()
    near.send(data, time.monotonic() + WAIT_S)
    reading.join()


def test_a_head_that_does_not_end_meets_the_deadline(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_TIMEOUT_S", NOW_S)
    wires[0].sendall(frame_of(REQUEST, [])[:100])
    with pytest.raises(DeadlineError):
        Connection(wires[1]).receive(WAIT_S)


def test_a_body_that_does_not_end_meets_the_deadline(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_BASE_S", NOW_S)
    wires[0].sendall(frame_of(REQUEST, ARRAYS)[:-1])
    with pytest.raises(DeadlineError):
        Connection(wires[1]).receive(WAIT_S)


@pytest.mark.parametrize("arrays", [[], ARRAYS], ids=["head", "body"])
def test_a_peer_that_trickles_does_not_push_its_deadline_away(
    wires: Wires, monkeypatch: pytest.MonkeyPatch, arrays: list[Array]
) -> None:
    seconds = iter(range(10_000))  # a clock that shows a second more at every look
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(connection, "time", clock)
    monkeypatch.setattr(wire, "time", clock)
    monkeypatch.setattr(wire, "HEAD_TIMEOUT_S", 5.0 if not arrays else 1e6)
    wires[0].sendall(frame_of(REQUEST, arrays))
    with trickling(wires[1]) as sock:
        receiver = Connection(sock)
        with pytest.raises(DeadlineError):
            receiver.receive(WAIT_S)


def test_a_peer_that_does_not_read_meets_the_deadline(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_BASE_S", NOW_S)
    monkeypatch.setattr(connection, "MIN_RATE_BYTES_PER_S", 1e12)
    with pytest.raises(DeadlineError, match="send to .* timed out"):
        pair[0].send(REQUEST, [np.zeros(32_000_000, np.uint8)])


def test_a_long_body_has_the_deadline_of_the_slowest_link() -> None:
    difference_s = connection.body_deadline_s(10 * connection.MIN_RATE_BYTES_PER_S) - connection.body_deadline_s(0)
    assert difference_s == pytest.approx(10.0, abs=1.0)
