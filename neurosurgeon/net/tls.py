"""TLS 1.3 over a wire, with the standard library: contexts from files, and a wire whose bytes are encrypted.

Theory of operation. OpenSSL works on two memory buffers, and the wire below moves their bytes: so deadlines and typed
errors are the same with and without TLS.

    handshake ── both sides accept ──▶ open ── the peer closes, or breaks TLS ──▶ over
        └─────── one side refuses ──▶ alert sent, the cloud waits LINGER_S for the edge to read it ──▶ over

One thread may send while another reads, but an OpenSSL connection allows one call at a time. A lock guards it: it is
held while OpenSSL computes, and never while the wire waits. After the handshake only the sending thread empties the
outgoing buffer, and only the reading thread fills the incoming one.

`ssl.SSLSocket` (non-blocking, with poll and the same lock) takes 0.77 to 1.06 times as long for a frame of 4 KB, 0.92
to 1.03 times for 150 KB, 1.04 to 1.10 for 602 KB, 1.04 to 1.07 for 13 MB (three runs in turns, loopback). It is not
used: it takes the descriptor from the socket that other threads shut down and close, and its own ``shutdown`` drops
encryption, while replies still go out after `Connection.stop_reading`.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neurosurgeon.net.frames import MAGIC, TLS_HANDSHAKE, Buffer, describe_first_bytes
from neurosurgeon.net.keys import Refusal
from neurosurgeon.net.wire import Wire
from neurosurgeon.utils.errors import AccessError, NetworkError, PeerGoneError, ProtocolError, UsageError
from neurosurgeon.utils.files import warn_if_others_can_read

CHUNK_BYTES = 65_536  # four TLS records: both sides compute at the same time, on bytes in the cache
LINGER_S = 0.2  # time for the edge to read the TLS alert


@dataclass(frozen=True, slots=True)
class Tls:
    """The TLS context of one side, and the digest of its certificate if it is a cloud."""

    context: ssl.SSLContext
    certificate_digest: bytes = b""


def cloud_tls(certificate: Path, private_key: Path, ca: Path | None) -> Tls:
    """Return the context of a service; with a CA, edges must show a certificate that it signed.

    Raises: UsageError: a file cannot be read, or does not fit the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # no resumption: every connection is authenticated in full
    _load(context, certificate, private_key, ca)
    if ca:
        context.verify_mode = ssl.CERT_REQUIRED
    first = certificate.read_text().partition(ssl.PEM_FOOTER)[0] + ssl.PEM_FOOTER
    der = ssl.PEM_cert_to_DER_cert(first[first.index(ssl.PEM_HEADER) :])
    return Tls(context, hashlib.sha256(der).digest())


def edge_tls(ca: Path, certificate: Path | None, private_key: Path | None) -> Tls:
    """Return the context of an edge: the cloud must show a certificate of the CA for the name that is connected to.

    Raises: UsageError: a file cannot be read, or does not fit the others.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name
    _load(context, certificate, private_key, ca)
    return Tls(context)


def _load(context: ssl.SSLContext, certificate: Path | None, private_key: Path | None, ca: Path | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    paths = [path for path in (certificate, private_key, ca) if path]
    try:
        for path in paths:
            with path.open("rb") as file:
                if path == private_key:
                    warn_if_others_can_read(file, path)
        if certificate:
            context.load_cert_chain(certificate, private_key, password=_no_password)
        if ca:
            context.load_verify_locations(ca)
    except ssl.SSLError as exc:
        names = ", ".join(map(str, paths))
        raise UsageError(f"{names}: not PEM files that fit together ({exc.reason or 'unreadable'})") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {exc.filename}: {exc.strerror or exc}") from exc


def _no_password() -> str:
    raise UsageError("the private key is encrypted: pass one without a password")


class TlsWire:
    """A wire under TLS 1.3; see `Wire`."""

    def __init__(self, wire: Wire, tls: Tls, host: str | None, deadline_s: float) -> None:
        """Do the handshake. May block until the deadline.

        Args:   host: the name that the peer's certificate must be for; None on the cloud's side.
        Raises: AccessError: one side does not accept the other. NetworkError.
        """
        self.peer = wire.peer
        self._is_edge = host is not None
        self._wire = wire
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = tls.context.wrap_bio(self._incoming, self._outgoing, host is None, host)
        self._encrypted = memoryview(bytearray(CHUNK_BYTES))
        self._shake_hands(deadline_s)
        shown = self._ssl.getpeercert(binary_form=True) if host is not None else None
        self.certificate_digest = hashlib.sha256(shown).digest() if shown else tls.certificate_digest

    def send(self, pieces: Sequence[Buffer], deadline_s: float) -> None:
        """Encrypt and send the pieces, a chunk at a time; see `Wire`."""
        for piece in pieces:
            view = memoryview(piece)
            while view:
                try:
                    with self._lock:
                        count = self._ssl.write(view[:CHUNK_BYTES])
                except ssl.SSLError as exc:  # the reading thread has met the end of TLS already
                    raise PeerGoneError(f"TLS with {self.peer} is over") from exc
                view = view[count:]
                if self._outgoing.pending >= CHUNK_BYTES:
                    self._flush(deadline_s)
        self._flush(deadline_s)

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read and decrypt at least a byte; see `Wire`."""
        while (count := self._decrypt(view)) is None:
            read = self._wire.read_some(self._encrypted, deadline_s)
            with self._lock:
                if read:
                    self._incoming.write(self._encrypted[:read])
                else:
                    self._incoming.write_eof()
        return count

    def _decrypt(self, view: memoryview) -> int | None:
        """Return how many bytes were decrypted into ``view``, 0 at the end; None if more must be read first."""
        done = 0
        with self._lock:
            try:
                while done < len(view):
                    count: int = self._ssl.read(len(view) - done, view[done:])  # type: ignore[assignment]
                    if not count:
                        break
                    done += count
            except ssl.SSLWantReadError:
                return done or None
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                return done
            except ssl.SSLError as exc:
                if _is_alert(exc):  # in TLS 1.3 an edge learns only here that its certificate is refused
                    raise self._failure(exc) from exc
                raise ProtocolError(f"{self.peer} broke TLS: {_reason(exc)}") from exc
        return done

    # ---------------------------------------------------------------- the handshake

    def _shake_hands(self, deadline_s: float) -> None:
        first = True
        while True:
            try:
                self._ssl.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush(deadline_s)
            except ssl.SSLError as exc:
                self._send_alert(deadline_s)
                raise self._failure(exc) from exc
            self._read_handshake(first, deadline_s)
            first = False
        self._flush(deadline_s)

    def _read_handshake(self, first: bool, deadline_s: float) -> None:
        try:
            count = self._wire.read_some(self._encrypted, deadline_s)
            if not count:
                raise PeerGoneError(f"{self.peer} left in the TLS handshake")
        except PeerGoneError as exc:
            if self._is_edge:
                raise AccessError(
                    f"{self.peer} ended the TLS handshake: it may not speak TLS "
                    "(leave --tls-ca out, or start it with --tls-cert)"
                ) from exc
            raise
        data = self._encrypted[:count]
        if first and not self._is_edge and data[:1] != TLS_HANDSHAKE:
            if data[: len(MAGIC)] == MAGIC:
                raise AccessError(f"{self.peer} speaks without TLS", Refusal.TLS_WANTED)
            raise ProtocolError(f"{self.peer} does not speak TLS: {describe_first_bytes(data)}")
        self._incoming.write(data)

    def _send_alert(self, deadline_s: float) -> None:
        """Send the alert; a cloud then waits for the edge to close, as closing first could discard it in flight."""
        with contextlib.suppress(NetworkError):
            self._flush(deadline_s)
            linger_s = min(deadline_s, time.monotonic() + LINGER_S)
            while not self._is_edge and self._wire.read_some(self._encrypted, linger_s):
                pass

    def _failure(self, exc: ssl.SSLError) -> AccessError:
        """Return the access error for an error of OpenSSL, with its reason in words."""
        if isinstance(exc, ssl.SSLCertVerificationError):
            return AccessError(f"the certificate of {self.peer} is not accepted: {exc.verify_message}")
        reason = _reason(exc)
        if _is_alert(exc):
            hint = " (does it want --tls-cert and --tls-key, signed by its --tls-ca?)" if self._is_edge else ""
            return AccessError(f"{self.peer} does not accept us: {reason}{hint}")
        if reason == "wrong version number":
            return AccessError(f"{self.peer} does not speak TLS: leave --tls-ca out, or start it with --tls-cert")
        return AccessError(f"no TLS with {self.peer}: {reason}")

    def _flush(self, deadline_s: float) -> None:
        with self._lock:
            encrypted = self._outgoing.read()
        if encrypted:
            self._wire.send([encrypted], deadline_s)


def _reason(exc: ssl.SSLError) -> str:
    return (exc.reason or "unknown reason").replace("_", " ").lower()


def _is_alert(exc: ssl.SSLError) -> bool:
    return "alert" in _reason(exc)
