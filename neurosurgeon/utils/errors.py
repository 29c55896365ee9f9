"""The tree of all errors that a user can see; the number is the exit code.

NeurosurgeonError                 1   something failed
├── UsageError                    2   the command, a file or a value is wrong
│   ├── AddressError                  the host's name cannot be resolved
│   ├── UnknownModelError             no such model
│   ├── InputError                    the input image cannot be used
│   ├── WeightsError                  a weights file does not fit, or the two sides differ
│   ├── PartitionError                no such partition point, or no such cut
│   ├── GraphError                    the two sides hold different networks under one name
│   ├── NonFiniteError                a tensor holds NaN or infinite values
│   ├── TraceError                    the module cannot become a graph
│   ├── MismatchError                 the traced program computes something else than the module
│   ├── InputSizeError                the network cannot take an input of this size
│   ├── DeviceError                   the machine has no such device
│   └── DataSetError                  a data set or predictor file is malformed
├── StreamError                   1   a video ends in the middle
├── VerificationError             1   --verify: the output differs from that of the user's module
├── InternalError                 1   a defect of this program
├── PlanningError                 1   no plan can be made
│   └── MissingPredictorError         a kind of layer has no predictor
└── NetworkError                  3   the network or the peer
    ├── ConnectError                  no connection could be made
    ├── PortBusyError                 another program listens on the port
    ├── PeerGoneError                 the peer closed or reset the connection
    ├── DeadlineError                 the peer did not finish in time
    ├── ProtocolError                 the peer broke the protocol
    │   └── VersionError              the peer has another version of the protocol
    ├── AccessError               4   not authenticated: key, TLS or certificate
    └── RemoteError                   the peer replied with an error
        └── BusyError                 the cloud has too many tasks: retry later
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class NeurosurgeonError(Exception):
    """Base of the tree; the message is one line with the failure, its subject, and the remedy."""

    exit_code = 1


class UsageError(NeurosurgeonError):
    """The command, a file or a value given by the user is wrong."""

    exit_code = 2


class AddressError(UsageError):
    """The host's name cannot be resolved, at all or at the moment."""


class UnknownModelError(UsageError):
    """The model does not exist; the message lists the known models."""


class InputError(UsageError):
    """The input file cannot be read as an image."""


class WeightsError(UsageError):
    """A weights file is unreadable or does not fit, or the two sides hold different weights."""


class PartitionError(UsageError):
    """The partition point is outside the network, or a set of nodes is no cut of it."""


class GraphError(UsageError):
    """The two sides hold different networks under one name."""


class NonFiniteError(UsageError):
    """A tensor for the cloud holds NaN or infinite values."""


class TraceError(UsageError):
    """The module cannot become a graph; the message names the operation and the remedy."""


class MismatchError(UsageError):
    """The traced program, or a cut of it, computes something else than the user's own module."""


class InputSizeError(UsageError):
    """The network cannot take an input of this size; the message names the layer."""


class DeviceError(UsageError):
    """This machine does not have the requested device."""


class DataSetError(UsageError):
    """A data set or predictor file is malformed; the message names file, row and column."""


class InternalError(NeurosurgeonError):
    """A defect of this program; the log has its traceback (`utils.logs.internal_error`)."""


class StreamError(NeurosurgeonError):
    """A stream of frames ended before its end; the message names the last good frame."""


class VerificationError(NeurosurgeonError):
    """The output of a task differs from that of the user's own module beyond the tolerance."""


class PlanningError(NeurosurgeonError):
    """No plan can be made from these latencies."""


class MissingPredictorError(PlanningError):
    """A layer's kind has no latency predictor; the message names the layer."""


class NetworkError(NeurosurgeonError):
    """The network or the peer failed."""

    exit_code = 3


class ConnectError(NetworkError):
    """No connection could be made."""


class PortBusyError(NetworkError):
    """The port to listen on is taken."""


class PeerGoneError(NetworkError):
    """The peer closed or reset the connection."""


class DeadlineError(NetworkError):
    """The peer did not finish in time."""


class ProtocolError(NetworkError):
    """The peer sent bytes that the protocol does not allow."""


class VersionError(ProtocolError):
    """The peer has another version of the protocol."""


class AccessError(NetworkError):
    """One side does not authenticate the other; ``refusal`` is the code sent to the peer, 0 if none is sent."""

    exit_code = 4

    def __init__(self, message: str, refusal: int = 0) -> None:
        super().__init__(message)
        self.refusal = refusal


class RemoteError(NetworkError):
    """The peer replied with an error."""


class BusyError(RemoteError):
    """The cloud has too many tasks; ``retry_ms`` is the time after which to retry, ms."""

    def __init__(self, message: str, retry_ms: float = 0.0) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


def is_connection_loss(exc: BaseException) -> bool:
    """Return whether an error means that the connection is lost, so that a new one may help.

    This is the only definition. A reply with an error (RemoteError) is no loss. `net.connection` turns every OSError of
    a socket into a NetworkError; any other exception is a defect of this program or an error of this machine, which
    would occur on a new connection again.
    """
    return isinstance(exc, NetworkError) and not isinstance(exc, RemoteError)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of writing a file into a message for the user.

    Raises: UsageError: the file cannot be written.
    """
    try:
        yield
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror or exc}") from exc
