"""Authentication: a shared key, TLS, both, or on loopback neither; the same for tasks and for bandwidth."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from neurosurgeon.net.keys import SealedWire, prove_to_cloud, prove_to_edge, tell_refusal
from neurosurgeon.net.wire import Wire
from neurosurgeon.utils.errors import AccessError, UsageError

if TYPE_CHECKING:  # loaded only where TLS is used
    from neurosurgeon.net.tls import Tls


@dataclass(frozen=True, slots=True)
class Access:
    """The key and certificates of one side: it proves them, and asks the other side to do the same."""

    key: bytes | None = field(default=None, repr=False)
    tls: Tls | None = None
    insecure: bool = False  # no authentication, although other machines can reach the port
    cloud_name: str | None = None  # the name in its certificate, if it is reached through a relay

    def as_edge(self, wire: Wire, host: str, deadline_s: float) -> Wire:
        """Return the wire for messages, after both sides have authenticated. May block until the deadline.

        Args:   host: the name or address that the cloud's certificate must be for.
        Raises: AccessError: one side does not accept the other. NetworkError.
        """
        certificate = b""
        if self.tls:
            from neurosurgeon.net.tls import TlsWire

            wire = under_tls = TlsWire(wire, self.tls, self.cloud_name or host, deadline_s)
            certificate = under_tls.certificate_digest
        if not self.key:
            return wire
        keys = prove_to_cloud(wire, self.key, certificate, deadline_s)
        return wire if self.tls else SealedWire(wire, keys)

    def as_cloud(self, wire: Wire, deadline_s: float) -> Wire:
        """Return the wire for messages, as `as_edge` does; an edge that is refused receives the reason.

        Raises: AccessError: one side does not accept the other. NetworkError.
        """
        certificate = b""
        try:
            if self.tls:
                from neurosurgeon.net.tls import TlsWire

                wire, certificate = TlsWire(wire, self.tls, None, deadline_s), self.tls.certificate_digest
            if not self.key:
                return wire
            keys = prove_to_edge(wire, self.key, certificate, deadline_s)
        except AccessError as exc:
            tell_refusal(wire, exc, deadline_s)
            raise
        return wire if self.tls else SealedWire(wire, keys)

    def check_exposure(self, address: str) -> None:
        """Check that no unauthenticated peer is served by mistake.

        Raises: UsageError: other machines can reach ``address``, and there is no authentication.
        """
        if not (self.key or self.tls or self.insecure or is_loopback(address)):
            raise UsageError(
                f"{address} can be reached from other machines: pass --key-file FILE (openssl rand -hex 32 makes a "
                "key), or --tls-cert and --tls-key (make certs), or --insecure to serve without authentication"
            )


OPEN = Access()


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach a numeric address."""
    known = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(known, "ipv4_mapped", None)
    return (mapped or known).is_loopback
