"""The cloud's side of conversations: many edges at once, many tasks of each in flight, and none blocks another.

Threads. `CloudServer.serve` accepts connections on the caller's thread. Each connection has two threads:

    reader   authenticates the edge, receives its messages, and submits its tasks to the engine's workers
    writer   sends everything after the hello: replies, errors, and a heartbeat when it had nothing to send for a second

The workers of `CloudEngine` compute. They never send: a future's done callback puts the reply into the outbox.

    reader -- submit --> workers -- done callback --> outbox -- writer --> edge
       +---- refusals, replies that need no worker ---^

The outbox is a queue of two kinds of item: an `Outgoing` is one reply, and None stops the writer.

States. A conversation is being introduced (`ConnectionLimiter.authenticate`), then held (`hold`), then over
(`_is_over`). It ends when the edge leaves, a message breaks the protocol, a send fails, or `CloudServer.stop` stops
the reading and its grace is over. The reader then shuts the socket down, joins the writer, and cancels what waits in
the engine. A worker that finishes later puts its reply into an outbox that no thread reads.

A message takes a slot before it is read, and its reply gives the slot back. An edge that does not read its replies
fills its socket, then `MAX_UNANSWERED` slots, and is then not read any more: that is the backpressure.

Who owns what. The reader alone receives, and the writer alone sends. The memory of a request belongs to its task until
the result is there, which shares no memory with it; the writer releases it before it sends the reply. What is left is
released when the connection is closed. A future is shared by all connections that ask for the same task (`ReplyCache`);
if the connection whose task it was ends before it is computed, the future is cancelled, and the others submit it again.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from neurosurgeon.cloud.events import Observer, TaskLines
from neurosurgeon.cloud.executor import CloudEngine, CloudResult
from neurosurgeon.cloud.reply_cache import ReplyCache
from neurosurgeon.engine.torch_engine import check_finite
from neurosurgeon.graph.cut import unpack_nodes
from neurosurgeon.net.connection import EDGE_SILENCE_S, Connection, Received
from neurosurgeon.net.frames import DEFAULT_LIMITS, Limits
from neurosurgeon.net.limits import ConnectionLimiter
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
from neurosurgeon.net.sockets import stop_accepting
from neurosurgeon.utils.errors import BusyError, NeurosurgeonError, PeerGoneError, ProtocolError
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S, s_to_ms

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 600.0
MAX_UNANSWERED = 32  # messages of one edge; more than may wait in the engine, so that an edge hears that it is busy
HEARTBEAT_S = 1.0  # a heartbeat is sent after so long without a reply
DELIVERY_S = 1.0  # the last replies reach the edge over any link within this time, or it is gone
GRACE_S = 10.0  # a stopping cloud finishes what runs, at most this long


class LatencySource(Protocol):
    """What the layers of models take in this cloud."""

    def __call__(self, model: str) -> Latencies:
        """Return what a model's layers take. May block for seconds."""

    def computed(self, model: str, cut: bytes, compute_ms: float) -> None:
        """Compare a task with what was predicted of it.

        Args: cut: the bit mask of the nodes on the edge.
        """


@dataclass(frozen=True, slots=True)
class Rules:
    """What an edge that was let in may send."""

    frames: Limits = DEFAULT_LIMITS
    allows_nonfinite: bool = False  # tensors with NaN or infinite values


class CloudServer:
    """Serves edges on a listening socket, two threads for each connection, until it is stopped."""

    def __init__(
        self,
        listener: socket.socket,
        engine: CloudEngine,
        observe: Observer = lambda event, sock: None,
        latencies: LatencySource | None = None,
        limiter: ConnectionLimiter | None = None,
        rules: Rules = Rules(),
    ) -> None:
        self._listener = listener
        self._limiter = limiter or ConnectionLimiter()
        self._rules = rules
        self._engine = engine
        self._observe = observe
        self._latencies = latencies
        self._replies = ReplyCache()
        self._lock = threading.Lock()
        self._conversations: set[Conversation] = set()
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()

    def serve(self) -> None:
        """Accept edges until `stop` is called."""
        for connection in self._limiter.accept(self._listener):
            try:
                is_served = self._begin(connection)
            except Exception as exc:  # this machine may have no thread left
                _log_end(connection.peer, exc)
                is_served = False
            if not is_served:
                self._limiter.leave(connection)
                connection.close()

    def _begin(self, connection: Connection) -> bool:
        """Serve a connection on a thread of its own, unless the server stops."""
        thread = threading.Thread(
            target=self._serve_one, args=(connection,), name=f"read {connection.peer}", daemon=True
        )
        with self._lock:
            if self._stopping.is_set():
                return False
            thread.start()
            self._threads.add(thread)
        return True

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Stop accepting and reading; what has arrived is computed and answered, within ``grace_s``."""
        stop_accepting(self._listener)
        deadline_ms = now_ms() + s_to_ms(grace_s)
        with self._lock:
            self._stopping.set()
            running = list(self._threads)
            for conversation in self._conversations:
                conversation.connection.stop_reading()
        self._limiter.send_strangers_away()
        for thread in running:
            thread.join(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))
        with self._lock:
            left = list(self._conversations)
        for conversation in left:  # not under the lock: each ends by itself, too, and needs it
            conversation.break_off()
        self._engine.close(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))

    def _serve_one(self, connection: Connection) -> None:
        peer = connection.peer
        metrics = self._engine.metrics
        metrics.connections(1)
        log.debug("%s connected", peer, extra={"peer": peer})
        try:
            with connection:
                connection.give_up_after(EDGE_SILENCE_S)
                hello = self._limiter.authenticate(connection)
                self._converse(
                    Conversation(
                        connection, hello, self._engine, self._replies, self._observe, self._latencies, self._rules
                    )
                )
        except Exception as exc:
            if not isinstance(exc, PeerGoneError):
                metrics.failed(type(exc).__name__)
            _log_end(peer, exc)
        finally:
            self._limiter.leave(connection)
            metrics.connections(-1)
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _converse(self, conversation: Conversation) -> None:
        """Hold a conversation that `stop` can reach as long as it lives."""
        with self._lock:
            self._conversations.add(conversation)
            if self._stopping.is_set():
                conversation.connection.stop_reading()
        try:
            conversation.hold(self._stopping)
        finally:
            with self._lock:
                self._conversations.discard(conversation)


class Outgoing(NamedTuple):
    """The reply to a message."""

    received: Received
    content: Message | Exception | CloudResult
    arrived_ms: float


class Conversation:
    """One edge: the thread that holds it reads and submits, a second one sends (see the top of this module)."""

    def __init__(
        self,
        connection: Connection,
        hello: Hello,
        engine: CloudEngine,
        replies: ReplyCache,
        observe: Observer,
        latencies: LatencySource | None,
        rules: Rules,
    ) -> None:
        self.connection = connection
        self._engine = engine
        self._replies = replies
        self._hello = hello
        self._edge_id = hello.edge_id
        self._rules = rules
        self._recent: deque[bytes] = deque(maxlen=MAX_UNANSWERED)  # ids of tasks
        self._counted = (0, 0)  # bytes received and sent, as told to the metrics
        self._latencies = latencies
        self._lines = TaskLines(observe, connection.sock)
        self._outbox: SimpleQueue[Outgoing | None] = SimpleQueue()
        self._max_unanswered = MAX_UNANSWERED
        self._slots: SimpleQueue[None] = SimpleQueue()  # one for each message that may be read; waiting here is C
        self._give_slots(self._max_unanswered)
        self._is_over = False  # set by the writer: no reply can be sent any more
        self._writer = threading.Thread(target=self._write, name=f"write {connection.peer}", daemon=True)

    def hold(self, stopping: threading.Event) -> None:
        """Serve an edge that was let in until it leaves, or we stop reading; all that has arrived is answered first.

        Raises: NetworkError: how it ended.
        """
        self._lines.connected()
        self.connection.limits = self._rules.frames
        self.connection.send(Hello.of(device=self._engine.device, threads=self._engine.threads))
        self._writer.start()
        try:
            while self._has_slot():
                self._handle(self.connection.receive(IDLE_TIMEOUT_S), now_ms())
        except PeerGoneError:
            if stopping.is_set():
                self._slots.put(None)  # of the message that did not come
                self._deliver_all()
            raise
        except ProtocolError:
            self._replies.forget(self._recent)  # their bytes may have been mixed up, too
            raise
        except NeurosurgeonError:
            raise
        except Exception as exc:  # a defect, with a message read in part: nothing after it can be read
            self._outbox.put(Outgoing(Received(self._hello, [], self.connection.reading, 0.0), exc, now_ms()))
            self._deliver_all()
        finally:
            self.break_off()
            self._writer.join()
            self._engine.drop(self)  # after `_is_over` is set: what is cancelled is not submitted again

    def break_off(self) -> None:
        """End at once, from any thread."""
        self.connection.break_off()
        self._outbox.put(None)

    def _has_slot(self) -> bool:
        """Wait until one more message may be read; return whether it can be answered."""
        self._slots.get()
        return not self._is_over

    def _give_slots(self, count: int) -> None:
        for _ in range(count):
            self._slots.put(None)

    def _deliver_all(self) -> None:
        """Wait until all that was read is answered, and the replies have arrived."""
        for _ in range(self._max_unanswered):
            self._slots.get()
        self.connection.wait_until_delivered(DELIVERY_S)

    # ---------------------------------------------------------------- reading

    def _handle(self, received: Received, arrived_ms: float) -> None:
        """Answer one message, or submit its task; a message that cannot be served gets a typed error."""
        try:
            if received.refusal:
                raise received.refusal
            match received.message:
                case Request() as request:
                    self._submit(request, received, arrived_ms)
                case Prepare() as prepare:
                    self._outbox.put(Outgoing(received, self._prepare(prepare), arrived_ms))
                case AskLatencies(model, digest) if self._latencies:
                    self._engine.graph(model, digest)
                    self._outbox.put(Outgoing(received, self._latencies(model), arrived_ms))
                case other:
                    raise ProtocolError(f"a {type(other).__name__} has no place here")
        except Exception as exc:
            self._outbox.put(Outgoing(received, exc, arrived_ms))

    def _prepare(self, message: Prepare) -> Ready:
        edge_nodes = unpack_nodes(self._engine.graph(message.model, message.graph_digest), message.edge_nodes)
        network = self._engine.network(message.model)
        network.split(edge_nodes)  # built now, not when the first task comes
        return Ready(message.model, network.weights_digest)

    def _submit(self, request: Request, received: Received, arrived_ms: float) -> None:
        cut = self._engine.cut(request, received.specs)
        if not self._rules.allows_nonfinite:
            check_finite(received.values)
        self._guard(received, partial(self._lines.arrived, received.task, request))
        compute = partial(self._engine.submit, self, cut, received.tensors)
        if self._edge_id and received.task:
            key = task_id(self._edge_id, received.task)
            self._recent.append(key)
            future = self._replies.get_or_compute(key, request, compute)
        else:  # a task without an id of its own
            future = compute()
        future.add_done_callback(partial(self._put_result, received, arrived_ms))

    def _put_result(self, received: Received, arrived_ms: float, future: Future[CloudResult]) -> None:
        """Put a task's reply into the outbox. Called on the worker that computed it, or a thread that drops tasks."""
        if not future.cancelled():
            answered = received._replace(tensors=[], values=())  # its memory is free as soon as nobody computes on it
            error = future.exception()
            content = error if isinstance(error, Exception) else future.result()
            self._outbox.put(Outgoing(answered, content, arrived_ms))
        elif not self._is_over:  # the connection whose task this was is over, and this one is not
            self._handle(received, arrived_ms)

    # ---------------------------------------------------------------- writing

    def _write(self) -> None:
        outgoing: Outgoing | None = None
        try:
            while outgoing := self._next_reply():
                self._send_and_release_slot(outgoing)
                outgoing = None  # no reply is kept while the edge is silent
        except Exception as exc:
            _log_end(self.connection.peer, exc, self._title(outgoing.received) if outgoing else "")
        finally:
            self._is_over = True
            self.connection.break_off()
            self._give_slots(self._max_unanswered)  # so that the reader sees that it is over

    def _next_reply(self) -> Outgoing | None:
        """Return the next reply, or None to stop; send a heartbeat with the load for every second without one."""
        while True:
            try:
                return self._outbox.get(timeout=HEARTBEAT_S)
            except Empty:
                load = self._engine.load
                self.connection.send(Pong(0, load.queue_ms, load.service_ms))

    def _send_and_release_slot(self, outgoing: Outgoing) -> None:
        received = outgoing.received
        sent = self._send(outgoing)
        self._slots.put(None)
        self._guard(received, partial(self._record, received, sent))

    def _send(self, outgoing: Outgoing) -> Message:
        """Send a reply, or the error that prevents it; return what was sent."""
        received = outgoing.received
        try:
            return self._send_content(outgoing)
        except Exception as exc:
            if self.connection.is_mid_frame:  # the edge is gone, or would read another frame as the rest of this one
                raise
            refusal = self._refusal(exc, received)
            self.connection.send(refusal, task=received.task)
            return refusal

    def _send_content(self, outgoing: Outgoing) -> Message:
        """Send a reply; return its message.

        Raises: the error of the task. NetworkError.
        """
        received, content = outgoing.received, outgoing.content
        if isinstance(content, Exception):
            raise content
        if not isinstance(content, CloudResult):
            self.connection.send(content, task=received.task)
            return content
        result, load = content, self._engine.load
        reply = Reply(
            cloud_ms=now_ms() - outgoing.arrived_ms,
            compute_ms=result.compute_ms,
            queue_ms=result.queue_ms,
            receive_ms=received.receive_ms,
            load_queue_ms=load.queue_ms,
            load_service_ms=load.service_ms,
        )
        self.connection.send(reply, result.tensors, received.task)
        return reply

    def _guard(self, received: Received, show: Callable[[], None]) -> None:
        """Show something of a message; an error in it is logged, and does not end the conversation."""
        try:
            show()
        except Exception as exc:
            peer = self.connection.peer
            internal_error(log, exc, f"{self._title(received)} of {peer} could not be shown", peer=peer)

    def _record(self, received: Received, sent: Message) -> None:
        """Count and show a reply that was sent."""
        self._count_bytes()
        match received.message, sent:
            case Request() as request, Reply() as reply:
                self._lines.ended(received.task, request, is_answered=True)
                self._record_task(received, request, reply)
            case Request() as request, _:
                self._lines.ended(received.task, request, is_answered=False)
            case Prepare() as prepare, Ready():
                self._lines.prepared(prepare)

    def _record_task(self, received: Received, request: Request, reply: Reply) -> None:
        self._engine.metrics.answered(
            request.model,
            receive_ms=reply.receive_ms,
            queue_ms=reply.queue_ms,
            compute_ms=reply.compute_ms,
            cloud_ms=reply.cloud_ms,
        )
        if self._latencies:
            self._latencies.computed(request.model, request.edge_nodes, reply.compute_ms)
        if log.isEnabledFor(logging.DEBUG):
            fields = {"model": request.model, "duration_ms": round(reply.cloud_ms, 3)}
            peer, name = self.connection.peer, self._name_of(received.task)
            log.debug("answered task %s of %s", name, peer, extra={"peer": peer, "task": name, **fields})

    def _name_of(self, task: int) -> str:
        """Return what tells a task from others in the log, but does not give its secret id away."""
        return f"{self._edge_id[:4].hex()}/{task}" if self._edge_id else str(task)

    def _count_bytes(self) -> None:
        now = (self.connection.received_bytes, self.connection.sent_bytes)
        self._engine.metrics.transferred(now[0] - self._counted[0], now[1] - self._counted[1])
        self._counted = now

    def _title(self, received: Received) -> str:
        """Return what a message is called in the log: its task and network."""
        model = getattr(received.message, "model", None)
        what = f"task {self._name_of(received.task)}" if received.task else type(received.message).__name__
        return f"{what} ({model})" if model else what

    def _refusal(self, exc: Exception, received: Received) -> ErrorReply:
        """Return what an edge is told of an error; of a defect, no more than that it is one."""
        self._engine.metrics.failed(type(exc).__name__)
        peer, task = self.connection.peer, self._name_of(received.task)
        if isinstance(exc, NeurosurgeonError):
            level = logging.DEBUG if isinstance(exc, BusyError) else logging.WARNING  # busy: the edge asks again
            log.log(level, "refused %s: %s", peer, exc, extra={"peer": peer, "error": type(exc).__name__, "task": task})
            return reply_of(exc)
        internal_error(log, exc, f"{self._title(received)} of {peer} failed", peer=peer, task=task)
        return ErrorReply(str(ErrorCode.INTERNAL), "internal error: the task failed in the cloud; its log says why")


def _log_end(peer: str, exc: Exception, answering: str = "") -> None:
    """Log why a connection ends: by the peer, in a line; by a defect of this side, with its traceback."""
    if isinstance(exc, PeerGoneError):
        log.debug("%s left: %s", peer, exc, extra={"peer": peer})
    elif isinstance(exc, NeurosurgeonError):
        log.warning("closed the connection of %s: %s", peer, exc, extra={"peer": peer, "error": type(exc).__name__})
    else:
        when = f" while answering {answering}" if answering else ""
        internal_error(log, exc, f"closed the connection of {peer}{when}", peer=peer)
