"""Every error a user can meet, in one tree; the number is the exit code.

NeurosurgeonError                 1   something failed
├── UsageError                    2   the command, a file or a value is wrong
│   ├── AddressError                  the host's name is not known
│   ├── UnknownModelError             no such model
│   ├── InputError                    the input image cannot be used
│   ├── WeightsError                  a weights file does not fit, or the two sides differ
│   ├── PartitionError                no such partition point, or no such cut
│   ├── GraphError                    the two sides hold different networks under one name
│   ├── NonFiniteError                a tensor holds NaN or infinite values
│   ├── TraceError                    the module cannot become a graph
│   ├── InputSizeError                the network cannot take an input of this size
│   ├── DeviceError                   the device is not there
│   └── DataSetError                  a data set or predictor file is malformed
├── InternalError                 1   a defect of this program
├── PlanningError                 1   no plan can be made
│   └── MissingPredictorError         a kind of layer has no predictor
└── NetworkError                  3   the network or the peer
    ├── ConnectError                  nobody answers there
    ├── PortBusyError                 somebody else listens there
    ├── PeerGoneError                 the peer closed or reset the connection
    ├── DeadlineError                 the peer was too slow
    ├── ProtocolError                 the peer broke the protocol
    │   └── VersionError              the peer speaks another version of it
    ├── AccessError               4   not allowed in: key, TLS or certificate
    └── RemoteError                   the peer reported an error of its own
        └── BusyError                 the cloud has too many tasks: ask again later
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class NeurosurgeonError(Exception):
    """Base of the tree: one line that says what happened, to what, and what to do."""

    exit_code = 1


class UsageError(NeurosurgeonError):
    """The command, a file or a value given by the user is wrong."""

    exit_code = 2


class AddressError(UsageError):
    """Nobody knows the host's name, or not just now."""


class UnknownModelError(UsageError):
    """The model does not exist; the message lists those that do."""


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
    """The module cannot become a graph; the message names the operation and what to do."""


class InputSizeError(UsageError):
    """The network cannot take an input of this size; the message names the layer."""


class DeviceError(UsageError):
    """The device asked for is not there."""


class DataSetError(UsageError):
    """A data set or predictor file is malformed; the message names file, row and column."""


class InternalError(NeurosurgeonError):
    """A defect of this program; the log has its traceback (`utils.logs.internal_error`)."""


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
    """The peer sent something that the protocol does not allow."""


class VersionError(ProtocolError):
    """The peer speaks another version of the protocol."""


class AccessError(NetworkError):
    """One side does not let the other in; ``refusal`` is the byte that says why to the peer, 0 if it is not told."""

    exit_code = 4

    def __init__(self, message: str, refusal: int = 0) -> None:
        super().__init__(message)
        self.refusal = refusal


class RemoteError(NetworkError):
    """The peer answered with an error of its own."""


class BusyError(RemoteError):
    """The cloud has more tasks than it takes; it says when to ask again."""

    def __init__(self, message: str, retry_ms: float = 0.0) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


def is_connection_loss(exc: BaseException) -> bool:
    """Return whether an error means that the peer, or the network to it, is gone, so that a new connection may help.

    This is the only definition. What the peer answers (RemoteError) is no loss. Every OSError of a socket is a
    NetworkError by the time it leaves `net.connection`; any other exception is a defect of this program, or an error of
    this machine, which a new connection would only meet again.
    """
    return isinstance(exc, NetworkError) and not isinstance(exc, RemoteError)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a file that cannot be written into one line for the user.

    Raises: UsageError.
    """
    try:
        yield
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror or exc}") from exc
