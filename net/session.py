"""The two sides of a conversation: the edge asks, the cloud serves many edges at once and outlives them all."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from net.framing import DEFAULT_LIMITS, SMALL_LIMITS
from net.messages import (
    AskLatencies,
    ErrorCode,
    ErrorReply,
    Hello,
    Latencies,
    Prepare,
    Ready,
    Reply,
    Request,
    error_of,
    reply_of,
)
from net.net_utils import format_address
from net.transport import Connection, Received, accepted, connect, stop_accepting
from utils.errors import DeadlineError, NetworkError, NeurosurgeonError, PeerGoneError, ProtocolError, WeightsError
from utils.timing import StageTimes, now_ms
from utils.units import MS_PER_S, s_to_ms

if TYPE_CHECKING:  # an edge says hello, and hears that nobody is there, before it spends a second on torch
    from torch import Tensor

    from utils.inference_utils import CloudEngine

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 120.0  # a small server may build a large network first
REPLY_TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 600.0
MAX_CONNECTIONS = 256
GRACE_S = 10.0  # a stopping cloud finishes what runs, at most this long


# ---------------------------------------------------------------- the edge's side

Answer = TypeVar("Answer", Hello, Latencies, Ready, Reply)


@dataclass(frozen=True, slots=True)
class RemoteResult:
    """The cloud's answer to one task, and where the time went, seen from the edge."""

    tensors: list[Tensor]
    transfer_ms: float  # round trip less what the cloud spent
    cloud_ms: float  # all that the cloud spent
    compute_ms: float  # of it, running the network
    receive_ms: float  # from the first byte of the request to its last, seen from the cloud
    load_queue_ms: float  # what tasks of all edges wait in the cloud of late
    sent_bytes: int


class SentTask(NamedTuple):
    """When a task began to go out (`now_ms`), and how many bytes it had."""

    start_ms: float
    size_bytes: int


class EdgeSession:
    """A conversation with a cloud; use it in a ``with`` block."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.host = connection.peer.rpartition(":")[0]
        self._tasks = 0
        start_ms = now_ms()
        connection.send(Hello.of())
        hello, _ = self._expect(Hello, HELLO_TIMEOUT_S)
        self.rtt_ms = now_ms() - start_ms
        self.cloud = hello.capabilities
        connection.limits = DEFAULT_LIMITS

    @classmethod
    def open(cls, host: str, port: int) -> EdgeSession:
        """Connect and say hello.

        Raises: UsageError: the address makes no sense. NetworkError: nobody there, or no cloud of ours.
        """
        connection = connect(host, port, SMALL_LIMITS)
        try:
            return cls(connection)
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> EdgeSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation; whoever waits for an answer, in another thread, is told that the peer is gone."""
        self._connection.stop_reading()
        self._connection.close()

    def ask_latencies(self, model: str) -> Latencies:
        """Return what the cloud says that the model's layers take there.

        Raises: NetworkError; UnknownModelError, PlanningError: the cloud has no latencies for it.
        """
        self._connection.send(AskLatencies(model))
        latencies, _ = self._expect(Latencies, READY_TIMEOUT_S)
        columns = (latencies.latency_ms, latencies.low_ms, latencies.high_ms)
        if not all(type(value) is float for column in columns for value in column):
            raise ProtocolError(f"{self._connection.peer} sent latencies that are no numbers")
        return latencies

    def ask_to_prepare(self, model: str, point: int) -> None:
        """Name the model and the partition point; the cloud gets ready while this side does the same."""
        self._connection.send(Prepare(model, point))

    def wait_until_ready(self, weights_digest: str) -> None:
        """Wait for the cloud, and compare the weights of the two sides before any tensor is sent.

        Raises: WeightsError: they differ. NetworkError; UnknownModelError, PartitionError: the cloud refused.
        """
        ready, _ = self._expect(Ready, READY_TIMEOUT_S)
        if ready.weights_digest != weights_digest:
            raise WeightsError(
                f"the two sides hold different weights of {ready.model}: edge {weights_digest}, "
                f"cloud {ready.weights_digest}; start both with the same --weights or --pretrained"
            )

    def infer(
        self,
        model: str,
        point: int,
        weights_digest: str,
        tensors: Sequence[Tensor],
        on_sent: Callable[[], None] = lambda: None,
    ) -> RemoteResult:
        """Send what crosses, and return what the cloud makes of it.

        Args:   on_sent: called when the last byte has been handed to the network.
        Raises: NetworkError, or what the cloud answered.
        """
        self._tasks += 1
        sent = self.send_task(self._tasks, Request(model, point, weights_digest), tensors)
        on_sent()
        received = self.receive_answer(REPLY_TIMEOUT_S)
        if received.task != self._tasks:
            raise ProtocolError(f"{self._connection.peer} answered another task")
        return self.result_of(received, sent)

    def send_task(self, task: int, request: Request, tensors: Sequence[Tensor]) -> SentTask:
        """Send a task without waiting for its answer.

        Raises: NetworkError.
        """
        sent_before, start_ms = self._connection.sent_bytes, now_ms()
        self._connection.send(request, tensors, task)
        return SentTask(start_ms, self._connection.sent_bytes - sent_before)

    def receive_answer(self, wait_s: float) -> Received:
        """Return the next answer of the cloud, to whatever task, waiting at most ``wait_s`` for it.

        Raises: NetworkError.
        """
        return self._connection.receive(wait_s)

    def result_of(self, received: Received, sent: SentTask) -> RemoteResult:
        """Return what an answer that has just come means for its task.

        Raises: what the cloud answered; ProtocolError: its figures cannot be true.
        """
        reply, round_trip_ms = received.message, now_ms() - sent.start_ms
        if isinstance(reply, ErrorReply):
            raise error_of(reply)
        peer = self._connection.peer
        if not isinstance(reply, Reply):
            raise ProtocolError(f"{peer} sent {type(reply).__name__}, expected Reply")
        if not 0 <= reply.cloud_ms <= round_trip_ms:  # false for NaN, too
            raise ProtocolError(f"{peer} says that it took {reply.cloud_ms:g} ms of {round_trip_ms:g}")
        return RemoteResult(
            tensors=[tensor.clone() for tensor in received.tensors],
            transfer_ms=round_trip_ms - reply.cloud_ms,
            cloud_ms=reply.cloud_ms,
            compute_ms=reply.compute_ms,
            receive_ms=reply.receive_ms,
            load_queue_ms=reply.load_queue_ms,
            sent_bytes=sent.size_bytes,
        )

    def _expect(self, expected: type[Answer], wait_s: float) -> tuple[Answer, Received]:
        received = self._connection.receive(wait_s)
        message = received.message
        if isinstance(message, ErrorReply):
            raise error_of(message)
        if not isinstance(message, expected):
            raise ProtocolError(f"{self._connection.peer} sent {type(message).__name__}, expected {expected.__name__}")
        return message, received


# ---------------------------------------------------------------- the cloud's side


class CloudEvent(Enum):
    """What happened in a conversation; scripts turn these into lines."""

    CONNECTED = auto()
    MODEL_TYPE = auto()
    PARTITION_POINT = auto()
    EDGE_OUTPUT = auto()
    TRANSFER_LATENCY_SENT = auto()
    CLOUD_LATENCY_SENT = auto()
    FINISHED = auto()


Observer = Callable[[CloudEvent, socket.socket], None]
LatencySource = Callable[[str], Latencies]


class CloudServer:
    """Serves edges on a listening socket, a thread for each connection, until it is stopped."""

    def __init__(
        self,
        listener: socket.socket,
        engine: CloudEngine,
        observe: Observer = lambda event, sock: None,
        latencies: LatencySource | None = None,
    ) -> None:
        self._listener = listener
        self._engine = engine
        self._observer = observe
        self._latencies = latencies
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._stopping = False

    def serve(self) -> None:
        """Accept edges until `stop` is called."""
        for sock, address in accepted(self._listener):
            peer = format_address(address)
            thread = threading.Thread(target=self._serve_one, args=(sock, peer), daemon=True)
            with self._lock:
                full = len(self._threads) >= MAX_CONNECTIONS
                if not (full or self._stopping):
                    self._threads.add(thread)
                    thread.start()
                    continue
            sock.close()
            if full:
                log.warning("%s refused: %d edges are connected", peer, MAX_CONNECTIONS)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Stop accepting and reading; what has arrived is computed and answered, within ``grace_s``."""
        stop_accepting(self._listener)
        with self._lock:
            self._stopping = True
            running = list(self._threads)
            for connection in self._connections:
                connection.stop_reading()
        deadline_ms = now_ms() + s_to_ms(grace_s)
        for thread in running:
            thread.join(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))
        self._engine.close(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))

    def _serve_one(self, sock: socket.socket, peer: str) -> None:
        try:
            with Connection(sock, SMALL_LIMITS) as connection, self._known(connection):
                self._converse(connection)
        except PeerGoneError as exc:
            log.debug("%s left: %s", peer, exc)
        except (NetworkError, OSError) as exc:
            log.warning("closed the connection of %s: %s", peer, exc)
        except Exception as exc:
            log.error(
                "closed the connection of %s after an error of our own: %r", peer, exc, exc_info=_show_traceback()
            )
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _converse(self, connection: Connection) -> None:
        if not isinstance(connection.receive(HELLO_TIMEOUT_S).message, Hello):
            raise ProtocolError(f"{connection.peer} did not say hello")
        self._observe(CloudEvent.CONNECTED, connection.sock)
        connection.limits = DEFAULT_LIMITS
        connection.send(Hello.of(device=self._engine.device, threads=self._engine.threads))
        while True:  # until the peer leaves, or we stop reading
            self._answer(connection, connection.receive(IDLE_TIMEOUT_S))

    @contextmanager
    def _known(self, connection: Connection) -> Iterator[None]:
        """Let `stop` reach a connection as long as it lives."""
        with self._lock:
            self._connections.add(connection)
            if self._stopping:
                connection.stop_reading()
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _observe(self, event: CloudEvent, sock: socket.socket) -> None:
        """Tell the observer; what becomes of its lines is no matter of the conversation."""
        try:
            self._observer(event, sock)
        except (OSError, ValueError) as exc:  # its output is closed
            log.debug("%s was not shown: %s", event.name, exc)

    def _answer(self, connection: Connection, received: Received) -> None:
        """Answer one message; a request that cannot be served gets a typed error, and the conversation goes on."""
        try:
            match received.message:
                case AskLatencies(model) if self._latencies:
                    connection.send(self._latencies(model))
                case Prepare() as prepare:
                    self._prepare(connection, prepare)
                case Request() as request:
                    self._run(connection, request, received)
                case other:
                    raise ProtocolError(f"a {type(other).__name__} has no place here")
        except (PeerGoneError, DeadlineError):
            raise
        except NeurosurgeonError as exc:
            log.warning("refused %s: %s", connection.peer, exc)
            connection.send(reply_of(exc), task=received.task)
        except Exception as exc:
            log.error("a task of %s failed: %r", connection.peer, exc, exc_info=_show_traceback())
            answer = ErrorReply(str(ErrorCode.INTERNAL), "the task failed in the cloud; its log says why")
            connection.send(answer, task=received.task)

    def _prepare(self, connection: Connection, message: Prepare) -> None:
        network = self._engine.network(message.model)
        self._observe(CloudEvent.MODEL_TYPE, connection.sock)
        network.cut(message.point)
        self._observe(CloudEvent.PARTITION_POINT, connection.sock)
        connection.send(Ready(message.model, message.point, network.weights_digest))

    def _run(self, connection: Connection, request: Request, received: Received) -> None:
        start_ms = now_ms()
        network = self._engine.network(request.model)
        if request.weights_digest != network.weights_digest:
            raise WeightsError(
                f"{request.model} has the weights {network.weights_digest} here, not {request.weights_digest}"
            )
        wait = self._engine.submit(request.model, request.point, received.tensors)
        self._observe(CloudEvent.EDGE_OUTPUT, connection.sock)  # while the half already runs
        result = wait()
        reply = Reply(
            cloud_ms=now_ms() - start_ms,
            compute_ms=result.compute_ms,
            queue_ms=result.queue_ms,
            receive_ms=received.receive_ms,
        )
        connection.send(reply, result.tensors, received.task)
        for event in (CloudEvent.TRANSFER_LATENCY_SENT, CloudEvent.CLOUD_LATENCY_SENT, CloudEvent.FINISHED):
            self._observe(event, connection.sock)


def _show_traceback() -> bool:
    return log.isEnabledFor(logging.DEBUG)


def stage_times(edge_ms: float, remote: RemoteResult | None) -> StageTimes:
    """Return the measured stages of a task; nothing crossed where there is no remote result."""
    return StageTimes(edge_ms, remote.transfer_ms if remote else 0.0, remote.cloud_ms if remote else 0.0)
