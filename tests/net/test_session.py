"""Conversations: an edge gets the network's own output; a cloud outlives every edge and stranger, and stops cleanly."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from models.zoo import Network, load_network
from net import session, transport
from net.framing import HEAD_UNIT
from net.messages import Hello, Latencies, Message, Prepare, Ready, Reply, Request
from net.session import CloudEvent, CloudServer, EdgeSession, stage_times
from net.transport import Connection, connect, listen
from tests.net.conftest import JOIN_S, LOOPBACK
from tests.net.test_transport import frame_of, reset
from utils.errors import (
    ConnectError,
    NetworkError,
    NeurosurgeonError,
    PartitionError,
    PeerGoneError,
    ProtocolError,
    RemoteError,
    UnknownModelError,
    WeightsError,
)
from utils.inference_utils import CloudEngine, CloudResult, random_input, run_half, run_whole

MODEL = "le_net"
POINT = 3
OTHER_DIGEST = "0" * 32
TASK_EVENTS = [
    CloudEvent.EDGE_OUTPUT,
    CloudEvent.TRANSFER_LATENCY_SENT,
    CloudEvent.CLOUD_LATENCY_SENT,
    CloudEvent.FINISHED,
]
PREPARE_EVENTS = [CloudEvent.MODEL_TYPE, CloudEvent.PARTITION_POINT]


class Cloud:
    """A server in threads of this process, and what it observed."""

    def __init__(self, engine: CloudEngine) -> None:
        self.events: list[CloudEvent] = []
        self.listener = listen(LOOPBACK, 0)
        self.address: tuple[str, int] = self.listener.getsockname()
        self.server = CloudServer(self.listener, engine, lambda event, sock: self.events.append(event))
        self.serving = threading.Thread(target=self.server.serve)
        self.serving.start()

    def edge(self) -> EdgeSession:
        """Return a new conversation."""
        return EdgeSession.open(*self.address)

    def stop(self, grace_s: float = JOIN_S) -> None:
        """Stop the server; stopping a stopped one is fine."""
        if self.listener.fileno() >= 0:
            self.server.stop(grace_s)
        self.serving.join(JOIN_S)


class BlockingEngine(CloudEngine):
    """An engine whose tasks begin, and then wait until they may go on."""

    def __init__(self) -> None:
        super().__init__("cpu", 1, {})
        self.running, self.may_go_on = threading.Event(), threading.Event()

    def submit(self, name: str, point: int, tensors: Sequence[Tensor]) -> Callable[[], CloudResult]:
        wait = super().submit(name, point, tensors)

        def wait_longer() -> CloudResult:
            self.running.set()
            assert self.may_go_on.wait(JOIN_S)
            return wait()

        return wait_longer


class BrokenEngine(CloudEngine):
    """An engine with a bug."""

    def submit(self, name: str, point: int, tensors: Sequence[Tensor]) -> Callable[[], CloudResult]:
        raise ZeroDivisionError("a secret of the cloud")


@pytest.fixture
def start() -> Iterator[Callable[[CloudEngine], Cloud]]:
    """Start clouds that end with the test. Both sides compute with one thread, and so make the same bits."""
    threads = torch.get_num_threads()
    clouds: list[Cloud] = []

    def start_one(engine: CloudEngine) -> Cloud:
        clouds.append(Cloud(engine))
        return clouds[-1]

    yield start_one
    for cloud in clouds:
        cloud.stop()
    torch.set_num_threads(threads)


@pytest.fixture
def cloud(start: Callable[[CloudEngine], Cloud]) -> Cloud:
    """A running cloud."""
    return start(CloudEngine("cpu", 1, {}))


@pytest.fixture(scope="module")
def network() -> Network:
    """The edge's own network."""
    return load_network(MODEL)


def crossing(network: Network, point: int, tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what the edge half makes of an input."""
    return run_half(network.cut(point).edge, [tensor]).tensors


def assert_answers(edge: EdgeSession, network: Network, point: int = POINT, seed: int = 0) -> None:
    """Run one task, and compare its answer bit for bit with the unsplit network's."""
    tensor = random_input() + seed
    edge.ask_to_prepare(MODEL, point)
    edge.wait_until_ready(network.weights_digest)
    result = edge.infer(MODEL, point, network.weights_digest, crossing(network, point, tensor))
    (output,) = result.tensors
    assert torch.equal(output, run_whole(network, tensor))
    assert output.isfinite().all()


def assert_serves(cloud: Cloud, network: Network) -> None:
    """Show that the cloud still serves new edges."""
    with cloud.edge() as edge:
        assert_answers(edge, network)


# ---------------------------------------------------------------- the answer


def test_every_partition_point_answers_as_the_unsplit_network(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        for point in range(len(network.graph.layers)):
            assert_answers(edge, network, point)


def test_many_tasks_follow_on_one_connection(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        for seed in range(5):
            assert_answers(edge, network, seed=seed)


def test_answers_outlive_the_next_task(cloud: Cloud, network: Network) -> None:
    digest = network.weights_digest
    with cloud.edge() as edge:
        first = edge.infer(MODEL, POINT, digest, crossing(network, POINT, random_input())).tensors[0]
        edge.infer(MODEL, POINT, digest, crossing(network, POINT, random_input() + 1))
    assert torch.equal(first, run_whole(network, random_input()))


def test_many_edges_are_served_at_once(cloud: Cloud, network: Network) -> None:
    together = threading.Barrier(8)

    def one_edge(seed: int) -> None:
        with cloud.edge() as edge:
            together.wait(JOIN_S)
            for task in range(3):
                assert_answers(edge, network, seed=10 * seed + task)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one_edge, range(8)))


def test_the_cloud_says_what_it_computes_with(cloud: Cloud) -> None:
    with cloud.edge() as edge:
        assert edge.cloud == {"device": "cpu", "threads": 1}
        assert edge.rtt_ms > 0


def test_a_result_tells_time_and_bytes(cloud: Cloud, network: Network) -> None:
    tensors, called = crossing(network, POINT, random_input()), threading.Event()
    with cloud.edge() as edge:
        result = edge.infer(MODEL, POINT, network.weights_digest, tensors, called.set)
    assert called.is_set()
    assert result.transfer_ms > 0 and result.cloud_ms > 0
    assert result.sent_bytes >= HEAD_UNIT + sum(tensor.nbytes for tensor in tensors)
    assert stage_times(1.0, result).total_ms == pytest.approx(1.0 + result.transfer_ms + result.cloud_ms)


def test_nothing_crosses_where_the_edge_did_all() -> None:
    assert stage_times(2.0, None).as_dict() == {"edge_ms": 2.0, "transfer_ms": 0.0, "cloud_ms": 0.0, "total_ms": 2.0}


# ---------------------------------------------------------------- events


def test_events_come_in_the_order_of_the_conversation(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        assert_answers(edge, network)
        assert_answers(edge, network)
    cloud.stop()
    assert cloud.events == [CloudEvent.CONNECTED, *2 * (PREPARE_EVENTS + TASK_EVENTS)]


def test_a_refused_task_is_not_finished(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge, pytest.raises(NeurosurgeonError):
        edge.infer(MODEL, POINT, network.weights_digest, [torch.ones(1)])
    cloud.stop()
    assert cloud.events == [CloudEvent.CONNECTED]


# ---------------------------------------------------------------- refusals leave the conversation alive


def test_different_weights_are_named_before_any_tensor_is_sent(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        edge.ask_to_prepare(MODEL, POINT)
        with pytest.raises(WeightsError, match=f"edge {OTHER_DIGEST}, cloud {network.weights_digest}"):
            edge.wait_until_ready(OTHER_DIGEST)
        assert CloudEvent.EDGE_OUTPUT not in cloud.events
        assert_answers(edge, network)


def test_a_task_with_other_weights_is_refused(cloud: Cloud, network: Network) -> None:
    with cloud.edge() as edge:
        with pytest.raises(WeightsError, match=f"{network.weights_digest} here, not {OTHER_DIGEST}"):
            edge.infer(MODEL, POINT, OTHER_DIGEST, crossing(network, POINT, random_input()))
        assert_answers(edge, network)


@pytest.mark.parametrize("model", ["no_net", "", "os.system", "x" * 2000, "\ud800", "../le_net"])
def test_an_unknown_model_is_refused(cloud: Cloud, network: Network, model: str) -> None:
    with cloud.edge() as edge:
        edge.ask_to_prepare(model, POINT)
        with pytest.raises(UnknownModelError, match="choose from alex_net"):
            edge.wait_until_ready(network.weights_digest)
        assert_answers(edge, network)


@pytest.mark.parametrize("point", [-1, 13, 2**70])
def test_a_point_outside_the_network_is_refused(cloud: Cloud, network: Network, point: int) -> None:
    with cloud.edge() as edge:
        edge.ask_to_prepare(MODEL, point)
        with pytest.raises(PartitionError, match=f"partition point {point} is outside {MODEL}"):
            edge.wait_until_ready(network.weights_digest)
        with pytest.raises(PartitionError):
            edge.infer(MODEL, point, network.weights_digest, [random_input()])
        assert_answers(edge, network)


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [torch.ones(1)],
        [random_input()] * 2,
        [random_input().double()],
        [random_input()[:, :, 1:]],
        [torch.empty(0, 3, 224, 224)],
    ],
    ids=["none", "shape", "two", "dtype", "a row less", "empty"],
)
def test_tensors_that_do_not_cross_there_are_refused(cloud: Cloud, network: Network, tensors: list[Tensor]) -> None:
    with cloud.edge() as edge:
        with pytest.raises(RemoteError, match="crosses at this point, not"):
            edge.infer(MODEL, 0, network.weights_digest, tensors)
        assert_answers(edge, network)


def test_a_message_that_has_no_place_is_refused(cloud: Cloud, network: Network) -> None:
    with connect(*cloud.address) as connection:
        edge = EdgeSession(connection)
        connection.send(Ready(MODEL, POINT, OTHER_DIGEST))
        with pytest.raises(RemoteError, match="Ready has no place here"):
            edge.wait_until_ready(OTHER_DIGEST)
        assert_answers(edge, network)


def test_a_bug_of_the_cloud_is_an_error_without_its_secrets(
    start: Callable[[CloudEngine], Cloud], network: Network
) -> None:
    cloud = start(BrokenEngine("cpu", 1, {}))
    with cloud.edge() as edge:
        for _ in range(2):
            with pytest.raises(RemoteError, match="the task failed in the cloud") as caught:
                edge.infer(MODEL, POINT, network.weights_digest, [])
            assert "secret" not in str(caught.value)


# ---------------------------------------------------------------- strangers, and edges that die


HELLO = frame_of(Hello.of(), [])
STRANGERS = {
    "http": b"GET / HTTP/1.1\r\nHost: cloud\r\n\r\n" + b"x" * HEAD_UNIT,
    "random bytes": bytes(range(256)) * 4,
    "pickle": pickle.dumps({"model": bytes(1000)}),
    "nothing": b"",
    "half a hello": HELLO[:100],
    "no hello": frame_of(Prepare(MODEL, POINT), []),
    "tensors before hello": frame_of(Hello.of(), [torch.ones(3)]),
    "hello, then http": HELLO + b"GET / HTTP/1.1\r\n".ljust(HEAD_UNIT),
    "hello, then an endless body": HELLO + struct.pack("!4sBBHIIQ", b"NSGN", 1, 4, 1, 0, 0, 2**60).ljust(HEAD_UNIT),
}


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_sent_away_and_the_next_edge_served(cloud: Cloud, network: Network, data: bytes) -> None:
    with socket.create_connection(cloud.address, JOIN_S) as stranger:
        stranger.sendall(data)
        try:
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):  # at most the cloud's hello
                pass
        except OSError:  # the cloud was faster, and reset the connection
            pass
    assert_serves(cloud, network)


def test_a_silent_stranger_is_sent_away(cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "HELLO_TIMEOUT_S", 0.02)
    with socket.create_connection(cloud.address, JOIN_S) as stranger:
        assert stranger.recv(1) == b""
    monkeypatch.undo()
    assert_serves(cloud, network)


def test_an_edge_that_stops_in_the_middle_of_a_frame_is_sent_away(
    cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "HEAD_TIMEOUT_S", 0.02)
    with socket.create_connection(cloud.address, JOIN_S) as stranger:
        stranger.sendall(HELLO[:100])
        assert stranger.recv(1) == b""
    monkeypatch.undo()
    assert_serves(cloud, network)


@pytest.mark.parametrize("end", [socket.socket.close, reset], ids=["closed", "reset"])
def test_an_edge_that_dies_while_it_sends_harms_nobody(
    cloud: Cloud, network: Network, end: Callable[[socket.socket], None]
) -> None:
    request = frame_of(Request(MODEL, 0, network.weights_digest), [random_input()])
    with connect(*cloud.address) as connection:
        EdgeSession(connection)
        connection.sock.sendall(request[: len(request) // 2])
        end(connection.sock)
    assert_serves(cloud, network)
    assert cloud.events.count(CloudEvent.EDGE_OUTPUT) == 1  # of the second edge


def test_an_edge_that_does_not_wait_for_its_answer_harms_nobody(
    start: Callable[[CloudEngine], Cloud], network: Network
) -> None:
    engine = BlockingEngine()
    cloud = start(engine)
    request = Request(MODEL, POINT, network.weights_digest)
    with connect(*cloud.address) as connection:
        EdgeSession(connection)
        connection.send(request, crossing(network, POINT, random_input()))
        assert engine.running.wait(JOIN_S)
        reset(connection.sock)
    engine.may_go_on.set()
    assert_serves(cloud, network)


def test_edges_beyond_the_limit_are_closed(cloud: Cloud, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_CONNECTIONS", 1)
    with cloud.edge() as edge:
        with pytest.raises(PeerGoneError):
            cloud.edge()
        assert_answers(edge, network)


# ---------------------------------------------------------------- an edge among strangers


def answer_once(listener: socket.socket, *messages: Message) -> threading.Thread:
    """Play a cloud that says what it is told to, whatever it hears."""

    def play() -> None:
        with Connection(listener.accept()[0]) as connection:
            for message in messages:
                connection.receive(JOIN_S)
                connection.send(message)

    thread = threading.Thread(target=play)
    thread.start()
    return thread


def test_a_cloud_that_says_no_hello_is_refused(listener: socket.socket) -> None:
    answer_once(listener, Ready(MODEL, POINT, OTHER_DIGEST))
    with pytest.raises(ProtocolError, match="sent Ready, expected Hello"):
        EdgeSession.open(*listener.getsockname())


def test_an_answer_to_another_task_is_refused(listener: socket.socket) -> None:
    answer_once(listener, Hello.of(), Reply(1.0, 1.0, 0.0, 0.0))
    with EdgeSession.open(*listener.getsockname()) as edge, pytest.raises(ProtocolError, match="another task"):
        edge.infer(MODEL, POINT, OTHER_DIGEST, [])


def test_a_server_of_another_protocol_is_refused(listener: socket.socket) -> None:
    def play() -> None:
        with listener.accept()[0] as sock:
            sock.recv(HEAD_UNIT)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(HEAD_UNIT))

    threading.Thread(target=play).start()
    with pytest.raises(ProtocolError, match="not our protocol"):
        EdgeSession.open(*listener.getsockname())


# ---------------------------------------------------------------- the end


def test_stop_lets_a_running_task_finish_and_answer(start: Callable[[CloudEngine], Cloud], network: Network) -> None:
    engine = BlockingEngine()
    cloud = start(engine)
    with cloud.edge() as edge, ThreadPoolExecutor(2) as pool:
        task = pool.submit(assert_answers, edge, network)
        assert engine.running.wait(JOIN_S)
        stopping = pool.submit(cloud.server.stop)
        cloud.serving.join(JOIN_S)  # no more edges are accepted: it is stopping
        with pytest.raises(ConnectError):
            cloud.edge()
        engine.may_go_on.set()
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


# ---------------------------------------------------------------- the cloud's latencies


LATENCIES = Latencies(MODEL, "forest", [1.0, 2.0], [0.5, 1.5], [2.0, 3.0], ["features.0"])


def test_an_edge_learns_what_layers_take_in_the_cloud(listener: socket.socket) -> None:
    server = CloudServer(listener, CloudEngine("cpu", 1, {}), latencies=lambda model: LATENCIES._replace(model=model))
    thread = threading.Thread(target=server.serve)
    thread.start()
    with EdgeSession.open(*listener.getsockname()) as edge:
        assert edge.ask_latencies(MODEL) == LATENCIES
        assert edge.ask_latencies("alex_net").model == "alex_net"
    server.stop()
    thread.join()


def test_a_cloud_without_latencies_refuses(cloud: Cloud) -> None:
    with cloud.edge() as edge, pytest.raises(RemoteError, match="AskLatencies has no place here"):
        edge.ask_latencies(MODEL)


def test_latencies_that_are_no_numbers_are_refused(listener: socket.socket) -> None:
    answer_once(listener, Hello.of(), LATENCIES._replace(low_ms=["a", "b"]))  # type: ignore[list-item]
    with EdgeSession.open(*listener.getsockname()) as edge, pytest.raises(ProtocolError, match="no numbers"):
        edge.ask_latencies(MODEL)
