"""Harm that a hostile or unlucky peer must not do; each was once possible."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from neurosurgeon.cli.process import ROOT
from neurosurgeon.cloud.conversation import Service
from neurosurgeon.cloud.executor import Executor
from neurosurgeon.cloud.server import CloudServer
from neurosurgeon.cloud.store import NetworkStore
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import Kind, pack_frame
from neurosurgeon.net.header import MAX_TUPLES, check_tensor_specs, unpack_header
from neurosurgeon.net.messages import Hello, Ping, Pong, Reply, Request, Samples
from neurosurgeon.net.monitor_client import measure_link
from neurosurgeon.net.monitor_server import MonitorServer
from neurosurgeon.net.probe import PROBE_BYTES
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.net.sockets import accepted, connect, stop_accepting
from neurosurgeon.utils.errors import NetworkError, NeurosurgeonError, ProtocolError
from tests.net.clouds import request_at
from tests.networks import ENGINE, cut, load_network, random_input


@pytest.fixture
def executor() -> Iterator[Executor]:
    """A worker that ends with the test."""
    one = Executor(ENGINE)
    yield one
    one.close()


def test_a_peer_that_left_before_accept_is_a_typed_error(listener: socket.socket) -> None:
    near = socket.create_connection(listener.getsockname())
    far = listener.accept()[0]
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    near.close()
    with pytest.raises(NetworkError), Connection(far) as connection:
        connection.receive(5)


@pytest.mark.parametrize(
    "samples",
    [
        Samples([0, 1], [1]),
        Samples(["a"], ["b"]),  # type: ignore[list-item]
        Samples([], []),
        Samples([5, 0], [1, PROBE_BYTES[0] - 1]),
        Samples([0, 1, 2, 1_000_000], [0, 0, 0, PROBE_BYTES[0]]),
        Samples([0, 2**2000], [1, PROBE_BYTES[0] - 1]),
    ],
)
def test_impossible_samples_are_refused(samples: Samples, listener: socket.socket) -> None:
    def serve() -> None:
        with Connection(listener.accept()[0]) as connection:
            connection.receive(5)
            connection.send(Hello.of())
            while isinstance(ping := connection.receive(5).message, Ping):
                connection.send(Pong(ping.sequence))
            list(connection.receive_raw(PROBE_BYTES[0], memoryview(bytearray(PROBE_BYTES[0]))))
            connection.send(samples)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    with pytest.raises(ProtocolError):
        measure_link(*listener.getsockname())
    server.join()


def test_a_deeply_nested_header_does_not_end_the_service(listener: socket.socket) -> None:
    server = threading.Thread(target=MonitorServer(listener).serve, daemon=True)
    server.start()
    hello = b"\x80\x05K\x01}\x8c\x01a" + b"]" * 1500 + b"a" * 1499 + b"s\x86]\x86."
    with connect(*listener.getsockname()) as peer:
        peer.send(Hello.of())
        peer.receive(5)
        peer.sock.sendall(b"".join(pack_frame(Kind.HELLO, hello)))
        with pytest.raises(NetworkError):
            peer.receive(5)
    assert measure_link(*listener.getsockname()).rate_bytes_per_s > 0
    stop_accepting(listener)
    server.join()


def test_nested_tuples_are_bounded_because_hashing_them_recurses() -> None:
    with pytest.raises(ProtocolError):
        unpack_header(b"\x80\x05})" + b"\x85" * (MAX_TUPLES + 1) + b"Ns\x85.")


def test_an_empty_tensor_of_huge_sizes_is_refused() -> None:
    with pytest.raises(ProtocolError):
        check_tensor_specs([("float32", (2**39, 2**39, 0), False)], [0])


def test_a_failed_accept_does_not_end_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener:
        answers = [OSError(errno.EMFILE, "too many"), OSError(errno.ECONNABORTED, "aborted"), ("sock", "address")]

        def accept(self) -> object:
            answer = self.answers.pop(0) if self.answers else OSError(errno.EINVAL, "shut down")
            if isinstance(answer, OSError):
                raise answer
            return answer

        def fileno(self) -> int:
            return 3

    monkeypatch.setattr("neurosurgeon.net.sockets.ACCEPT_PAUSE_S", 0.0)
    assert list(accepted(Listener())) == [("sock", "address")]  # type: ignore[arg-type]


def test_a_server_with_a_short_answer_is_refused_at_once(listener: socket.socket) -> None:
    def answer() -> None:
        with listener.accept()[0] as sock:
            sock.recv(4096)
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server = threading.Thread(target=answer, daemon=True)
    server.start()
    with pytest.raises(ProtocolError, match="not our protocol"):
        EdgeSession.open(*listener.getsockname())
    server.join()


def test_stopping_twice_is_fine(listener: socket.socket, executor: Executor) -> None:
    server = CloudServer(listener, Service(executor, NetworkStore(executor, {})))
    server.stop()
    server.stop()


def test_a_closed_executor_takes_no_task(executor: Executor) -> None:
    executor.close()
    with pytest.raises(NeurosurgeonError, match="stopping"):
        executor.submit("edge", cut(load_network("le_net"), 0).cloud, [random_input()])


def test_an_observer_whose_output_is_closed_does_not_disturb_the_conversation(
    listener: socket.socket, executor: Executor
) -> None:
    def closed(event: object, sock: object) -> None:
        raise BrokenPipeError

    server = CloudServer(listener, Service(executor, NetworkStore(executor, {}), closed))
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    network = load_network("le_net")
    with EdgeSession.open(*listener.getsockname()) as session:
        for _ in range(2):
            result = session.infer(request_at(network, 0), [random_input()])
            assert result.arrays[0].shape == (1, 1000)
    server.stop()
    thread.join()


def test_an_impossible_compute_time_is_refused(listener: socket.socket) -> None:
    def serve() -> None:
        with Connection(listener.accept()[0]) as connection:
            connection.receive(5)
            connection.send(Hello.of())
            request = connection.receive(5)
            assert isinstance(request.message, Request)
            connection.send(Reply(float("nan"), 0.0, 0.0, 0.0), [random_input()], request.task)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    with (
        EdgeSession.open(*listener.getsockname()) as session,
        pytest.raises(ProtocolError, match="impossible duration"),
    ):
        session.infer(request_at(load_network("le_net"), 0), [random_input()])
    server.join()


def test_loading_a_model_does_not_disturb_a_running_task() -> None:
    script = (
        "import threading\n"
        "from neurosurgeon.cloud.executor import Executor\n"
        "from neurosurgeon.cloud.store import NetworkStore\n"
        "from neurosurgeon.engine.base import Side\n"
        "from tests.networks import ENGINE, random_input\n"
        "executor = Executor(ENGINE)\n"
        "store = NetworkStore(executor, {})\n"
        "network = store.network('le_net')\n"
        "partition = network.partition(network.ref.graph.edge_nodes(0), Side.CLOUD)\n"
        "loader = threading.Thread(target=lambda: [store.network(n) for n in ('mobile_net', 'alex_net')])\n"
        "loader.start()\n"
        "while loader.is_alive():\n"
        "    executor.submit('edge', partition, [random_input()]).result()\n"
        "executor.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
