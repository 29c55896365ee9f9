"""One conversation with an edge: the messages that it sends, and the replies.

Threads. Each conversation has two:

    reader   receives the edge's messages, and submits its tasks to the workers
    writer   sends everything after the hello: replies, errors, and a heartbeat after a second without a reply

The workers of the `Executor` compute. They never send: a future's done callback puts the reply into the outbox.

    reader -- submit --> workers -- done callback --> outbox -- writer --> edge
       +---- refusals, and replies that the reader makes itself

The outbox is a queue of two kinds of item: an `UnsentReply`, and None, which stops the writer.

Backpressure. A message takes a slot before it is read, and its reply releases the slot. An edge that does not read its
replies fills its socket, then `MAX_UNANSWERED` slots; then its messages are not read any more.

The reader blocks for seconds while it loads or traces a network, or while a worker measures latencies for it.

Ownership. The reader alone receives; after the hello, the writer alone sends. The arrays of a request belong to its
task; their memory is freed when the worker's batch has ended. The result shares no memory with them. A future is shared
by all connections that sent the same task (`ReplyCache`). If the connection that submitted it ends before it is
computed, the thread that ends it cancels the future, and submits the task again for the others.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np

from neurosurgeon.cloud.events import Observer, TaskLines
from neurosurgeon.cloud.executor import CloudResult, Executor
from neurosurgeon.cloud.reply_cache import ReplyCache
from neurosurgeon.cloud.store import NetworkStore
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.connection import Connection, Received
from neurosurgeon.net.frames import DEFAULT_LIMITS, Limits
from neurosurgeon.net.messages import (
    AskLatencies,
    ErrorCode,
    ErrorReply,
    Hello,
    Latencies,
    Message,
    Pong,
    Prepare,
    Ready,
    Reply,
    Request,
    reply_of,
    task_id,
)
from neurosurgeon.utils.errors import BusyError, NeurosurgeonError, NonFiniteError, PeerGoneError, ProtocolError
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.timing import now_ms

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 600.0
MAX_UNANSWERED = 32  # messages of one edge; more than may wait in the executor, so that an edge receives a busy reply
HEARTBEAT_S = 1.0  # a heartbeat is sent after so long without a reply
DELIVERY_S = 1.0  # the last replies reach the edge over any link within this time, or it is disconnected


class LatencySource(Protocol):
    """The source of the latencies of layers in this cloud."""

    def __call__(self, model: str, graph: LayerGraph) -> Latencies:
        """Return the latencies of a model's layers. May block for seconds."""

    def computed(self, model: str, cut: bytes, compute_ms: float) -> None:
        """Compare the compute time of a task with its prediction.

        Args: cut: the bit mask of the nodes on the edge.
        """


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits of an authenticated edge."""

    frames: Limits = DEFAULT_LIMITS
    allows_nonfinite: bool = False  # tensors with NaN or infinite values


@dataclass(frozen=True, slots=True)
class Service:
    """The objects that all conversations share."""

    executor: Executor
    store: NetworkStore
    observe: Observer = lambda event, sock: None
    latencies: LatencySource | None = None
    rules: Rules = Rules()
    replies: ReplyCache = field(default_factory=ReplyCache)


class UnsentReply(NamedTuple):
    """The reply to a message, or the error or result from which the writer makes it."""

    received: Received
    content: Message | Exception | CloudResult
    arrived_ms: float


class Conversation:
    """One edge: the thread that calls `hold` reads and submits, a second one sends. See the top of this module."""

    def __init__(self, connection: Connection, hello: Hello, service: Service) -> None:
        self.connection = connection
        self._service = service
        self._hello = hello
        self._recent: deque[bytes] = deque(maxlen=MAX_UNANSWERED)  # ids of tasks
        self._counted = (0, 0)  # bytes received and sent, as added to the metrics
        self._lines = TaskLines(service.observe, connection.sock)
        self._outbox: SimpleQueue[UnsentReply | None] = SimpleQueue()
        self._slots: SimpleQueue[None] = SimpleQueue()  # an item for each message that may be read
        self._release_all_slots()
        self._is_over = False  # set by the writer: no reply can be sent any more
        self._writer = threading.Thread(target=self._write, name=f"write {connection.peer}", daemon=True)

    def hold(self, stopping: threading.Event) -> None:
        """Serve an authenticated edge until it leaves, or until ``stopping`` and all received messages have replies.

        Called on the reader. Blocks.

        Raises: NetworkError: the reason of the end.
        """
        executor = self._service.executor
        self._lines.connected()
        self.connection.limits = self._service.rules.frames
        self.connection.send(Hello.of(device=executor.engine.device, threads=executor.threads))
        self._writer.start()
        try:
            while True:
                self._slots.get()
                if self._is_over:
                    break
                self._handle(self.connection.receive(IDLE_TIMEOUT_S), now_ms())
        except PeerGoneError:
            if stopping.is_set():
                self._slots.put(None)  # that of the message that did not arrive
                self._deliver_all()
            raise
        except ProtocolError:
            self._service.replies.forget(tuple(self._recent))  # these requests may be damaged, too: cache no reply
            raise
        except NeurosurgeonError:
            raise
        except Exception as exc:  # an internal error, with a message read in part: no later one can be read
            self._put_reply(Received(self._hello, (), self.connection.reading, 0.0), exc, now_ms())
            self._deliver_all()
        finally:
            self.abort()
            self._writer.join()
            executor.drop(self)  # after `_is_over` is set, so that no cancelled task is submitted again

    def abort(self) -> None:
        """End the conversation, with replies unsent. Called on any thread."""
        self.connection.break_off()
        self._outbox.put(None)

    def _release_all_slots(self) -> None:
        for _ in range(MAX_UNANSWERED):
            self._slots.put(None)

    def _deliver_all(self) -> None:
        """Wait until all received messages have replies, and these have arrived."""
        for _ in range(MAX_UNANSWERED):
            self._slots.get()
        self.connection.wait_until_delivered(DELIVERY_S)

    # ---------------------------------------------------------------- reading

    def _handle(self, received: Received, arrived_ms: float) -> None:
        """Reply to one message, or submit its task; reply with a typed error if it cannot be served."""
        try:
            if received.refusal:
                raise received.refusal
            match received.message:
                case Request() as request:
                    self._submit(request, received, arrived_ms)
                case Prepare() as prepare:
                    ready = Ready(prepare.model, self._service.store.prepare(prepare))
                    self._guard(received, partial(self._lines.prepared, prepare))  # before its first task arrives
                    self._put_reply(received, ready, arrived_ms)
                case AskLatencies(model, digest) if latencies := self._service.latencies:
                    graph = self._service.store.graph(model, digest)
                    self._put_reply(received, latencies(model, graph), arrived_ms)
                case other:
                    raise ProtocolError(f"unexpected message: this cloud does not serve {type(other).__name__}")
        except Exception as exc:
            self._put_reply(received, exc, arrived_ms)

    def _submit(self, request: Request, received: Received, arrived_ms: float) -> None:
        service = self._service
        partition = service.store.partition(request, received.arrays)
        if not service.rules.allows_nonfinite:
            check_finite(received.arrays)
        self._guard(received, partial(self._lines.arrived, received.task, request))
        compute = partial(service.executor.submit, self, partition, received.arrays)
        if self._hello.edge_id and received.task:
            key = task_id(self._hello.edge_id, received.task)
            self._recent.append(key)
            future = service.replies.get_or_compute(key, request, compute)
        else:  # a task without an id of its own
            future = compute()
        future.add_done_callback(partial(self._put_result, received, arrived_ms))

    def _put_result(self, received: Received, arrived_ms: float, future: Future[CloudResult]) -> None:
        """Put a task's reply into the outbox.

        Called on the worker that computed it; on this reader, if its reply was cached; on the thread that cancels it.
        """
        if not future.cancelled():
            error = future.exception()
            content = error if isinstance(error, Exception) else future.result()
            self._put_reply(received._replace(arrays=()), content, arrived_ms)  # the arrays' memory can be freed
        elif not self._is_over:  # the connection that submitted the task is over, and this one is not
            self._handle(received, arrived_ms)

    def _put_reply(self, received: Received, content: Message | Exception | CloudResult, arrived_ms: float) -> None:
        self._outbox.put(UnsentReply(received, content, arrived_ms))

    # ---------------------------------------------------------------- writing

    def _write(self) -> None:
        reply: UnsentReply | None = None
        try:
            while reply := self._next_reply():
                received, sent = reply.received, self._send(reply)
                self._slots.put(None)
                self._guard(received, partial(self._record, received, sent))
                reply = None  # its memory is not held while the edge is silent
        except Exception as exc:
            log_end(self.connection.peer, exc, self._title(reply.received) if reply else "")
        finally:
            self._is_over = True
            self.connection.break_off()
            self._release_all_slots()  # so that the reader sees the end

    def _next_reply(self) -> UnsentReply | None:
        """Return the next reply, or None to stop; send a heartbeat with the load for every second without one."""
        while True:
            try:
                return self._outbox.get(timeout=HEARTBEAT_S)
            except Empty:
                load = self._service.executor.load
                self.connection.send(Pong(0, load.queue_ms, load.service_ms))

    def _send(self, reply: UnsentReply) -> Message:
        """Send a reply, or an error reply if that fails; return the message that was sent."""
        try:
            return self._send_content(reply)
        except Exception as exc:
            if self.connection.is_mid_frame:  # the edge has left, or would read another frame as the rest of this one
                raise
            refusal = self._refusal(exc, reply.received)
            self.connection.send(refusal, task=reply.received.task)
            return refusal

    def _send_content(self, unsent: UnsentReply) -> Message:
        """Send a reply; return its message.

        Raises: the error of the task. NetworkError.
        """
        received, content = unsent.received, unsent.content
        if isinstance(content, Exception):
            raise content
        if not isinstance(content, CloudResult):
            self.connection.send(content, task=received.task)
            return content
        result, load = content, self._service.executor.load
        reply = Reply(
            cloud_ms=now_ms() - unsent.arrived_ms,
            compute_ms=result.compute_ms,
            queue_ms=result.queue_ms,
            receive_ms=received.receive_ms,
            load_queue_ms=load.queue_ms,
            load_service_ms=load.service_ms,
        )
        self.connection.send(reply, result.arrays, received.task)
        return reply

    def _guard(self, received: Received, show: Callable[[], None]) -> None:
        """Call `show` for a message; an error in it is logged, and does not end the conversation."""
        try:
            show()
        except Exception as exc:
            peer = self.connection.peer
            internal_error(log, exc, f"observer of {self._title(received)} of {peer} failed", peer=peer)

    def _record(self, received: Received, sent: Message) -> None:
        """Count a reply that was sent, and report it to the observer."""
        counted = (self.connection.received_bytes, self.connection.sent_bytes)
        self._service.executor.metrics.transferred(counted[0] - self._counted[0], counted[1] - self._counted[1])
        self._counted = counted
        match received.message, sent:
            case Request() as request, Reply() as reply:
                self._lines.ended(received.task, request, is_answered=True)
                self._record_task(received, request, reply)
            case Request() as request, _:
                self._lines.ended(received.task, request, is_answered=False)

    def _record_task(self, received: Received, request: Request, reply: Reply) -> None:
        self._service.executor.metrics.answered(
            request.model,
            receive_ms=reply.receive_ms,
            queue_ms=reply.queue_ms,
            compute_ms=reply.compute_ms,
            cloud_ms=reply.cloud_ms,
        )
        if self._service.latencies:
            self._service.latencies.computed(request.model, request.edge_nodes, reply.compute_ms)
        if log.isEnabledFor(logging.DEBUG):
            fields = {"model": request.model, "duration_ms": round(reply.cloud_ms, 3)}
            peer, name = self.connection.peer, self._name_of(received.task)
            log.debug("answered task %s of %s", name, peer, extra={"peer": peer, "task": name, **fields})

    def _name_of(self, task: int) -> str:
        """Return the name of a task in the log: unique, without its secret id."""
        edge_id = self._hello.edge_id
        return f"{edge_id[:4].hex()}/{task}" if edge_id else str(task)

    def _title(self, received: Received) -> str:
        """Return the name of a message in the log: its task and network."""
        model = getattr(received.message, "model", None)
        name = f"task {self._name_of(received.task)}" if received.task else type(received.message).__name__
        return f"{name} ({model})" if model else name

    def _refusal(self, exc: Exception, received: Received) -> ErrorReply:
        """Return the reply for an error, and log it; that for an internal error has no details of it."""
        self._service.executor.metrics.failed(type(exc).__name__)
        peer, task = self.connection.peer, self._name_of(received.task)
        if isinstance(exc, NeurosurgeonError):
            level = logging.DEBUG if isinstance(exc, BusyError) else logging.WARNING  # busy: the edge retries
            log.log(level, "refused %s: %s", peer, exc, extra={"peer": peer, "error": type(exc).__name__, "task": task})
            return reply_of(exc)
        internal_error(log, exc, f"{self._title(received)} of {peer} failed", peer=peer, task=task)
        return ErrorReply(str(ErrorCode.INTERNAL), "internal error: the task failed in the cloud; its log says why")


def log_end(peer: str, exc: Exception, answering: str = "") -> None:
    """Log the reason of a connection's end: one line, or the traceback of an internal error.

    Args: answering: the message whose reply could not be sent.
    """
    if isinstance(exc, PeerGoneError):
        log.debug("%s left: %s", peer, exc, extra={"peer": peer})
    elif isinstance(exc, NeurosurgeonError):
        log.warning("closed the connection of %s: %s", peer, exc, extra={"peer": peer, "error": type(exc).__name__})
    else:
        when = f" while answering {answering}" if answering else ""
        internal_error(log, exc, f"closed the connection of {peer}{when}", peer=peer)


def check_finite(arrays: Sequence[Array]) -> None:
    """Check that no array has NaN or infinite values; it takes two passes over them.

    Raises: NonFiniteError.
    """
    for number, array in enumerate(arrays):
        if not is_finite(array.ravel("K")):  # a view in the order of its memory
            raise NonFiniteError(
                f"tensor {number} holds NaN or infinite values: check the input and the weights, or start the cloud "
                "with --allow-nonfinite"
            )


def is_finite(values: Array) -> bool:
    """Return whether no value, (n,), is NaN or infinite; one that is would be the largest or the smallest."""
    if values.dtype == np.uint16:  # the bits of bfloat16: those values have an exponent of all ones
        return not ((values & 0x7F80) == 0x7F80).any()
    if values.dtype.kind != "f" or not values.size:
        return True
    return math.isfinite(np.maximum.reduce(values)) and math.isfinite(np.minimum.reduce(values))
