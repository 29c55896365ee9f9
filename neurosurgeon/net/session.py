"""The edge's side of a connection for tasks: it sends requests, and the cloud (`cloud.server`) replies.

One thread may send while another receives; any thread may close. No field has a lock: `_has_reply` is written by the
receiving thread alone, which ends the pacing, and read by the sending one, which reads it again after it has paced.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import NamedTuple, TypeVar

from neurosurgeon.graph.spec import Array
from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.connection import SILENCE_S, Connection, Received
from neurosurgeon.net.frames import DEFAULT_LIMITS, SMALL_LIMITS
from neurosurgeon.net.messages import (
    EDGE_ID_BYTES,
    AskLatencies,
    ErrorReply,
    Hello,
    Latencies,
    Pong,
    Prepare,
    Ready,
    Reply,
    Request,
    error_of,
)
from neurosurgeon.net.sockets import connect
from neurosurgeon.net.tcp_info import SendState
from neurosurgeon.utils.errors import DeadlineError, NetworkError, ProtocolError, WeightsError
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import StageTimes, now_ms
from neurosurgeon.utils.units import mbit_per_s_to_bytes_per_s, s_to_ms

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 120.0  # a small cloud may build a large network first
REPLY_TIMEOUT_S = 120.0
PACE = 1.15  # of the link's payload rate: headers add 4 %, and the measured rate may be too low
MAX_PACE_BYTES_PER_S = mbit_per_s_to_bytes_per_s(1_000)  # beyond, this machine is the limit, and pacing costs it time

Expected = TypeVar("Expected", Hello, Latencies, Ready, Reply)


class OnCloudLoss(StrEnum):
    """The handling of a task whose connection is lost."""

    LOCAL = "local"  # it is computed on the edge, as are all others until the cloud is reconnected
    RETRY = "retry"  # it is sent again after a reconnect; at the timeout it fails
    FAIL = "fail"


def new_edge_id() -> bytes:
    """Return a new random id: with it and the number of a task, the cloud returns the reply to that task."""
    return secrets.token_bytes(EDGE_ID_BYTES)


class RemoteResult(NamedTuple):
    """The cloud's result of one task, and its durations as measured by the edge."""

    arrays: tuple[Array, ...]
    transfer_ms: float  # round trip less `cloud_ms`
    cloud_ms: float  # from the last byte of the request to the first of the reply, measured by the cloud
    compute_ms: float  # the part of `cloud_ms` in which the network ran
    receive_ms: float  # from the first byte of the request to its last, measured by the cloud
    load_queue_ms: float  # recent wait of the tasks of all edges in the cloud
    sent_bytes: int


class SentTask(NamedTuple):
    """The time at which the first byte of a task was sent (`now_ms`), and its bytes."""

    start_ms: float
    size_bytes: int


class EdgeSession:
    """A connection to a cloud for tasks; use it in a ``with`` block.

    Args: edge_id: of the edge, the same for every connection on which its tasks may be sent again.
    """

    def __init__(self, connection: Connection, edge_id: bytes | None = None) -> None:
        self._connection = connection
        self.host = connection.peer.rpartition(":")[0]
        self._tasks = 0
        self._has_reply = False  # to any task
        start_ms = now_ms()
        connection.send(Hello.of(edge=edge_id or new_edge_id()))
        hello = self._expect(Hello, self.receive_reply(HELLO_TIMEOUT_S))
        self.rtt_ms = now_ms() - start_ms
        self.cloud = hello.capabilities
        connection.limits = DEFAULT_LIMITS

    @classmethod
    def open(cls, host: str, port: int, edge_id: bytes | None = None, access: Access = OPEN) -> EdgeSession:
        """Connect, authenticate both sides, and exchange hellos. May block.

        Raises: UsageError: not an address. NetworkError: no service there, or not a cloud.
                AccessError: one side does not accept the other.
        """
        connection = connect(host, port, SMALL_LIMITS, access)
        try:
            return cls(connection, edge_id)
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> EdgeSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a thread that sends or receives gets a PeerGoneError. Called on any thread."""
        self._connection.break_off()
        self._connection.close()

    def pace_first_task(self, link: LinkEstimate) -> None:
        """Send no faster than the link, if that was just measured, until the cloud has replied to a task.

        TCP starts by doubling its window until packets are lost: a queue of one bandwidth-delay product overflows, and
        the lost packets are sent again. A known rate avoids it.
        """
        if self._has_reply:
            return
        is_known = link.source is LinkSource.PROBE and link.rate_bytes_per_s < MAX_PACE_BYTES_PER_S
        self._connection.send_at_most((PACE + 2 * link.error) * link.rate_bytes_per_s if is_known else math.inf)
        if self._has_reply:  # it was received meanwhile, in another thread
            self._connection.send_at_most(math.inf)

    def send_state(self) -> SendState | None:
        """Return the bytes that may be sent before an acknowledgement, or None if the system does not report them."""
        return self._connection.send_state()

    def least_rtt_ms(self) -> float:
        """Return the shortest known round trip, ms.

        It is the kernel's, which waits for no process; that of the hello if the kernel reports none, or a longer one.
        """
        state = self.send_state()
        return min(self.rtt_ms, s_to_ms(state.rtt_s)) if state else self.rtt_ms

    @property
    def is_mid_frame(self) -> bool:
        """Whether a frame may have been sent in part: then no other can be sent on this connection."""
        return self._connection.is_mid_frame

    @property
    def reading(self) -> int:
        """The number of the task whose reply is being received, or was last; 0 before its head has arrived."""
        return self._connection.reading

    @property
    def sent_bytes(self) -> int:
        """The bytes sent so far."""
        return self._connection.sent_bytes

    def acked_bytes(self) -> int | None:
        """Return the bytes that the cloud's kernel has acknowledged, or None if the system does not report them."""
        return self._connection.acked_bytes()

    def ask_latencies(self, model: str, graph_digest: str) -> Latencies:
        """Return the latencies of the model's layers in this cloud. Blocks.

        Raises: NetworkError; UnknownModelError, GraphError, PlanningError: the cloud has no latencies for it.
        """
        self._connection.send(AskLatencies(model, graph_digest))
        latencies = self._expect(Latencies, self.receive_reply(READY_TIMEOUT_S))
        columns = (latencies.latency_ms, latencies.low_ms, latencies.high_ms)
        if not all(type(value) is float for column in columns for value in column):
            raise ProtocolError(f"invalid latencies from {self._connection.peer}: expected numbers of type float")
        return latencies

    def responds(self) -> bool:
        """Return whether a heartbeat arrives within `SILENCE_S`; a cloud sends one every second.

        Blocks. Call it only while no reply is expected: it would be dropped.
        """
        try:
            self.receive_next()
        except NetworkError:
            return False
        return True

    def ask_to_prepare(self, prepare: Prepare) -> None:
        """Send the model and the cut; the cloud prepares while this side does the same."""
        self._connection.send(prepare)

    def wait_until_ready(self, weights_digest: str) -> None:
        """Wait until the cloud is ready, and compare the weights of both sides before any tensor is sent. Blocks.

        Raises: WeightsError: they differ. NetworkError; UnknownModelError, GraphError, PartitionError: the cloud
                refused.
        """
        ready = self._expect(Ready, self.receive_reply(READY_TIMEOUT_S))
        if ready.weights_digest != weights_digest:
            raise WeightsError(
                f"the two sides hold different weights of {ready.model}: edge {weights_digest}, "
                f"cloud {ready.weights_digest}; start both with the same --weights or --pretrained"
            )

    def infer(
        self, request: Request, arrays: Sequence[Array], on_sent: Callable[[], None] = lambda: None
    ) -> RemoteResult:
        """Send the boundary tensors of a task, and return its result. Blocks.

        Args:   on_sent: called when the last byte has been passed to the system.
        Raises: NetworkError; any error of the cloud's reply.
        """
        self._tasks += 1
        sent = self.send_task(self._tasks, request, arrays)
        on_sent()
        received = self.receive_reply(REPLY_TIMEOUT_S)
        if received.task != self._tasks:
            raise ProtocolError(
                f"wrong task in a reply of {self._connection.peer}: expected {self._tasks}, got {received.task}"
            )
        return self.result_of(received, sent)

    def send_task(self, task: int, request: Request, arrays: Sequence[Array]) -> SentTask:
        """Send a task without waiting for its reply. May block.

        Raises: NetworkError.
        """
        sent_before, start_ms = self._connection.sent_bytes, now_ms()
        self._connection.send(request, arrays, task)
        return SentTask(start_ms, self._connection.sent_bytes - sent_before)

    def receive_next(self) -> Received:
        """Return the next message of the cloud: a reply to any message, or a heartbeat (`Pong`). Blocks.

        Raises: NetworkError: the connection is lost, or the cloud has been silent for `SILENCE_S`.
        """
        return self._connection.receive(SILENCE_S)

    def receive_reply(self, wait_s: float) -> Received:
        """Return the next reply of the cloud, to any message. Blocks for at most ``wait_s``.

        Raises: DeadlineError: no reply in time, or no heartbeat. NetworkError.
        """
        deadline_ms = now_ms() + s_to_ms(wait_s)
        while now_ms() < deadline_ms:
            received = self.receive_next()
            if not isinstance(received.message, Pong):
                return received
        raise DeadlineError(
            f"no reply from {self._connection.peer} for {wait_s:g} s although heartbeats arrive: "
            "retry, or restart the cloud"
        )

    def result_of(self, received: Received, sent: SentTask) -> RemoteResult:
        """Return the result of a task from a reply that has just arrived.

        Raises: any error of the cloud's reply; ProtocolError: its durations are impossible.
        """
        round_trip_ms = now_ms() - sent.start_ms
        reply = self._expect(Reply, received)
        if not self._has_reply:
            self._has_reply = True
            self._connection.send_at_most(math.inf)
        if not 0 <= reply.cloud_ms <= round_trip_ms:  # false for NaN, too
            raise ProtocolError(
                f"impossible duration in a reply of {self._connection.peer}: "
                f"expected 0 to {round_trip_ms:g} ms, got {reply.cloud_ms:g}"
            )
        return RemoteResult(
            arrays=received.arrays,
            transfer_ms=round_trip_ms - reply.cloud_ms,
            cloud_ms=reply.cloud_ms,
            compute_ms=reply.compute_ms,
            receive_ms=reply.receive_ms,
            load_queue_ms=reply.load_queue_ms,
            sent_bytes=sent.size_bytes,
        )

    def _expect(self, expected: type[Expected], received: Received) -> Expected:
        """Return a message of the expected type.

        Raises: the error of an error reply; ProtocolError: a message of another type.
        """
        message = received.message
        if isinstance(message, ErrorReply):
            raise error_of(message)
        if not isinstance(message, expected):
            got = type(message).__name__
            raise ProtocolError(f"wrong message from {self._connection.peer}: expected {expected.__name__}, got {got}")
        return message


def stage_times(edge_ms: float, remote: RemoteResult | None) -> StageTimes:
    """Return the measured stages of a task; without a remote result there was no transfer."""
    return StageTimes(edge_ms, remote.transfer_ms if remote else 0.0, remote.cloud_ms if remote else 0.0)
