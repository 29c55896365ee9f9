"""A shared key: each side proves that it has it before any message is read, and all later bytes are sealed with it.

Theory of operation. The handshake runs in the thread that connects or accepts, by one deadline:

    edge                                                  cloud
    1. KEY_START      nonce of the edge       ────────▶
    2.                                        ◀────────   KEY_CHALLENGE   nonce of the cloud
    3. KEY_PROOF      HMAC("edge", nonces)    ────────▶                   compared; the wrong one is refused
    4.                                        ◀────────   KEY_ACCEPTED    HMAC("cloud", nonces), compared as well

- All four are heads of one unit with 32 raw bytes. Until the end, no byte is unpickled, and no other frame is read.
- The edge proves first, so an unauthenticated peer receives nothing from which to guess the key.
- Both nonces are new each time, so a recorded handshake proves nothing.
- The proofs name their roles, so a proof cannot be sent back to its maker.
- Inside TLS the proofs also cover the cloud's certificate, so no other certificate can relay them.
- At a wrong proof, or the frame of an edge without a key, the cloud sends a REFUSAL of one byte and closes.

From then on every byte travels in records (`SealedWire`), each direction with a key of its own (HMAC-SHA256 of the
nonces). The sending thread owns the state of one direction, the reading thread that of the other; there is no lock.

    size  field
    4     length of the data, n, big-endian, at most 64 KiB
    32    HMAC-SHA256 of the record's number, its length, and the data
    n     data: the head of a frame, or a part of its body

A record that was changed, left out, repeated, reordered or copied from another connection ends the connection before
its data is used. Inside TLS, which does the same, there are no records.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from neurosurgeon.net.frames import (
    HEAD_UNIT,
    SMALL_LIMITS,
    WIRE_VERSION,
    Buffer,
    Kind,
    pack_frame,
    unpack_head,
    unpack_prefix,
)
from neurosurgeon.net.wire import Wire, read_all, read_head_unit
from neurosurgeon.utils.errors import AccessError, NetworkError, ProtocolError, UsageError
from neurosurgeon.utils.files import warn_if_others_can_read

KEY_VARIABLE = "NEUROSURGEON_KEY"
MIN_KEY_BYTES, MAX_KEY_BYTES = 16, 4096  # 128 bits, if they are random
HASH = "sha256"  # in hardware 2.0 GB/s; blake2b: 1.3 (tests/benchmark/safety.py)
DIGEST_BYTES = 32
MAX_RECORD_BYTES = 65_536  # one side hashes a record while the other still hashes the one before
RECORD = struct.Struct("!I32s")
NUMBER = struct.Struct("!QI")


class Refusal(IntEnum):
    """The reason why a service refuses an edge, one byte; the edge turns it into a message."""

    KEY_WANTED = 1
    NO_KEY_HERE = 2
    WRONG_KEY = 3
    TLS_WANTED = 4


_MESSAGES = {
    Refusal.KEY_WANTED: "it asks for a key: pass --key-file with the file that it was started with",
    Refusal.NO_KEY_HERE: "it has no key to authenticate with: start it with --key-file, too",
    Refusal.WRONG_KEY: "it has another key: start both sides with the same --key-file",
    Refusal.TLS_WANTED: "it requires TLS: pass --tls-ca with the CA of its certificate",
}


class SessionKeys(NamedTuple):
    """The keys of one connection, one for each direction."""

    sending: bytes
    receiving: bytes


def find_key(path: Path | None) -> bytes | None:
    """Return the key from a file, else from the environment, else None.

    Raises: UsageError: it cannot be read, or has a wrong length; the message never contains the key.
    """
    if path is None:
        text = os.environ.get(KEY_VARIABLE)
        return None if text is None else _checked(os.fsencode(text), f"the key in {KEY_VARIABLE}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
            warn_if_others_can_read(file, path)
    except OSError as exc:
        raise UsageError(f"cannot read the key file {path}: {exc.strerror or exc}") from exc
    return _checked(data, f"the key in {path}")


def _checked(data: bytes, name: str) -> bytes:
    key = data.strip()  # an editor's last newline is no part of it
    if len(key) < MIN_KEY_BYTES or len(data) > MAX_KEY_BYTES:
        raise UsageError(
            f"{name} must have {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes: make one with `openssl rand -hex 32`"
        )
    return key


# ---------------------------------------------------------------- the handshake


def prove_to_cloud(wire: Wire, key: bytes, certificate: bytes, deadline_s: float) -> SessionKeys:
    """Do the edge's part of the handshake. May block until the deadline.

    Args:   certificate: the digest of the cloud's certificate, or empty.
    Raises: AccessError: the cloud refused, or did not prove that it has the key. NetworkError.
    """
    ours = secrets.token_bytes(DIGEST_BYTES)
    _send(wire, Kind.KEY_START, ours, deadline_s)
    theirs = _receive(wire, Kind.KEY_CHALLENGE, deadline_s)
    _send(wire, Kind.KEY_PROOF, _proof(key, b"edge", certificate, ours, theirs), deadline_s)
    proof = _receive(wire, Kind.KEY_ACCEPTED, deadline_s)
    if not hmac.compare_digest(proof, _proof(key, b"cloud", certificate, ours, theirs)):
        raise AccessError(f"{wire.peer} did not prove that it has the key: start both sides with the same --key-file")
    return SessionKeys(*_session_keys(key, certificate, ours, theirs))


def prove_to_edge(wire: Wire, key: bytes, certificate: bytes, deadline_s: float) -> SessionKeys:
    """Do the cloud's part of the handshake. May block until the deadline.

    Args:   certificate: the digest of the cloud's certificate, or empty.
    Raises: AccessError: the edge has no key, or another one. NetworkError.
    """
    theirs = _receive(wire, Kind.KEY_START, deadline_s)
    ours = secrets.token_bytes(DIGEST_BYTES)
    _send(wire, Kind.KEY_CHALLENGE, ours, deadline_s)
    proof = _receive(wire, Kind.KEY_PROOF, deadline_s)
    if not hmac.compare_digest(proof, _proof(key, b"edge", certificate, theirs, ours)):
        raise AccessError(f"{wire.peer} did not prove that it has the key", Refusal.WRONG_KEY)
    _send(wire, Kind.KEY_ACCEPTED, _proof(key, b"cloud", certificate, theirs, ours), deadline_s)
    return SessionKeys(*reversed(_session_keys(key, certificate, theirs, ours)))


def tell_refusal(wire: Wire, error: AccessError, deadline_s: float) -> None:
    """Send an edge the refusal code of an error, if it has one. May block until the deadline."""
    if error.refusal:
        with contextlib.suppress(NetworkError):  # the edge does not read, or has left
            _send(wire, Kind.REFUSAL, bytes([error.refusal]), deadline_s)


def refused(peer: str, reason: bytes) -> AccessError:
    """Return the error for a refusal that was received."""
    known = {bytes([code]): message for code, message in _MESSAGES.items()}
    return AccessError(f"{peer} refused this side: {known.get(reason, 'it gave no known reason; read its log')}")


def _proof(key: bytes, label: bytes, certificate: bytes, edge_nonce: bytes, cloud_nonce: bytes) -> bytes:
    role = b"neurosurgeon %d %s" % (WIRE_VERSION, label)
    return hmac.digest(key, b"\0".join((role, edge_nonce, cloud_nonce, certificate)), HASH)


def _session_keys(key: bytes, certificate: bytes, edge_nonce: bytes, cloud_nonce: bytes) -> list[bytes]:
    """Return the key for the direction to the cloud, and the one for the direction to the edge."""
    labels = (b"edge to cloud", b"cloud to edge")
    return [_proof(key, label, certificate, edge_nonce, cloud_nonce) for label in labels]


def _send(wire: Wire, kind: Kind, value: bytes, deadline_s: float) -> None:
    wire.send(pack_frame(kind, value), deadline_s)


def _receive(wire: Wire, expected: Kind, deadline_s: float) -> bytes:
    """Return the 32 bytes of a step of the handshake."""
    data = memoryview(bytearray(HEAD_UNIT))
    read_head_unit(wire, data, deadline_s)
    prefix = unpack_prefix(data, SMALL_LIMITS)
    is_one_unit = prefix.head_length == HEAD_UNIT
    if is_one_unit and prefix.kind is Kind.REFUSAL:
        raise refused(wire.peer, unpack_head(prefix, data).header)
    if is_one_unit and prefix.kind is expected and prefix.header_length == DIGEST_BYTES:
        return unpack_head(prefix, data).header
    if expected is Kind.KEY_START and prefix.kind is Kind.HELLO:
        raise AccessError(f"{wire.peer} sent a hello without a proof of the key", Refusal.KEY_WANTED)
    raise AccessError(f"handshake with {wire.peer} failed: expected {expected.name}, got {prefix.kind.name}")


# ---------------------------------------------------------------- records


class _Seal:
    """Computes the tags of the records of one direction, in order. Called on one thread."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod=HASH)
        self._number = 0

    def tag(self, length: int, parts: Sequence[Buffer]) -> bytes:
        """Return the tag of the next record."""
        sealing = self._keyed.copy()
        sealing.update(NUMBER.pack(self._number, length))
        for part in parts:
            sealing.update(part)
        self._number += 1
        return sealing.digest()


class SealedWire:
    """A wire whose bytes can be read in transit, but not forged, changed or repeated without the key."""

    def __init__(self, wire: Wire, keys: SessionKeys) -> None:
        self.peer = wire.peer
        self._wire = wire
        self._sent, self._received = _Seal(keys.sending), _Seal(keys.receiving)
        self._record = memoryview(bytearray(RECORD.size))
        self._rest = memoryview(b"")  # of a record that was longer than the view of its reader

    def send(self, pieces: Sequence[Buffer], deadline_s: float) -> None:
        """Send the first piece, a frame's head, as one record, and the others in as few as they fill."""
        for parts in _records(pieces):
            length = sum(map(len, parts))
            self._wire.send([RECORD.pack(length, self._sent.tag(length, parts)), *parts], deadline_s)

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read the data of one record, after a check of its tag; see `Wire`."""
        if self._rest:
            return self._take_rest(view)
        count = self._wire.read_some(self._record, deadline_s)
        if not count:
            return 0
        read_all(self._wire, self._record[count:], deadline_s)
        length: int
        length, tag = RECORD.unpack(self._record)
        if not 0 < length <= MAX_RECORD_BYTES:
            raise ProtocolError(f"{self.peer} sent a record of {length} bytes: expected 1 to {MAX_RECORD_BYTES}")
        data = view[:length] if length <= len(view) else memoryview(bytearray(length))
        read_all(self._wire, data, deadline_s)
        if not hmac.compare_digest(tag, self._received.tag(length, [data])):
            raise ProtocolError(f"{self.peer} sent a record with a wrong tag: it was changed in transit, or forged")
        if length <= len(view):
            return length
        self._rest = data
        return self._take_rest(view)

    def _take_rest(self, view: memoryview) -> int:
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _records(pieces: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """Yield the parts of each record: the first piece alone, then the others in as few records as they fill."""
    for group in (pieces[:1], pieces[1:]):
        parts: list[Buffer] = []
        room = MAX_RECORD_BYTES
        for piece in group:
            view = memoryview(piece)
            while view:
                part = view[:room]
                parts.append(part)
                view, room = view[len(part) :], room - len(part)
                if not room:
                    yield parts
                    parts, room = [], MAX_RECORD_BYTES
        if parts:
            yield parts
