"""Who may speak: a shared key, TLS, both, or on loopback neither; the same for tasks and for bandwidth."""

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
    """What one side proves, and asks the other to prove."""

    key: bytes | None = field(default=None, repr=False)
    tls: Tls | None = None
    insecure: bool = False  # anybody who reaches the port may speak
    cloud_name: str | None = None  # that its certificate is made out to, where it is reached by way of a relay

    def as_edge(self, wire: Wire, host: str, deadline_s: float) -> Wire:
        """Return the wire to speak over, once each side has proved what the other wants of it.

        Args:   host: the name or address that the cloud's certificate must be made out to.
        Raises: AccessError: one does not accept the other. NetworkError.
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
        """Return the wire to speak over, as `as_edge` does.

        Raises: AccessError: one does not accept the other. NetworkError.
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
        """Refuse to serve strangers by mistake.

        Raises: UsageError: ``address`` can be reached from elsewhere, and nothing keeps strangers out.
        """
        if not (self.key or self.tls or self.insecure or is_loopback(address)):
            raise UsageError(
                f"{address} can be reached from other machines: pass --key-file FILE (openssl rand -hex 32 makes a "
                "key), or --tls-cert and --tls-key (make certs), or --insecure to serve whoever comes"
            )


OPEN = Access()


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach a numeric address."""
    known = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(known, "ipv4_mapped", None)
    return (mapped or known).is_loopback
