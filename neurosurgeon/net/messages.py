"""The messages between the two sides, one named tuple per kind of frame. Request and Reply carry tensors.

    edge                                   cloud
    Hello           ────────────────▶
                    ◀────────────────      Hello         capabilities: device, threads
    AskLatencies    ────────────────▶                    model
                    ◀────────────────      Latencies     of its layers in this cloud
    Prepare         ────────────────▶                    model, cut, digest of the graph; the cloud compares
                    ◀────────────────      Ready         digest of the weights; the edge compares
    Request         ────────────────▶                    the boundary tensors
                    ◀────────────────      Reply         the output, and the durations in the cloud
    ... any number of AskLatencies, Prepare and Request ...

At any time the cloud may reply `ErrorReply` instead. After a second without a message it sends a `Pong` as a heartbeat:
so an edge can distinguish a cloud that computes from one that is disconnected. The bandwidth service uses Hello, Ping,
Pong, Probe and Samples on a port of its own, and AskTicket, Ticket, Train and AskTrain for datagrams (`net.trains`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple, get_type_hints

from neurosurgeon.net.frames import NO_FIGURES, WIRE_VERSION, Kind
from neurosurgeon.utils.errors import (
    BusyError,
    GraphError,
    NeurosurgeonError,
    NonFiniteError,
    PartitionError,
    ProtocolError,
    RemoteError,
    UnknownModelError,
    WeightsError,
)
from neurosurgeon.utils.logs import printable, shortened

EDGE_ID_BYTES = 12  # with the number of a task: 128 bits, unique to that task


class Hello(NamedTuple):
    """The first message of both sides; an edge has random bytes as its id, and keeps them when it reconnects."""

    wire_version: int
    capabilities: dict[str, Any]

    @classmethod
    def of(cls, **capabilities: Any) -> Hello:
        """Return the hello of this side."""
        return cls(WIRE_VERSION, capabilities)

    @property
    def edge_id(self) -> bytes | None:
        """The id of the edge, or None if it has none."""
        edge_id = self.capabilities.get("edge")
        return edge_id if isinstance(edge_id, bytes) and len(edge_id) == EDGE_ID_BYTES else None


def task_id(edge_id: bytes, task: int) -> bytes:
    """Return the id (128 bits) of a task, the same on every connection on which it is sent."""
    return edge_id + task.to_bytes(16 - EDGE_ID_BYTES, "big")


class AskLatencies(NamedTuple):
    """Request the latencies of a model's layers in this cloud; it needs no profile of the cloud."""

    model: str
    graph_digest: str


class Latencies(NamedTuple):
    """Latencies of a model's layers in this cloud, (L,), ms, with their 90 % intervals, and their source."""

    model: str
    source: str
    latency_ms: list[float]
    low_ms: list[float]
    high_ms: list[float]
    extrapolated: list[str]
    origin: str  # the machine whose data the predictions use, as text


class Prepare(NamedTuple):
    """Name the model and its cut; the cloud prepares its partition.

    A cut is the bit mask of the graph's nodes on the edge (`graph.cut`); both sides must have the same graph.
    """

    model: str
    edge_nodes: bytes
    graph_digest: str


class Ready(NamedTuple):
    """The cloud can run its partition, with these weights."""

    model: str
    weights_digest: str


class Request(NamedTuple):
    """One task: run the cloud partition on the tensors of this message; its number is the frame's.

    The tensors are those of the boundary, each once, in the order of their nodes.
    """

    model: str
    edge_nodes: bytes
    graph_digest: str
    weights_digest: str

    @property
    def preparation(self) -> Prepare:
        """The message that lets the cloud prepare for it."""
        return Prepare(self.model, self.edge_nodes, self.graph_digest)


class Reply(NamedTuple):
    """The reply to the task of the frame's number, with the output's tensors; durations are of the cloud's own clock.

    Its fields are the frame's figures: the headers of all replies of a network are the same.

    ``cloud_ms`` is all the time from the last byte of the request to the first of the reply: waiting
    (``queue_ms``), computing (``compute_ms``) and the rest. ``receive_ms`` is first to last byte of the request.
    The load is the recent wait and service time of the tasks of all edges.
    """

    cloud_ms: float
    compute_ms: float
    queue_ms: float
    receive_ms: float
    load_queue_ms: float = 0.0
    load_service_ms: float = 0.0


class ErrorCode(StrEnum):
    """The kind of error for which the cloud refuses a message."""

    UNKNOWN_MODEL = "unknown_model"
    GRAPH = "graph"
    WEIGHTS = "weights"
    PARTITION = "partition"
    NONFINITE = "nonfinite"
    BAD_REQUEST = "bad_request"
    BUSY = "busy"
    INTERNAL = "internal"


class ErrorReply(NamedTuple):
    """The cloud's refusal, with a line for the user; a busy cloud adds when to retry (0: unknown)."""

    code: str
    message: str
    retry_ms: float = 0.0


class Ping(NamedTuple):
    """Request an immediate pong."""

    sequence: int


class Pong(NamedTuple):
    """The reply to the ping of that number, with the recent wait and service time of tasks in this cloud."""

    sequence: int
    load_queue_ms: float = 0.0
    load_service_ms: float = 0.0


class Probe(NamedTuple):
    """Announce ``size_bytes`` bytes that follow this frame."""

    size_bytes: int


class Samples(NamedTuple):
    """The times at which the bytes of a probe arrived, on the service's clock, and the bytes of each read."""

    times_us: list[int]
    sizes_bytes: list[int]


class AskTicket(NamedTuple):
    """Request a session at the service's UDP port, for datagrams of a version (`net.datagrams`)."""

    version: int


class Ticket(NamedTuple):
    """The UDP port of the service, and the cookie at the start of every datagram to it."""

    udp_port: int
    cookie: bytes


class Train(NamedTuple):
    """Announce a train of datagrams by UDP; the reply is `Samples`, of those that arrived."""

    number: int
    packets: int


class AskTrain(NamedTuple):
    """Request a train of datagrams; the nonce of the service's last datagram proves the address of the client."""

    nonce: bytes
    number: int
    packets: int
    size_bytes: int


Message = (
    Hello
    | AskLatencies
    | Latencies
    | Prepare
    | Ready
    | Request
    | Reply
    | ErrorReply
    | Ping
    | Pong
    | Probe
    | Samples
    | AskTicket
    | Ticket
    | Train
    | AskTrain
)
_CLASSES: dict[Kind, type[Any]] = {
    Kind.HELLO: Hello,
    Kind.PREPARE: Prepare,
    Kind.READY: Ready,
    Kind.REQUEST: Request,
    Kind.REPLY: Reply,
    Kind.ERROR: ErrorReply,
    Kind.PING: Ping,
    Kind.PONG: Pong,
    Kind.PROBE: Probe,
    Kind.SAMPLES: Samples,
    Kind.ASK_LATENCIES: AskLatencies,
    Kind.LATENCIES: Latencies,
    Kind.ASK_TICKET: AskTicket,
    Kind.TICKET: Ticket,
    Kind.TRAIN: Train,
    Kind.ASK_TRAIN: AskTrain,
}
_KINDS = {cls: kind for kind, cls in _CLASSES.items()}
_FIELD_TYPES = {
    kind: tuple(getattr(hint, "__origin__", hint) for hint in get_type_hints(cls).values())  # list[int] -> list
    for kind, cls in _CLASSES.items()
} | {Kind.REPLY: ()}


def kind_of(message: Message) -> Kind:
    """Return the kind of frame that carries a message."""
    return _KINDS[type(message)]


def header_values(message: Message) -> tuple[Any, ...]:
    """Return the fields that travel in a frame's header."""
    return () if type(message) is Reply else tuple(message)


def figures_of(message: Message) -> tuple[float, ...]:
    """Return the figures of the frame that carries a message."""
    return tuple(message) if type(message) is Reply else NO_FIGURES


def message_of(kind: Kind, values: Any) -> Message | None:
    """Return the message of a frame from the values in its header, or None if it is in the frame's figures.

    Raises: ProtocolError: a field is missing, too many, or of another type.
    """
    cls = _CLASSES[kind]
    if type(values) is not tuple:
        raise ProtocolError(f"fields of {cls.__name__}: expected a tuple, got {type(values).__name__}")
    given = tuple(map(type, values))
    if given != _FIELD_TYPES[kind]:
        got, expected = ([known.__name__ for known in types] for types in (given[:8], _FIELD_TYPES[kind]))
        raise ProtocolError(f"fields of {cls.__name__}: expected {expected}, got {got}")
    message: Message | None = None if kind is Kind.REPLY else cls._make(values)
    return message


_ERRORS: dict[str, type[NeurosurgeonError]] = {
    ErrorCode.UNKNOWN_MODEL: UnknownModelError,
    ErrorCode.GRAPH: GraphError,
    ErrorCode.WEIGHTS: WeightsError,
    ErrorCode.PARTITION: PartitionError,
    ErrorCode.NONFINITE: NonFiniteError,
}


def error_of(reply: ErrorReply) -> NeurosurgeonError:
    """Return the exception for an error reply, with its message shortened and without control characters."""
    message = f"the cloud answered: {printable(shortened(reply.message))}"
    if reply.code == ErrorCode.BUSY:
        return BusyError(message, reply.retry_ms)
    return _ERRORS.get(reply.code, RemoteError)(message)


def reply_of(error: NeurosurgeonError) -> ErrorReply:
    """Return the error reply for an exception."""
    if isinstance(error, BusyError):
        return ErrorReply(str(ErrorCode.BUSY), str(error), error.retry_ms)
    for code, cls in _ERRORS.items():
        if isinstance(error, cls):
            return ErrorReply(str(code), str(error))
    return ErrorReply(str(ErrorCode.BAD_REQUEST), str(error))
