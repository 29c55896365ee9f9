"""Small network functions without sockets: addresses and rates as text."""

from __future__ import annotations

from typing import Any

from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s, bytes_per_s_to_mbit_per_s


def format_address(address: Any) -> str:
    """Return ``host:port`` of a socket address; an IPv6 host is in brackets."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_rate(rate_bytes_per_s: float) -> str:
    """Return a rate in both common units: ``12.5 MB/s (100 Mbit/s)``."""
    megabytes, megabits = bytes_per_s_to_mb_per_s(rate_bytes_per_s), bytes_per_s_to_mbit_per_s(rate_bytes_per_s)
    return f"{megabytes:.4g} MB/s ({megabits:.4g} Mbit/s)"
