"""The cloud's side of conversations: many edges at once, many tasks of each in flight, and none blocks another."""

from __future__ import annotations

import logging
import math
import socket
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from neurosurgeon.cloud.events import Observer, TaskLines, TaskState
from neurosurgeon.cloud.executor import CloudEngine, CloudResult
from neurosurgeon.cloud.lazy_queue import LazyQueue
from neurosurgeon.cloud.reply_cache import Asker, Chore, KeptAnswers
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
from neurosurgeon.utils.units import MS_PER_S, ms_to_s, s_to_ms

log = logging.getLogger(__name__)

IDLE_TIMEOUT_S = 600.0
MAX_UNANSWERED = 32  # messages of one edge; more than may wait in the engine, so that an edge hears that it is busy
HEARTBEAT_S = 1.0  # an edge that has heard nothing for so long is told that the cloud lives
DELIVERY_S = 1.0  # the last answers reach an edge behind any link, or it is gone
LAZY_BYTES = 1_048_576  # of a question: the memory of a larger one is not held until the writer's next look
COPIED_LATER_BYTES = 65_536  # of an answer: a larger one is copied by the worker, with the threads it has
AT_ONCE_S = 0.1  # a worker's send, should the system have no room for it after all
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
        self._kept = KeptAnswers()
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
                        connection, hello, self._engine, self._kept, self._observe, self._latencies, self._rules
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


class _Task(NamedTuple):
    """A request that was taken."""

    arrived_ms: float
    state: TaskState


class _Done(NamedTuple):
    """What became of a task."""

    received: Received
    task: _Task
    result: CloudResult | Exception


class _Sent(NamedTuple):
    """A task's answer that is out."""

    received: Received
    task: _Task
    reply: Reply


class _Chore(NamedTuple):
    """Anything else that nobody waits for, and that must be done even where the edge has left."""

    run: Chore


class _Answer(NamedTuple):
    """What is to be sent for any other message, or for a task that was not taken."""

    received: Received
    content: Message | Exception


_Item = _Answer | _Done | _Sent | _Chore | _Task


class Conversation:
    """One edge: the thread that holds it reads and submits, a second one sends what is done, and shows it.

    A result that the system has room for is sent by the worker itself, if it has nothing else to do: waking the second
    thread up would take a tenth of a millisecond. What is left to do behind it waits until that thread looks.
    An edge that does not read its answers fills its own socket, then `MAX_UNANSWERED`, and is then not read any more;
    neither the workers nor other edges wait for it.
    """

    def __init__(
        self,
        connection: Connection,
        hello: Hello,
        engine: CloudEngine,
        kept: KeptAnswers,
        observe: Observer,
        latencies: LatencySource | None,
        rules: Rules,
    ) -> None:
        self.connection = connection
        self._engine = engine
        self._kept = kept
        self._hello = hello
        self._edge_id = hello.edge_id
        self._rules = rules
        self._recent: deque[bytes] = deque(maxlen=MAX_UNANSWERED)  # ids of tasks
        self._counted = (0, 0)  # bytes received and sent, as told to the metrics
        self._latencies = latencies
        self._lines = TaskLines(observe, connection.sock)
        self._outbox: LazyQueue[_Item | None] = LazyQueue()
        self._unsent: deque[None] = deque()  # one for each answer that the writer has yet to send
        self._sending = threading.Lock()
        self._max_unanswered = MAX_UNANSWERED
        self._places: SimpleQueue[None] = SimpleQueue()  # one for each message that may be read; waiting here is C
        self._give_places(self._max_unanswered)
        self._sent_ms = now_ms()  # when the edge was last told anything
        self._is_over = False  # set by the writer: no answer can be sent any more
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
            while self._has_place():
                self._handle(self.connection.receive(IDLE_TIMEOUT_S))
        except PeerGoneError:
            if stopping.is_set():
                self._places.put(None)  # of the message that did not come
                self._deliver_all()
            raise
        except ProtocolError:
            self._kept.forget(self._recent)  # their bytes may have been mixed up, too
            raise
        except NeurosurgeonError:
            raise
        except Exception as exc:  # a defect, with a message read in part: nothing after it can be read
            self._post(_Answer(Received(self._hello, [], self.connection.reading, 0.0), exc))
            self._deliver_all()
        finally:
            self.break_off()
            self._engine.drop(self)  # nobody waits for these
            self._writer.join()
            with self._sending:  # a worker may be sending just now; one that has an answer later sees that it is over
                pass

    def break_off(self) -> None:
        """End at once, from any thread."""
        self.connection.break_off()
        with self._sending:  # behind an answer that a worker sends just now
            self._outbox.put(None)

    def _has_place(self) -> bool:
        """Wait until one more message may be read; return whether it can be answered."""
        self._places.get()
        return not self._is_over

    def _give_places(self, count: int) -> None:
        for _ in range(count):
            self._places.put(None)

    def _deliver_all(self) -> None:
        """Wait until all that was read is answered, and the answers have arrived."""
        for _ in range(self._max_unanswered):
            self._places.get()
        self.connection.wait_until_delivered(DELIVERY_S)

    # ---------------------------------------------------------------- reading

    def _handle(self, received: Received) -> None:
        """Answer one message, or see that it will be; what cannot be served gets a typed error, and it goes on."""
        try:
            if received.refusal:
                raise received.refusal
            match received.message:
                case Request() as request:
                    self._submit(request, received)
                case Prepare() as prepare:
                    self._post(_Answer(received, self._prepare(prepare)))
                case AskLatencies(model, digest) if self._latencies:
                    self._engine.graph(model, digest)
                    self._post(_Answer(received, self._latencies(model)))
                case other:
                    raise ProtocolError(f"a {type(other).__name__} has no place here")
        except Exception as exc:
            self._post(_Answer(received, exc))

    def _prepare(self, message: Prepare) -> Ready:
        edge_nodes = unpack_nodes(self._engine.graph(message.model, message.graph_digest), message.edge_nodes)
        network = self._engine.network(message.model)
        network.split(edge_nodes)
        return Ready(message.model, network.weights_digest)

    def _submit(self, request: Request, received: Received) -> None:
        task = _Task(now_ms(), TaskState(request.model, request.edge_nodes))
        cut = self._engine.cut(request, received.specs)
        if not self._rules.allows_nonfinite:
            check_finite(received.values)

        is_large = sum(tensor.nbytes for tensor in received.tensors) > LAZY_BYTES
        compute = partial(self._engine.submit, self, cut, received.tensors)
        received = received._replace(tensors=[], values=())  # whoever shows the answer must not keep their memory
        asker = Asker(
            compute=compute,
            deliver=partial(self._deliver, received, task),
            later=partial(self._do_later, is_large),
        )
        if self._edge_id and received.task:
            key = task_id(self._edge_id, received.task)
            self._recent.append(key)
            self._kept.submit(key, request, asker)
        else:  # a task without an id of its own
            asker.compute(asker.answer)
        self._outbox.put(task, is_urgent=False)  # to be shown while the half already runs

    # ---------------------------------------------------------------- answering

    def _deliver(self, received: Received, task: _Task, result: CloudResult | Exception) -> None:
        """Send a result if that keeps neither the worker nor another task waiting, else leave it to the writer."""
        try:
            if self._is_sent_at_once(received, task, result):
                return
        except Exception as exc:  # a defect, and nothing is out: the edge hears of that
            result = exc
        self._post(_Done(received, task, result))

    def _is_sent_at_once(self, received: Received, task: _Task, result: CloudResult | Exception) -> bool:
        if isinstance(result, Exception) or self._engine.has_waiting or self._unsent:
            return False
        if not self._sending.acquire(blocking=False):
            return False
        try:
            if self._is_over or not self.connection.takes_at_once(result.size_bytes):
                return False
            reply = self._send_reply(received, task, result, AT_ONCE_S)
            self._outbox.put(_Sent(received, task, reply), is_urgent=False)
        except Exception as exc:
            if not self.connection.is_mid_frame:
                raise
            _log_end(self.connection.peer, exc, self._title(received))
            self.connection.break_off()  # half a frame may be out; the writer finds out, too
            return False
        finally:
            self._sending.release()
        return True

    def _post(self, answer: _Answer | _Done) -> None:
        self._unsent.append(None)
        self._outbox.put(answer)

    def _do_later(self, is_urgent: bool, chore: Chore, result_bytes: int) -> None:
        if result_bytes > COPIED_LATER_BYTES:
            chore()
            return
        self._outbox.put(_Chore(chore), is_urgent=is_urgent)
        if self._is_over:
            self._do_rest()

    def _do_rest(self) -> None:
        for item in self._outbox.rest():
            if isinstance(item, _Chore):
                self._do(item)

    def _write(self) -> None:
        item: _Item | None = None
        try:
            while item := self._next_item():
                if isinstance(item, _Answer | _Done | _Sent):
                    self._bring(item)
                else:
                    self._do(item)
                item = None  # while the edge is silent, no memory of its last request is kept
        except Exception as exc:
            _log_end(self.connection.peer, exc, self._title(item.received) if isinstance(item, _Answer | _Done) else "")
        finally:
            self.connection.break_off()
            self._is_over = True
            self._give_places(self._max_unanswered)  # the reader waits for nothing any more
            self._do_rest()

    def _do(self, item: _Task | _Chore) -> None:
        """Do what no edge waits for; a defect in it costs the conversation nothing."""
        try:
            match item:
                case _Task():
                    self._lines.arrived(item.state)
                case _Chore():
                    item.run()
        except Exception as exc:
            peer, kind = self.connection.peer, type(item).__name__.strip("_").lower()
            internal_error(log, exc, f"{kind} behind an answer to {peer} failed", peer=peer)

    def _bring(self, answer: _Answer | _Done | _Sent) -> None:
        """See that an answer is out, and give its place to another message; then show it."""
        if not isinstance(answer, _Sent):
            with self._sending:
                answer = self._send(answer)
                self._unsent.popleft()
        self._sent_ms = now_ms()
        self._places.put(None)
        try:
            self._show(answer)
        except Exception as exc:  # a defect, behind an answer that is out
            peer = self.connection.peer
            internal_error(log, exc, f"{self._title(answer.received)} of {peer} could not be shown", peer=peer)

    def _next_item(self) -> _Item | None:
        """Return what is to be sent, or done, next; meanwhile, tell the edge that the cloud lives, and its load."""
        while True:
            silent_s = ms_to_s(now_ms() - self._sent_ms)
            try:
                return self._outbox.get(max(0.0, HEARTBEAT_S - silent_s))
            except Empty:
                load = self._engine.load
                with self._sending:
                    self.connection.send(Pong(0, load.queue_ms, load.service_ms))
                self._sent_ms = now_ms()

    def _send(self, answer: _Answer | _Done) -> _Answer | _Done | _Sent:
        """Send an answer; return it, or what was sent in its place."""
        try:
            return self._send_once(answer)
        except Exception as exc:
            if self.connection.is_mid_frame:  # the edge is gone, or would read another frame as the rest of this one
                raise
            refused = answer._replace(result=exc) if isinstance(answer, _Done) else answer._replace(content=exc)
            return self._send_once(refused)

    def _send_once(self, answer: _Answer | _Done) -> _Answer | _Done | _Sent:
        received = answer.received
        if isinstance(answer, _Done):
            if isinstance(answer.result, CloudResult):
                return _Sent(received, answer.task, self._send_reply(received, answer.task, answer.result))
            message: Message = self._refusal(answer.result, received)
        elif isinstance(answer.content, Exception):
            message = self._refusal(answer.content, received)
        else:
            message = answer.content
        self.connection.send(message, task=received.task)
        return answer

    def _show(self, answer: _Answer | _Done | _Sent) -> None:
        """Show what was sent, and get ready for what comes next."""
        self._count_bytes()
        match answer:
            case _Sent():
                self._show_answered(answer)
            case _Done():
                self._lines.failed(answer.task.state)
            case _Answer():
                asked = answer.received.message
                if isinstance(asked, Prepare) and not isinstance(answer.content, Exception):
                    self._lines.prepared(asked.model, asked.edge_nodes)

    def _send_reply(self, received: Received, task: _Task, result: CloudResult, within_s: float = math.inf) -> Reply:
        load = self._engine.load
        reply = Reply(
            cloud_ms=now_ms() - task.arrived_ms,
            compute_ms=result.compute_ms,
            queue_ms=result.queue_ms,
            receive_ms=received.receive_ms,
            load_queue_ms=load.queue_ms,
            load_service_ms=load.service_ms,
        )
        self.connection.send(reply, result.tensors, received.task, within_s)
        return reply

    def _show_answered(self, sent: _Sent) -> None:
        received, task, reply = sent
        self._lines.finished(task.state)
        self._engine.metrics.answered(
            task.state.model,
            receive_ms=reply.receive_ms,
            queue_ms=reply.queue_ms,
            compute_ms=reply.compute_ms,
            cloud_ms=reply.cloud_ms,
        )
        if self._latencies:
            self._latencies.computed(task.state.model, task.state.cut, reply.compute_ms)
        if log.isEnabledFor(logging.DEBUG):
            fields = {"model": task.state.model, "duration_ms": round(reply.cloud_ms, 3)}
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
