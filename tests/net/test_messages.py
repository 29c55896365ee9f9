"""Messages: each round-trips through a frame's header, malformed ones are refused, errors keep their type."""

from __future__ import annotations

from typing import Any

import pytest

from neurosurgeon.net.frames import RAW_KINDS, WIRE_VERSION, Kind
from neurosurgeon.net.header import pack_header, unpack_header
from neurosurgeon.net.messages import (
    AskLatencies,
    AskTicket,
    AskTrain,
    ErrorCode,
    ErrorReply,
    Hello,
    Latencies,
    Message,
    Ping,
    Pong,
    Prepare,
    Probe,
    Ready,
    Reply,
    Request,
    Samples,
    Ticket,
    Train,
    error_of,
    figures_of,
    header_values,
    kind_of,
    message_of,
    reply_of,
)
from neurosurgeon.utils.errors import (
    BusyError,
    DeviceError,
    GraphError,
    InputError,
    NeurosurgeonError,
    PartitionError,
    PlanningError,
    ProtocolError,
    RemoteError,
    UnknownModelError,
    WeightsError,
)

MESSAGES: dict[Kind, Message] = {
    Kind.HELLO: Hello.of(device="cpu", threads=2),
    Kind.PREPARE: Prepare("le_net", b"\7", "89abcdef"),
    Kind.READY: Ready("le_net", "0123abcd"),
    Kind.REQUEST: Request("le_net", b"\7", "89abcdef", "0123abcd"),
    Kind.REPLY: Reply(4.5, 3.0, 0.5, 1.25, 0.25, 2.0),
    Kind.ERROR: ErrorReply(ErrorCode.WEIGHTS.value, "other weights"),
    Kind.PING: Ping(1),
    Kind.PONG: Pong(1),
    Kind.PROBE: Probe(16_384),
    Kind.SAMPLES: Samples([0, 10], [100, 200]),
    Kind.ASK_LATENCIES: AskLatencies("le_net", "89abcdef"),
    Kind.LATENCIES: Latencies("le_net", "forest", [1.0, 2.5], [0.5, 2.0], [1.5, 3.0], ["features.0"], "data of A"),
    Kind.ASK_TICKET: AskTicket(1),
    Kind.TICKET: Ticket(9922, bytes(16)),
    Kind.TRAIN: Train(1, 20),
    Kind.ASK_TRAIN: AskTrain(bytes(16), 1, 20, 1472),
}
every_message = pytest.mark.parametrize("message", MESSAGES.values(), ids=lambda message: type(message).__name__)


def through_a_header(message: Message) -> Message:
    """Return the message that the receiver of a frame makes of another."""
    (values,) = unpack_header(pack_header(header_values(message)))
    return message_of(kind_of(message), values) or Reply._make(figures_of(message))


def other_types(value: Any) -> list[Any]:
    """Return values of every other plain type."""
    plain: list[Any] = [None, True, 1, 1.0, "1", b"1", [], (), {}]
    return [other for other in plain if type(other) is not type(value)]


def test_every_kind_is_tested() -> None:
    assert set(MESSAGES) == set(Kind) - RAW_KINDS
    assert {kind: kind_of(message) for kind, message in MESSAGES.items()} == {kind: kind for kind in MESSAGES}


@every_message
def test_a_message_round_trips(message: Message) -> None:
    received = through_a_header(message)
    assert received == message
    assert type(received) is type(message)


@every_message
def test_a_missing_field_is_refused(message: Message) -> None:
    with pytest.raises(ProtocolError, match=type(message).__name__):
        message_of(kind_of(message), tuple(message)[:-1])


@every_message
def test_a_field_too_many_is_refused(message: Message) -> None:
    with pytest.raises(ProtocolError, match=type(message).__name__):
        message_of(kind_of(message), (*message, 1))


@every_message
def test_a_field_of_another_type_is_refused(message: Message) -> None:
    for index, value in enumerate(message):
        for other in other_types(value):
            with pytest.raises(ProtocolError, match=type(message).__name__):
                message_of(kind_of(message), (*message[:index], other, *message[index + 1 :]))


@every_message
@pytest.mark.parametrize(
    "container", [list, lambda values: None, lambda values: dict(enumerate(values)), lambda values: values[0]]
)
def test_fields_come_as_a_tuple(message: Message, container: Any) -> None:
    with pytest.raises(ProtocolError, match=type(message).__name__):
        message_of(kind_of(message), container(tuple(message)))


def test_a_refusal_of_many_fields_is_a_short_line() -> None:
    with pytest.raises(ProtocolError) as caught:
        message_of(Kind.PING, (1,) * 10_000)
    assert len(str(caught.value)) < 200


def test_hello_has_the_wire_version() -> None:
    assert Hello.of() == (WIRE_VERSION, {})


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [UnknownModelError, GraphError, WeightsError, PartitionError])
def test_an_error_of_the_users_keeps_its_type(error: type[NeurosurgeonError]) -> None:
    received = error_of(reply_of(error("what, to what, what to do")))
    assert type(received) is error
    assert str(received) == "the cloud answered: what, to what, what to do"


@pytest.mark.parametrize("error", [ProtocolError, InputError, DeviceError, PlanningError, NeurosurgeonError])
def test_any_other_error_is_a_bad_request_and_remote(error: type[NeurosurgeonError]) -> None:
    reply = reply_of(error("why"))
    assert reply == ErrorReply(ErrorCode.BAD_REQUEST, "why")
    assert type(error_of(reply)) is RemoteError


def test_a_busy_reply_has_the_time_of_the_retry() -> None:
    reply = reply_of(BusyError("64 tasks wait", 250.0))
    assert reply == ErrorReply("busy", "64 tasks wait", 250.0)
    received = error_of(reply)
    assert isinstance(received, BusyError)
    assert received.retry_ms == 250.0


@pytest.mark.parametrize("error", [UnknownModelError, ProtocolError])
def test_an_error_reply_round_trips(error: type[NeurosurgeonError]) -> None:
    received = through_a_header(reply_of(error("why")))
    assert isinstance(received, ErrorReply)
    assert received.message == "why"


def test_the_message_of_a_hostile_cloud_is_short_and_printable() -> None:
    received = str(error_of(ErrorReply("weights", "\x1b[2J\nINFO all is well\u202e" + "A" * 60_000)))
    assert received.isprintable()
    assert len(received) < 2000


@pytest.mark.parametrize("code", ["stopping", "internal", "a code of a later version", ""])
def test_a_code_without_a_type_here_is_remote(code: str) -> None:
    assert type(error_of(ErrorReply(code, "why"))) is RemoteError
