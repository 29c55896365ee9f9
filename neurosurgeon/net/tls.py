"""TLS 1.3 over a wire, with the standard library: contexts from files, and a wire whose bytes are encrypted.

OpenSSL works on memory here, and the wire below moves the bytes: so deadlines and typed errors are the same with and
without TLS, and 64 KiB cross with one system call, where a TLS socket needs two for each record of 16 KiB. An OpenSSL
connection must not be used by two threads at once, so a lock is held, while it computes and never while it waits.
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

from neurosurgeon.net.frames import MAGIC, TLS_HANDSHAKE, Buffer, name_stranger
from neurosurgeon.net.keys import Refusal
from neurosurgeon.net.wire import Wire
from neurosurgeon.utils.errors import AccessError, NetworkError, PeerGoneError, ProtocolError, UsageError
from neurosurgeon.utils.files import warn_if_others_can_read

CHUNK_BYTES = 65_536  # four TLS records; sides work at the same time, on what lies in the cache
LINGER_S = 0.2  # until a refused edge has read why


@dataclass(frozen=True, slots=True)
class Tls:
    """One side's part in TLS: its context, and on the cloud's side the digest of its certificate."""

    context: ssl.SSLContext
    certificate_digest: bytes = b""


def cloud_tls(certificate: Path, private_key: Path, ca: Path | None) -> Tls:
    """Return TLS for a service; with a CA, edges must show a certificate of it.

    Raises: UsageError: a file cannot be read, or does not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # no resumption: every connection proves itself
    _load(context, certificate, private_key, ca)
    if ca:
        context.verify_mode = ssl.CERT_REQUIRED
    first = certificate.read_text().partition(ssl.PEM_FOOTER)[0] + ssl.PEM_FOOTER
    der = ssl.PEM_cert_to_DER_cert(first[first.index(ssl.PEM_HEADER) :])
    return Tls(context, hashlib.sha256(der).digest())


def edge_tls(ca: Path, certificate: Path | None, private_key: Path | None) -> Tls:
    """Return TLS for an edge: the cloud must show a certificate of the CA, made out to the name that it is called by.

    Raises: UsageError: a file cannot be read, or does not fit.
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
        """Do the handshake, on the edge's side where there is a ``host`` to verify.

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
                with self._lock:
                    count = self._encrypt(view[:CHUNK_BYTES])
                    is_chunk = self._outgoing.pending >= CHUNK_BYTES
                    encrypted = self._outgoing.read() if is_chunk else b""
                view = view[count:]
                if encrypted:
                    self._wire.send([encrypted], deadline_s)
        self._flush(deadline_s)

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read and decrypt what has come; see `Wire`."""
        while True:
            count = self._decrypt(view)
            if count is not None:
                return count
            read = self._wire.read_some(self._encrypted, deadline_s)
            with self._lock:
                if read:
                    self._incoming.write(self._encrypted[:read])
                else:
                    self._incoming.write_eof()

    def _encrypt(self, view: memoryview) -> int:
        try:
            return self._ssl.write(view)
        except ssl.SSLError as exc:  # the other thread has met the end of TLS already
            raise PeerGoneError(f"TLS with {self.peer} is over") from exc

    def _decrypt(self, view: memoryview) -> int | None:
        """Return how many bytes were decrypted into ``view``, 0 at the end; None where more must come first."""
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
                if _is_alert(exc):  # TLS 1.3 tells an edge here that its certificate is not accepted
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
                self._say_why(deadline_s)
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
            check_is_tls(bytes(data[:8]), self.peer)
        self._incoming.write(data)

    def _say_why(self, deadline_s: float) -> None:
        """Send the alert; a cloud then waits for the edge to leave, as closing at once could destroy it on its way."""
        with contextlib.suppress(NetworkError):
            self._flush(deadline_s)
            linger_s = min(deadline_s, time.monotonic() + LINGER_S)
            while not self._is_edge and self._wire.read_some(self._encrypted, linger_s):
                pass

    def _failure(self, exc: ssl.SSLError) -> AccessError:
        """Return the error that OpenSSL's stands for, with its reason in words."""
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


def check_is_tls(data: bytes, peer: str) -> None:
    """Refuse a peer of a TLS port whose first bytes are not those of TLS.

    Raises: AccessError: an edge of ours without TLS, which is told. ProtocolError: a stranger.
    """
    if data[: len(MAGIC)] == MAGIC:
        raise AccessError(f"{peer} speaks without TLS", Refusal.TLS_WANTED)
    raise ProtocolError(f"{peer} does not speak TLS: {name_stranger(data)}")


def _reason(exc: ssl.SSLError) -> str:
    return (exc.reason or "unknown reason").replace("_", " ").lower()


def _is_alert(exc: ssl.SSLError) -> bool:
    return "alert" in _reason(exc)
