"""What the two sides say to each other, one frozen dataclass per kind of frame.

    edge                                   cloud
    Hello           ────────────────▶
                    ◀────────────────      Hello         capabilities: device, threads
    Prepare         ────────────────▶                    model, partition point
                    ◀────────────────      Ready         digest of the weights; the edge compares
    Request         ────────────────▶                    the tensors that cross
                    ◀────────────────      Reply         the output, and what the cloud spent
    ... any number of Prepare and Request ...

At any time the cloud may answer `ErrorReply` instead. The bandwidth service speaks Hello, Ping, Pong, Probe and
Samples on a port of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar, get_type_hints

from net.framing import WIRE_VERSION, Kind
from utils.errors import (
    NeurosurgeonError,
    PartitionError,
    ProtocolError,
    RemoteError,
    UnknownModelError,
    WeightsError,
)


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of both sides."""

    kind: ClassVar[Kind] = Kind.HELLO
    wire_version: int
    capabilities: dict[str, Any]

    @classmethod
    def of(cls, **capabilities: Any) -> Hello:
        """Return the hello of this side."""
        return cls(WIRE_VERSION, capabilities)


@dataclass(frozen=True, slots=True)
class Prepare:
    """The edge names the model and where it cuts it; the cloud gets both halves ready."""

    kind: ClassVar[Kind] = Kind.PREPARE
    model: str
    point: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The cloud can run its half, with these weights."""

    kind: ClassVar[Kind] = Kind.READY
    model: str
    point: int
    weights_digest: str


@dataclass(frozen=True, slots=True)
class Request:
    """One task: run the cloud half on the tensors of this frame."""

    kind: ClassVar[Kind] = Kind.REQUEST
    task_id: str
    model: str
    point: int
    weights_digest: str
    tensors: list[dict[str, Any]]  # descriptions; the bytes are the frame's buffers


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a task; durations are of the cloud's own clock.

    ``cloud_ms`` is all the time from the last byte of the request to the first of the reply: waiting
    (``queue_ms``), computing (``compute_ms``) and the rest. ``receive_ms`` is first to last byte of the request.
    """

    kind: ClassVar[Kind] = Kind.REPLY
    task_id: str
    cloud_ms: float
    compute_ms: float
    queue_ms: float
    receive_ms: float
    tensors: list[dict[str, Any]]


class ErrorCode(StrEnum):
    """Why the cloud refused."""

    UNKNOWN_MODEL = "unknown_model"
    WEIGHTS = "weights"
    PARTITION = "partition"
    BAD_REQUEST = "bad_request"
    BUSY = "busy"
    STOPPING = "stopping"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """The cloud's refusal, with a line for the user."""

    kind: ClassVar[Kind] = Kind.ERROR
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask for an immediate pong."""

    kind: ClassVar[Kind] = Kind.PING
    sequence: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answer to the ping of that number."""

    kind: ClassVar[Kind] = Kind.PONG
    sequence: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Announce ``size_bytes`` bytes that follow behind this frame."""

    kind: ClassVar[Kind] = Kind.PROBE
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Samples:
    """When the bytes of a probe arrived, on the server's clock, and how many with each read."""

    kind: ClassVar[Kind] = Kind.SAMPLES
    times_us: list[int]
    sizes_bytes: list[int]


Message = Hello | Prepare | Ready | Request | Reply | ErrorReply | Ping | Pong | Probe | Samples
_BY_KIND: dict[Kind, type[Any]] = {cls.kind: cls for cls in Message.__args__}
_FIELD_TYPES = {
    cls: {field.name: get_type_hints(cls)[field.name] for field in fields(cls)} for cls in _BY_KIND.values()
}


def pack_message(message: Message) -> tuple[Kind, dict[str, Any]]:
    """Return a message's kind and header."""
    return message.kind, {name: getattr(message, name) for name in _FIELD_TYPES[type(message)]}


def unpack_message(kind: Kind, header: dict[str, Any]) -> Message:
    """Return the message of a frame.

    Raises: ProtocolError: a field is missing, unknown, or of another type.
    """
    cls = _BY_KIND[kind]
    types = _FIELD_TYPES[cls]
    if header.keys() != types.keys():
        raise ProtocolError(f"{cls.__name__} with the fields {sorted(header)[:8]}, expected {sorted(types)}")
    for name, hint in types.items():
        if type(header[name]) is not getattr(hint, "__origin__", hint):
            raise ProtocolError(f"{cls.__name__}.{name} is of type {type(header[name]).__name__}")
        if hint == list[int] and not all(type(item) is int for item in header[name]):
            raise ProtocolError(f"{cls.__name__}.{name} holds something that is no number")
    message: Message = cls(**header)
    return message


_ERRORS: dict[str, type[NeurosurgeonError]] = {
    ErrorCode.UNKNOWN_MODEL: UnknownModelError,
    ErrorCode.WEIGHTS: WeightsError,
    ErrorCode.PARTITION: PartitionError,
}


def error_of(reply: ErrorReply) -> NeurosurgeonError:
    """Return the exception that an error reply stands for on this side."""
    return _ERRORS.get(reply.code, RemoteError)(f"the cloud answered: {reply.message}")


def reply_of(error: NeurosurgeonError) -> ErrorReply:
    """Return the error reply that tells the peer of an exception."""
    for code, cls in _ERRORS.items():
        if isinstance(error, cls):
            return ErrorReply(code, str(error))
    return ErrorReply(ErrorCode.BAD_REQUEST, str(error))
