"""Sessions on the edge's side: results equal the unsplit network, and impossible replies are refused."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from neurosurgeon.net import session
from neurosurgeon.net.connection import SO_MAX_PACING_RATE, UNPACED, Connection
from neurosurgeon.net.frames import HEAD_UNIT
from neurosurgeon.net.messages import ErrorReply, Hello, Message, Pong, Ready, Reply
from neurosurgeon.net.session import EdgeSession, stage_times
from neurosurgeon.net.tcp_info import SendState
from neurosurgeon.utils.errors import DeadlineError, GraphError, ProtocolError
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from tests.equality import assert_equal
from tests.net.clouds import LATENCIES, MODEL, OTHER_DIGEST, POINT, Cloud, assert_answers, boundary_tensors, request_at
from tests.net.conftest import JOIN_S
from tests.networks import Network, random_input, run_whole

# ---------------------------------------------------------------- results


def test_every_partition_point_equals_the_unsplit_network(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        for point in range(len(network.graph.layers)):
            assert_answers(edge, network, point)


def test_many_tasks_follow_on_one_connection(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        for seed in range(5):
            assert_answers(edge, network, seed=seed)


def test_results_outlive_the_next_task(cloud: Cloud, network: Network) -> None:
    request = request_at(network)
    with cloud.edge() as edge:
        first = edge.infer(request, boundary_tensors(network, POINT, random_input())).arrays[0]
        edge.infer(request, boundary_tensors(network, POINT, random_input() + 1))
    assert_equal(first, run_whole(network, random_input()), same_setup=True)


def test_many_edges_are_served_at_once(cloud: Cloud, network: Network) -> None:
    together = threading.Barrier(8)

    def one_edge(seed: int) -> None:
        with cloud.edge() as edge:
            together.wait(JOIN_S)
            for task in range(3):
                assert_answers(edge, network, seed=10 * seed + task)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one_edge, range(8)))


def test_the_cloud_names_its_device_and_threads(cloud: Cloud) -> None:
    with cloud.edge() as edge:
        assert edge.cloud == {"device": "cpu", "threads": 1}
        assert edge.rtt_ms > 0


def test_a_result_has_its_times_and_bytes(cloud: Cloud, network: Network) -> None:
    arrays, called = boundary_tensors(network, POINT, random_input()), threading.Event()
    with cloud.edge() as edge:
        result = edge.infer(request_at(network), arrays, called.set)
    assert called.is_set()
    assert result.transfer_ms > 0 and result.cloud_ms > 0
    assert result.sent_bytes >= HEAD_UNIT + sum(array.nbytes for array in arrays)
    assert stage_times(1.0, result).total_ms == pytest.approx(1.0 + result.transfer_ms + result.cloud_ms)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel takes no pace")
def test_the_first_task_is_paced_for_a_link_that_was_measured(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        _choose_congestion_control(edge, b"bbr")
        edge.pace_first_task(LinkEstimate(5e5, 1.0, error=0.05))
        edge.pace_first_task(LinkEstimate(1e6, 1.0, error=0.05))  # as it is now
        assert _pace(edge) == pytest.approx(1e6 * (session.PACE + 0.1), abs=1)
        assert_answers(edge, network)
        assert _pace(edge) == UNPACED
        edge.pace_first_task(LinkEstimate(1e6, 1.0))
        assert _pace(edge) == UNPACED


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel takes no pace")
def test_a_reply_during_pacing_ends_it(cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    with cloud.edge() as edge:
        _choose_congestion_control(edge, b"bbr")
        send_at_most = Connection.send_at_most

        def answered(connection: Connection, rate_bytes_per_s: float) -> None:
            monkeypatch.undo()
            assert_answers(edge, network)
            send_at_most(connection, rate_bytes_per_s)

        monkeypatch.setattr(Connection, "send_at_most", answered)
        edge.pace_first_task(LinkEstimate(1e6, 1.0))
        assert _pace(edge) == UNPACED


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel takes no pace")
@pytest.mark.parametrize(
    ("name", "link"),
    [
        (b"bbr", LinkEstimate(1e6, 1.0, source=LinkSource.GIVEN)),
        (b"bbr", LinkEstimate(1e9, 0.1)),
        (b"reno", LinkEstimate(1e6, 1.0)),
    ],
)
def test_no_pacing_for_given_or_fast_links_or_without_bbr(cloud: Cloud, name: bytes, link: LinkEstimate) -> None:
    with cloud.edge() as edge:
        _choose_congestion_control(edge, name)
        edge.pace_first_task(link)
        assert _pace(edge) == UNPACED


def _choose_congestion_control(edge: EdgeSession, name: bytes) -> None:
    try:
        edge._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
    except OSError:
        pytest.skip(f"this kernel has no {name.decode()}")


def _pace(edge: EdgeSession) -> int:
    return struct.unpack("@I", edge._connection.sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 4))[0]


def test_no_tensor_is_sent_where_the_edge_did_all() -> None:
    assert stage_times(2.0, None).as_dict() == {"edge_ms": 2.0, "transfer_ms": 0.0, "cloud_ms": 0.0, "total_ms": 2.0}


# ---------------------------------------------------------------- an edge and other servers


def answer_once(listener: socket.socket, *messages: Message) -> threading.Thread:
    """Play a cloud that sends these messages, whatever it receives."""

    def play() -> None:
        with Connection(listener.accept()[0]) as connection:
            for message in messages:
                connection.receive(JOIN_S)
                connection.send(message)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    return thread


def test_a_cloud_that_says_no_hello_is_refused(listener: socket.socket) -> None:
    answer_once(listener, Ready(MODEL, OTHER_DIGEST))
    with pytest.raises(ProtocolError, match="expected Hello, got Ready"):
        EdgeSession.open(*listener.getsockname())


def test_a_reply_to_another_task_is_refused(listener: socket.socket, network: Network) -> None:
    answer_once(listener, Hello.of(), Reply(1.0, 1.0, 0.0, 0.0))
    with EdgeSession.open(*listener.getsockname()) as edge, pytest.raises(ProtocolError, match="expected 1, got 0"):
        edge.infer(request_at(network), [])


def test_a_server_of_another_protocol_is_refused(listener: socket.socket) -> None:
    def play() -> None:
        with listener.accept()[0] as sock:
            sock.recv(HEAD_UNIT)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(HEAD_UNIT))

    threading.Thread(target=play, daemon=True).start()
    with pytest.raises(ProtocolError, match="not our protocol"):
        EdgeSession.open(*listener.getsockname())


def test_heartbeats_are_no_replies(listener: socket.socket, network: Network) -> None:
    def play() -> None:
        with Connection(listener.accept()[0]) as connection:
            for messages in ([Hello.of()], [Pong(0), Pong(0), Ready(MODEL, OTHER_DIGEST), Pong(0)]):
                connection.receive(JOIN_S)
                for message in messages:
                    connection.send(message)
            connection.receive(JOIN_S)
            connection.send(Reply(0.0, 0.0, 0.0, 0.0), task=1)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    with EdgeSession.open(*listener.getsockname()) as edge:
        edge.ask_to_prepare(request_at(network).preparation)
        edge.wait_until_ready(OTHER_DIGEST)
        assert edge.infer(request_at(network), []).arrays == ()
    thread.join()


@contextmanager
def quiet_cloud(listener: socket.socket, *messages: Message) -> Iterator[None]:
    """Play a cloud that says hello, the given messages, and nothing more until the block ends."""
    leave = threading.Event()

    def play() -> None:
        with Connection(listener.accept()[0]) as connection:
            connection.receive(JOIN_S)
            connection.send(Hello.of())
            for message in messages:
                connection.send(message)
            leave.wait(JOIN_S)

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    yield
    leave.set()
    thread.join()


def test_a_silent_cloud_is_found_long_before_a_reply_is_due(
    listener: socket.socket, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_cloud(listener), EdgeSession.open(*listener.getsockname()) as edge:
        monkeypatch.setattr(session, "SILENCE_S", 0.02)
        with pytest.raises(DeadlineError, match="timed out"):
            edge.infer(request_at(network), [])


def test_heartbeats_without_a_reply_end_at_the_timeout(
    listener: socket.socket, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "REPLY_TIMEOUT_S", 0.02)
    leave = threading.Event()

    def play() -> None:
        with Connection(listener.accept()[0]) as connection:
            connection.receive(JOIN_S)
            connection.send(Hello.of())
            while not leave.wait(0.005):
                connection.send(Pong(0))

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    with EdgeSession.open(*listener.getsockname()) as edge, pytest.raises(DeadlineError, match="no reply from"):
        edge.infer(request_at(network), [])
    leave.set()
    thread.join()


def test_an_edge_finds_whether_its_cloud_responds(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet_cloud(listener, Pong(0)), EdgeSession.open(*listener.getsockname()) as edge:
        assert edge.responds()
        monkeypatch.setattr(session, "SILENCE_S", 0.02)
        assert not edge.responds()


def test_another_message_is_no_reply_to_a_task(listener: socket.socket, network: Network) -> None:
    with quiet_cloud(listener, Ready(MODEL, OTHER_DIGEST)), EdgeSession.open(*listener.getsockname()) as edge:
        sent = edge.send_task(1, request_at(network), [])
        with pytest.raises(ProtocolError, match="expected Reply, got Ready"):
            edge.result_of(edge.receive_reply(JOIN_S), sent)


def test_a_task_that_the_cloud_refuses_has_the_error(listener: socket.socket, network: Network) -> None:
    with quiet_cloud(listener, ErrorReply("graph", "why")), EdgeSession.open(*listener.getsockname()) as edge:
        sent = edge.send_task(1, request_at(network), [])
        with pytest.raises(GraphError, match="why"):
            edge.result_of(edge.receive_reply(JOIN_S), sent)


@pytest.mark.parametrize("kernel_rtt_s", [None, 0.0, 1e6])
def test_the_least_rtt_is_that_of_the_kernel_or_hello(
    kernel_rtt_s: float | None, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = None if kernel_rtt_s is None else SendState(0.0, 0.0, 0.0, 0.0, kernel_rtt_s)
    with cloud.edge() as edge:
        monkeypatch.setattr(edge, "send_state", lambda: state)
        assert edge.least_rtt_ms() == (0.0 if kernel_rtt_s == 0.0 else edge.rtt_ms)


# ---------------------------------------------------------------- the cloud's latencies


def test_latencies_that_are_no_numbers_are_refused(listener: socket.socket) -> None:
    answer_once(listener, Hello.of(), LATENCIES._replace(low_ms=["a", "b"]))  # type: ignore[list-item]
    with EdgeSession.open(*listener.getsockname()) as edge, pytest.raises(ProtocolError, match="invalid latencies"):
        edge.ask_latencies(MODEL, OTHER_DIGEST)
