"""The cloud's server: it outlives every edge and unauthenticated peer, keeps its edges apart, and stops cleanly."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from neurosurgeon.cloud import conversation
from neurosurgeon.cloud.conversation import Conversation, Rules, Service
from neurosurgeon.cloud.events import CloudEvent
from neurosurgeon.cloud.executor import CloudResult, Executor
from neurosurgeon.cloud.server import CloudServer
from neurosurgeon.cloud.store import NetworkStore
from neurosurgeon.engine.base import Partition
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array
from neurosurgeon.net import limits, wire
from neurosurgeon.net.connection import Connection, Received
from neurosurgeon.net.frames import HEAD_UNIT, Kind, pack_head
from neurosurgeon.net.limits import ConnectionLimiter, ConnectionLimits
from neurosurgeon.net.memory import MemoryLimit
from neurosurgeon.net.messages import ErrorCode, ErrorReply, Hello, Latencies, Pong, Prepare, Ready, Reply
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.net.sockets import connect
from neurosurgeon.utils.errors import (
    BusyError,
    ConnectError,
    DeadlineError,
    GraphError,
    NetworkError,
    NeurosurgeonError,
    NonFiniteError,
    PartitionError,
    PeerGoneError,
    ProtocolError,
    RemoteError,
    UnknownModelError,
    WeightsError,
)
from tests.equality import assert_equal
from tests.net.clouds import (
    LATENCIES,
    MODEL,
    OTHER_DIGEST,
    POINT,
    BlockingExecutor,
    BrokenExecutor,
    Cloud,
    assert_answers,
    assert_serves,
    boundary_tensors,
    request_at,
)
from tests.net.conftest import JOIN_S, wait_until
from tests.net.test_connection import frame_of, reset
from tests.networks import ENGINE, Network, load_network, model_graph, random_input, run_whole

BAD_CUTS = {  # of a network of 13 nodes
    "too short": b"\1",
    "too long": b"\1\0\0",
    "a node too many": b"\1\x20",
    "nothing": b"\0\0",
    "no input": b"\2\0",
    "a node without what it reads": b"\5\0",
    "huge": b"\xff" * 60_000,
    "empty": b"",
}
TASK_EVENTS = [
    CloudEvent.EDGE_OUTPUT,
    CloudEvent.TRANSFER_LATENCY_SENT,
    CloudEvent.CLOUD_LATENCY_SENT,
    CloudEvent.FINISHED,
]
PREPARE_EVENTS = [CloudEvent.MODEL_TYPE, CloudEvent.PARTITION_POINT]


# ---------------------------------------------------------------- events


def test_events_come_in_the_order_of_the_conversation(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        assert_answers(edge, network)
        assert_answers(edge, network)
    cloud.stop()
    assert cloud.events == [CloudEvent.CONNECTED, *2 * (PREPARE_EVENTS + TASK_EVENTS)]


def test_a_refused_task_is_not_finished(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge, pytest.raises(NeurosurgeonError):
        edge.infer(request_at(network), [np.ones(1)])
    cloud.stop()
    assert cloud.events == [CloudEvent.CONNECTED]


# ---------------------------------------------------------------- refusals leave the conversation alive


def test_different_weights_are_named_before_any_tensor_is_sent(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        edge.ask_to_prepare(request_at(network).preparation)
        with pytest.raises(WeightsError, match=f"edge {OTHER_DIGEST}, cloud {network.ref.weights_digest}"):
            edge.wait_until_ready(OTHER_DIGEST)
        assert CloudEvent.EDGE_OUTPUT not in cloud.events
        assert_answers(edge, network)


def test_a_task_with_other_weights_is_refused(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        with pytest.raises(WeightsError, match=f"cloud {network.ref.weights_digest}, edge {OTHER_DIGEST}"):
            edge.infer(
                request_at(network, weights_digest=OTHER_DIGEST), boundary_tensors(network, POINT, random_input())
            )
        assert_answers(edge, network)


@pytest.mark.parametrize("model", ["no_net", "", "os.system", "x" * 2000, "\ud800", "../le_net"])
def test_an_unknown_model_is_refused(cloud: Cloud, network: Network, model: str) -> None:
    with cloud.edge() as edge:
        edge.ask_to_prepare(request_at(network).preparation._replace(model=model))
        with pytest.raises(UnknownModelError, match="choose from alex_net"):
            edge.wait_until_ready(network.ref.weights_digest)
        assert_answers(edge, network)


@pytest.mark.parametrize("mask", BAD_CUTS.values(), ids=BAD_CUTS)
def test_a_mask_that_is_no_cut_of_the_network_is_refused(cloud: Cloud, network: Network, mask: bytes) -> None:
    request = request_at(network)._replace(edge_nodes=mask)
    with cloud.edge() as edge:
        edge.ask_to_prepare(request.preparation)
        with pytest.raises(PartitionError, match=f"cut of {MODEL}"):
            edge.wait_until_ready(network.ref.weights_digest)
        with pytest.raises(PartitionError):
            edge.infer(request, [random_input()])
        assert_answers(edge, network)


def test_another_network_of_the_same_name_is_refused_before_any_tensor_is_sent(cloud: Cloud, network: Network) -> None:
    request = request_at(network)._replace(graph_digest=OTHER_DIGEST)
    with cloud.edge() as edge:
        edge.ask_to_prepare(request.preparation)
        with pytest.raises(GraphError, match=f"different networks under the name {MODEL}: .*{OTHER_DIGEST}"):
            edge.wait_until_ready(network.ref.weights_digest)
        with pytest.raises(GraphError):
            edge.infer(request, boundary_tensors(network, POINT, random_input()))
        assert CloudEvent.EDGE_OUTPUT not in cloud.events
        assert_answers(edge, network)


@pytest.mark.parametrize(
    "arrays",
    [
        [],
        [np.ones(1)],
        [random_input()] * 2,
        [random_input().astype("float64")],
        [random_input()[:, :, 1:]],
        [np.empty((0, 3, 224, 224), np.float32)],
    ],
    ids=["none", "shape", "two", "dtype", "a row less", "empty"],
)
def test_arrays_that_are_no_boundary_tensors_of_the_cut_are_refused(
    cloud: Cloud, network: Network, arrays: list[Array]
) -> None:
    with cloud.edge() as edge:
        with pytest.raises(RemoteError, match=r"boundary tensors of this cut: expected .*, got \["):
            edge.infer(request_at(network, 0), arrays)
        assert_answers(edge, network)


def test_a_message_that_has_no_place_is_refused(cloud: Cloud, network: Network) -> None:
    with connect(*cloud.address) as connection:
        edge = EdgeSession(connection)
        connection.send(Ready(MODEL, OTHER_DIGEST))
        with pytest.raises(RemoteError, match="does not serve Ready"):
            edge.wait_until_ready(OTHER_DIGEST)
        assert_answers(edge, network)


def test_a_bug_of_the_cloud_is_an_error_without_its_secrets(
    start: Callable[[Executor], Cloud], network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    cloud = start(BrokenExecutor(ENGINE))
    with cloud.edge() as edge:
        for _ in range(2):
            with pytest.raises(RemoteError, match="the task failed in the cloud") as caught:
                edge.infer(request_at(network), boundary_tensors(network, POINT, random_input()))
            assert "secret" not in str(caught.value)
    failed = [record for record in caplog.records if record.exc_info]
    assert len(failed) == 2
    assert all(f"({MODEL}) of 127.0.0.1:" in record.getMessage() for record in failed)


# ---------------------------------------------------------------- unauthenticated peers, and edges that die


HELLO = frame_of(Hello.of(), [])
FIRST_BYTES = {
    "http": b"GET / HTTP/1.1\r\nHost: cloud\r\n\r\n" + b"x" * HEAD_UNIT,
    "random bytes": bytes(range(256)) * 4,
    "pickle": pickle.dumps({"model": bytes(1000)}),
    "nothing": b"",
    "part of a hello": HELLO[:100],
    "no hello": frame_of(Prepare(MODEL, b"\1\0", OTHER_DIGEST), []),
    "tensors before hello": frame_of(Hello.of(), [np.ones(3)]),
    "hello, then http": HELLO + b"GET / HTTP/1.1\r\n".ljust(HEAD_UNIT),
    "hello, then an endless body": HELLO + pack_head(Kind.REQUEST, b"", [2**60]),
}


@pytest.mark.parametrize("data", FIRST_BYTES.values(), ids=FIRST_BYTES)
def test_an_unauthenticated_peer_is_sent_away_and_the_next_edge_served(
    cloud: Cloud, network: Network, data: bytes
) -> None:
    with socket.create_connection(cloud.address, JOIN_S) as peer:
        peer.sendall(data)
        try:
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):  # at most the cloud's hello
                pass
        except OSError:  # the cloud was faster, and reset the connection
            pass
    assert_serves(cloud, network)


def test_a_peer_of_another_wire_version_hears_ours(cloud: Cloud, network: Network) -> None:
    with socket.create_connection(cloud.address, JOIN_S) as peer:
        peer.sendall(HELLO[:4] + b"\x63" + HELLO[5:])
        received = peer.recv(HEAD_UNIT, socket.MSG_WAITALL)
    assert received[:5] == HELLO[:5]
    assert_serves(cloud, network)


def test_a_silent_unauthenticated_peer_is_sent_away(
    cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "AUTHENTICATION_TIMEOUT_S", 0.02)
    with socket.create_connection(cloud.address, JOIN_S) as peer:
        assert peer.recv(1) == b""
    monkeypatch.undo()
    assert_serves(cloud, network)


def test_an_edge_that_stops_in_the_middle_of_a_frame_is_sent_away(
    cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HEAD_TIMEOUT_S", 0.02)
    with socket.create_connection(cloud.address, JOIN_S) as peer:
        peer.sendall(HELLO[:100])
        assert peer.recv(1) == b""
    monkeypatch.undo()
    assert_serves(cloud, network)


@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["closed", "reset"])
def test_an_edge_that_dies_while_it_sends_harms_no_other(
    cloud: Cloud, network: Network, end: Callable[[socket.socket], None]
) -> None:
    request = frame_of(request_at(network, 0), [random_input()])
    with connect(*cloud.address) as connection:
        EdgeSession(connection)
        connection.sock.sendall(request[: len(request) // 2])
        end(connection.sock)
    assert_serves(cloud, network)
    wait_until(lambda: cloud.events.count(CloudEvent.EDGE_OUTPUT) == 1)  # of the second edge


def test_an_edge_that_does_not_wait_for_its_reply_harms_no_other(
    start: Callable[[Executor], Cloud], network: Network
) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    request = request_at(network)
    with connect(*cloud.address) as connection:
        EdgeSession(connection)
        connection.send(request, boundary_tensors(network, POINT, random_input()))
        assert executor.running.wait(JOIN_S)
        reset(connection.sock)
    executor.may_go_on.set()
    assert_serves(cloud, network)


def test_edges_beyond_the_limit_hear_that_the_cloud_is_busy(start: Callable[..., Cloud], network: Network) -> None:
    cloud = start(Executor(ENGINE), limiter=ConnectionLimiter(limits=ConnectionLimits(max_connections=1)))
    with cloud.edge() as edge:
        with pytest.raises(BusyError):
            cloud.edge()
        assert_answers(edge, network)


def test_a_task_for_which_there_is_no_memory_is_refused_alone(start: Callable[..., Cloud], network: Network) -> None:
    executor = BlockingExecutor()
    cloud = start(executor, limiter=ConnectionLimiter(memory=MemoryLimit(1_000_000, 1_000_000)))
    with connect(*cloud.address) as connection:
        tasks = ManyTasks(connection, network)
        tasks.send(1, point=0)
        assert executor.running.wait(JOIN_S)
        tasks.send(2, point=0)
        (refused,) = tasks.receive(1)
        assert codes([refused]) == {2: ErrorCode.BUSY}
        executor.may_go_on.set()
        assert [reply.task for reply in tasks.receive(1)] == [1]
        tasks.send(3, point=0)
        assert [reply.task for reply in tasks.receive(1)] == [3]


def test_a_request_that_is_answered_takes_no_memory(start: Callable[..., Cloud], network: Network) -> None:
    memory = MemoryLimit(1_500_000, 1_500_000)
    with connect(*start(Executor(ENGINE), limiter=ConnectionLimiter(memory=memory)).address) as connection:
        tasks = ManyTasks(connection, network)
        tasks.send(1, point=0)
        while not isinstance(connection.receive(JOIN_S).message, Reply):
            pass
        wait_until(lambda: not memory._used_bytes)


def test_a_computing_cloud_sends_heartbeats(
    start: Callable[[Executor], Cloud], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "HEARTBEAT_S", 0.01)
    executor = BlockingExecutor()
    with connect(*start(executor).address) as connection:
        ManyTasks(connection, network).send(1)
        assert executor.running.wait(JOIN_S)
        for _ in range(3):
            assert isinstance(connection.receive(JOIN_S).message, Pong)
        executor.may_go_on.set()


def test_tasks_that_come_in_meanwhile_do_not_keep_the_cloud_silent(
    start: Callable[[Executor], Cloud], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "HEARTBEAT_S", 0.1)
    most = 1_000  # tasks that none refuses
    monkeypatch.setattr(conversation, "MAX_UNANSWERED", most)
    monkeypatch.setattr("neurosurgeon.cloud.executor.CLIENT_SHARE", most)
    executor = BlockingExecutor(max_queue=most)
    with connect(*start(executor).address) as connection:
        tasks, has_heartbeat = ManyTasks(connection, network), threading.Event()

        def keep_sending() -> None:
            for _ in range(most):
                tasks.send(1)
                if has_heartbeat.wait(0.05):
                    return

        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(keep_sending)
            assert isinstance(connection.receive(JOIN_S).message, Pong)
            assert not sending.done()
            has_heartbeat.set()
        executor.may_go_on.set()


# ---------------------------------------------------------------- the end


def test_stop_lets_a_running_task_finish_and_answer(start: Callable[[Executor], Cloud], network: Network) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    with cloud.edge() as edge, ThreadPoolExecutor(2) as pool:
        task = pool.submit(assert_answers, edge, network)
        assert executor.running.wait(JOIN_S)
        stopping = pool.submit(cloud.server.stop)
        cloud.serving.join(JOIN_S)  # no more edges are accepted: it is stopping
        with pytest.raises(ConnectError):
            cloud.edge()
        executor.may_go_on.set()
        task.result(JOIN_S)
        stopping.result(JOIN_S)


def test_stop_ends_idle_conversations(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        assert_answers(edge, network)
        cloud.stop()
        with pytest.raises(NetworkError):
            assert_answers(edge, network)


def test_a_stopped_cloud_refuses_new_edges(cloud: Cloud) -> None:
    cloud.stop()
    assert not cloud.serving.is_alive()
    with pytest.raises(ConnectError):
        cloud.edge()


# ---------------------------------------------------------------- many tasks in flight


LATE_POINT = 11  # boundary tensors of a few KB, so that many requests fit into a socket


class ManyTasks:
    """An edge that sends task after task, and reads the replies when it likes."""

    def __init__(self, connection: Connection, network: Network, edge_id: bytes | None = None) -> None:
        self.connection, self.network = connection, network
        EdgeSession(connection, edge_id)  # says hello

    def send(self, task: int, point: int = LATE_POINT, digest: str | None = None) -> None:
        """Send a task whose input depends on its number."""
        arrays = boundary_tensors(self.network, point, random_input() + task)
        self.connection.send(request_at(self.network, point, digest), arrays, task)

    def receive(self, count: int) -> list[Received]:
        """Return the next replies; their outputs must be those of their tasks."""
        replies: list[Received] = []
        while len(replies) < count:
            received = self.connection.receive(JOIN_S)
            if not isinstance(received.message, Pong):  # a busy machine is slow
                replies.append(received)
        for reply in replies:
            if isinstance(reply.message, Reply):
                (output,) = reply.arrays
                whole = run_whole(self.network, random_input() + reply.task)
                assert_equal(output, whole, same_setup=True, what=f"task {reply.task}")
        return replies


def codes(replies: Sequence[Received]) -> dict[int, str]:
    """Return {task: error code} of the refusals among replies."""
    return {reply.task: reply.message.code for reply in replies if isinstance(reply.message, ErrorReply)}


def test_tasks_in_flight_on_one_connection_are_all_answered(cloud: Cloud, network: Network) -> None:
    with connect(*cloud.address) as connection:
        edge = ManyTasks(connection, network)
        for task in range(1, 13):
            edge.send(task, point=LATE_POINT - task % 3)
        replies = edge.receive(12)
    assert [reply.task for reply in replies] == list(range(1, 13))  # one worker keeps the order of an edge
    assert all(isinstance(reply.message, Reply) for reply in replies)


class ReversingExecutor(Executor):
    """An executor that delivers every three results in reverse."""

    held: list[tuple[Future[CloudResult], CloudResult]] = []

    def submit(self, client: Hashable, partition: Partition, arrays: Sequence[Array]) -> Future[CloudResult]:
        later: Future[CloudResult] = Future()

        def hold(done: Future[CloudResult]) -> None:
            self.held = [(later, done.result()), *self.held]
            if len(self.held) == 3:
                for waiting, result in self.held:
                    waiting.set_result(result)
                self.held = []

        super().submit(client, partition, arrays).add_done_callback(hold)
        return later


def test_replies_leave_in_the_order_of_the_results_each_with_its_number(
    start: Callable[[Executor], Cloud], network: Network
) -> None:
    with connect(*start(ReversingExecutor(ENGINE)).address) as connection:
        edge = ManyTasks(connection, network)
        for task in range(1, 7):
            edge.send(task)
        assert [reply.task for reply in edge.receive(6)] == [3, 2, 1, 6, 5, 4]


def test_refusals_among_tasks_carry_their_numbers(cloud: Cloud, network: Network) -> None:
    with connect(*cloud.address) as connection:
        edge = ManyTasks(connection, network)
        for task in range(1, 4):
            edge.send(task)
        edge.send(4, digest=OTHER_DIGEST)
        request = request_at(network, 1)
        connection.send(request._replace(model="no_net"), [], 5)
        connection.send(request._replace(edge_nodes=b"\2\0"), [], 6)
        connection.send(request, [np.ones(1)], 7)
        connection.send(request._replace(graph_digest=OTHER_DIGEST), [], 8)
        edge.send(9)
        replies = edge.receive(9)
    assert codes(replies) == {4: "weights", 5: "unknown_model", 6: "partition", 7: "bad_request", 8: "graph"}
    assert sorted(reply.task for reply in replies) == list(range(1, 10))


def test_an_edge_that_asks_for_too_much_hears_when_to_ask_again(
    start: Callable[[Executor], Cloud], network: Network
) -> None:
    executor = BlockingExecutor(max_queue=1)
    with connect(*start(executor).address) as connection:
        edge = ManyTasks(connection, network)
        edge.send(1)
        assert executor.running.wait(JOIN_S)
        for task in (2, 3, 4):
            edge.send(task)
        refused = edge.receive(2)
        assert codes(refused) == {3: "busy", 4: "busy"}
        assert all(isinstance(reply.message, ErrorReply) and reply.message.retry_ms > 0 for reply in refused)
        executor.may_go_on.set()
        assert [reply.task for reply in edge.receive(2)] == [1, 2]
        edge.send(5)
        assert codes(edge.receive(1)) == {}


def test_a_reply_carries_the_load(cloud: Cloud, network: Network) -> None:
    with connect(*cloud.address) as connection:
        edge = ManyTasks(connection, network)
        edge.send(1)
        edge.send(2)
        _, reply = edge.receive(2)  # the first one may not be counted yet when it is answered
    assert isinstance(reply.message, Reply)
    assert reply.message.load_service_ms > 0
    assert reply.message.load_queue_ms >= 0


def test_the_lines_of_tasks_in_flight_stay_together(start: Callable[[Executor], Cloud], network: Network) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    with connect(*cloud.address) as connection:
        edge = ManyTasks(connection, network)
        for task, point in enumerate((9, 9, 10, 10, 9), start=1):
            edge.send(task, point)
        connection.send(request_at(network).preparation)
        assert isinstance(connection.receive(JOIN_S).message, Ready)  # so all tasks have arrived
        executor.may_go_on.set()
        edge.receive(5)
    cloud.stop()
    named = [*PREPARE_EVENTS, *TASK_EVENTS]
    assert cloud.events == [CloudEvent.CONNECTED, *named, *TASK_EVENTS, *named, *TASK_EVENTS, *named]


def test_the_waiting_tasks_of_an_edge_that_left_are_not_computed(
    start: Callable[[Executor], Cloud], network: Network
) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    with connect(*cloud.address) as connection:
        edge = ManyTasks(connection, network)
        for task in range(1, 6):
            edge.send(task)
        assert executor.running.wait(JOIN_S)
    assert executor.dropped.wait(JOIN_S)  # while its first task still runs
    executor.may_go_on.set()
    assert_serves(cloud, network)


class LongReplyExecutor(Executor):
    """An executor whose results for its first client fit into no socket."""

    first: Hashable = None

    def submit(self, client: Hashable, partition: Partition, arrays: Sequence[Array]) -> Future[CloudResult]:
        self.first = self.first or client
        future = super().submit(client, partition, arrays)
        if client is not self.first:
            return future
        long: Future[CloudResult] = Future()

        def lengthen(done: Future[CloudResult]) -> None:
            if done.cancelled():
                long.cancel()
            else:
                long.set_result(done.result()._replace(arrays=(np.zeros(32_000_000, np.uint8),)))

        future.add_done_callback(lengthen)
        return long


@pytest.mark.parametrize("error", [DeadlineError("a part of a frame is out"), RuntimeError("a part of a frame is out")])
def test_a_reply_that_is_sent_in_part_ends_the_conversation(
    start: Callable[[Executor], Cloud], network: Network, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    cloud = start(Executor(ENGINE))
    send = Connection.send

    def lose(connection: Connection, message: Any, *arguments: Any, **named: Any) -> None:
        if isinstance(message, Reply):
            connection.is_mid_frame = True
            raise error
        send(connection, message, *arguments, **named)

    monkeypatch.setattr(Connection, "send", lose)
    with cloud.edge() as edge, pytest.raises(PeerGoneError):
        assert_answers(edge, network)
    monkeypatch.undo()
    assert_serves(cloud, network)


def test_a_reply_that_cannot_be_packed_is_an_error_of_its_task(
    cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Connection.send

    def refuse(connection: Connection, message: Any, *arguments: Any, **named: Any) -> None:
        if isinstance(message, Reply):
            raise ProtocolError("tensors of complex64 cannot be sent")
        send(connection, message, *arguments, **named)

    with cloud.edge() as edge:
        with monkeypatch.context() as broken:
            broken.setattr(Connection, "send", refuse)
            with pytest.raises(RemoteError, match="tensors of complex64 cannot be sent"):
                assert_answers(edge, network)
        assert_answers(edge, network)
    assert cloud.events.count(CloudEvent.CONNECTED) == 1


def test_a_cloud_without_a_thread_for_an_edge_serves_the_next(
    cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_thread = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("read"):
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", fail)
        with pytest.raises(NetworkError):
            cloud.edge()
    assert_serves(cloud, network)


def test_an_edge_that_reads_no_replies_holds_up_no_other(
    start: Callable[[Executor], Cloud], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MAX_UNANSWERED", 2)
    cloud = start(LongReplyExecutor(ENGINE))
    with connect(*cloud.address) as connection:
        silent = ManyTasks(connection, network)
        for task in range(1, 6):
            silent.send(task)
        received = connection.receive(JOIN_S)  # its first reply; the others fill the socket, and its two places
        assert received.arrays[0].nbytes == 32_000_000
        for _ in range(3):
            assert_serves(cloud, network)
    assert_serves(cloud, network)


def test_an_edge_that_reads_no_replies_is_sent_away_in_time(
    start: Callable[[Executor], Cloud], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MAX_UNANSWERED", 1)
    cloud = start(LongReplyExecutor(ENGINE))
    with connect(*cloud.address) as connection:
        silent = ManyTasks(connection, network)
        monkeypatch.setattr("neurosurgeon.net.connection.BODY_BASE_S", 0.02)
        monkeypatch.setattr("neurosurgeon.net.connection.MIN_RATE_BYTES_PER_S", 1e12)
        silent.send(1)
        silent.send(2)
        with pytest.raises(NetworkError):
            while True:
                list(connection.receive_raw(1, memoryview(bytearray(1))))
    monkeypatch.undo()
    assert_serves(cloud, network)


def test_stop_answers_all_tasks_that_have_arrived(start: Callable[[Executor], Cloud], network: Network) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    with connect(*cloud.address) as connection, ThreadPoolExecutor(1) as pool:
        edge = ManyTasks(connection, network)
        for task in range(1, 6):
            edge.send(task)
        assert executor.running.wait(JOIN_S)
        stopping = pool.submit(cloud.server.stop)
        cloud.serving.join(JOIN_S)
        executor.may_go_on.set()
        assert [reply.task for reply in edge.receive(5)] == [1, 2, 3, 4, 5]
        with pytest.raises(PeerGoneError):
            connection.receive(JOIN_S)
        stopping.result(JOIN_S)


def test_stop_ends_when_its_grace_is_over(start: Callable[[Executor], Cloud], network: Network) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    with connect(*cloud.address) as connection:
        edge = ManyTasks(connection, network)
        edge.send(1)
        assert executor.running.wait(JOIN_S)
        cloud.stop(grace_s=0.01)
        with pytest.raises(PeerGoneError):
            connection.receive(JOIN_S)
    executor.may_go_on.set()


def test_stop_ends_beside_a_conversation_that_ends_by_itself(
    start: Callable[[Executor], Cloud], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    with connect(*cloud.address) as connection:
        edge = ManyTasks(connection, network)
        edge.send(1)
        assert executor.running.wait(JOIN_S)
        abort, aborting = Conversation.abort, []

        def late(ending: Conversation) -> None:
            aborting.append(threading.current_thread().name)
            if len(aborting) == 1:  # the server's thread: the conversation's own one is faster
                ending.connection.break_off()
                ending._writer.join(JOIN_S)
                for thread in list(cloud.server._threads):
                    thread.join(JOIN_S)
            abort(ending)

        monkeypatch.setattr(Conversation, "abort", late)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(cloud.server.stop, 0.01).result(3 * JOIN_S)
        assert len(aborting) == 2
    executor.may_go_on.set()
    cloud.serving.join(JOIN_S)


# ---------------------------------------------------------------- tasks that come again


class CountingExecutor(Executor):
    """An executor that counts its tasks."""

    submitted = 0

    def submit(self, *args: Any, **kwargs: Any) -> Future[CloudResult]:
        self.submitted += 1
        return super().submit(*args, **kwargs)


EDGE_ID = bytes(range(12))


def test_a_task_sent_again_over_another_connection_is_not_computed_again(
    start: Callable[[Executor], Cloud], network: Network
) -> None:
    executor = CountingExecutor(ENGINE)
    cloud = start(executor)
    for attempt in range(3):
        with connect(*cloud.address) as connection:
            edge = ManyTasks(connection, network, EDGE_ID)
            edge.send(7)
            if attempt:
                edge.send(7)
                edge.receive(1)
            edge.receive(1)
    assert executor.submitted == 1


def test_replies_to_a_connection_that_breaks_the_protocol_are_not_kept(
    start: Callable[[Executor], Cloud], network: Network
) -> None:
    executor = CountingExecutor(ENGINE)
    cloud = start(executor)
    for _ in range(2):
        with connect(*cloud.address) as connection:
            edge = ManyTasks(connection, network, EDGE_ID)
            edge.send(7)
            edge.receive(1)
            connection.send_raw(bytes(HEAD_UNIT))
            with pytest.raises(PeerGoneError):
                connection.receive(JOIN_S)
    assert executor.submitted == 2


def test_edges_have_tasks_of_their_own(start: Callable[[Executor], Cloud], network: Network) -> None:
    executor = CountingExecutor(ENGINE)
    cloud = start(executor)
    for edge_id in (EDGE_ID, EDGE_ID[::-1], b"too short", None):
        with connect(*cloud.address) as connection:
            edge = ManyTasks(connection, network, edge_id)
            edge.send(7)
            edge.receive(1)
    assert executor.submitted == 4


def test_a_task_dropped_with_its_edge_is_computed_for_the_connection_that_sent_it_again(
    start: Callable[[Executor], Cloud], network: Network
) -> None:
    executor = BlockingExecutor()
    cloud = start(executor)
    with connect(*cloud.address) as connection:
        with connect(*cloud.address) as lost:
            first = ManyTasks(lost, network, EDGE_ID)
            for task in (1, 2):
                first.send(task)
            assert executor.running.wait(JOIN_S)  # the first task; the second waits
            again = ManyTasks(connection, network, EDGE_ID)
            for task in (1, 2, 3):
                again.send(task)
        assert executor.dropped.wait(JOIN_S)
        executor.may_go_on.set()
        assert sorted(reply.task for reply in again.receive(3)) == [1, 2, 3]


# ---------------------------------------------------------------- the cloud's latencies


class _Source:
    """The latencies of a cloud, and the tasks whose times it got."""

    def __init__(self) -> None:
        self.computed_tasks: SimpleQueue[tuple[str, bytes, float]] = SimpleQueue()

    def __call__(self, model: str, graph: LayerGraph) -> Latencies:
        assert graph.model == model
        return LATENCIES._replace(model=model)

    def computed(self, model: str, cut: bytes, compute_ms: float) -> None:
        self.computed_tasks.put((model, cut, compute_ms))


def test_an_edge_learns_the_latencies_of_layers_in_the_cloud(listener: socket.socket) -> None:
    source = _Source()
    executor = Executor(ENGINE)
    server = CloudServer(listener, Service(executor, NetworkStore(executor, {}), latencies=source))
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    with EdgeSession.open(*listener.getsockname()) as edge:
        assert edge.ask_latencies(MODEL, model_graph(MODEL).digest) == LATENCIES
        assert edge.ask_latencies("alex_net", model_graph("alex_net").digest).model == "alex_net"
        with pytest.raises(GraphError, match="different networks"):
            edge.ask_latencies("alex_net", OTHER_DIGEST)
        network = load_network(MODEL)
        request = request_at(network)
        remote = edge.infer(request, boundary_tensors(network, POINT, random_input()))
        assert source.computed_tasks.get(timeout=JOIN_S) == (MODEL, request.edge_nodes, remote.compute_ms)
    server.stop()
    thread.join()


def test_a_cloud_without_latencies_refuses(cloud: Cloud) -> None:
    with cloud.edge() as edge, pytest.raises(RemoteError, match="does not serve AskLatencies"):
        edge.ask_latencies(MODEL, OTHER_DIGEST)


# ---------------------------------------------------------------- values that are no numbers


def test_a_tensor_with_nan_is_refused_and_the_conversation_goes_on(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        with pytest.raises(NonFiniteError, match="NaN"):
            edge.infer(request_at(network, 0), [random_input() * float("nan")])
        assert_answers(edge, network)


def test_a_tensor_with_nan_is_computed_where_that_is_allowed(start: Callable[..., Cloud], network: Network) -> None:
    cloud = start(Executor(ENGINE), rules=Rules(allows_nonfinite=True))
    with cloud.edge() as edge:
        result = edge.infer(request_at(network, 0), [random_input() * float("nan")])
        assert np.isnan(result.arrays[0]).any()
