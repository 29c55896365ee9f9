"""Convert units, all in one place. 1 MB is 10^6 bytes, 1 Mbit is 10^6 bits."""

from __future__ import annotations

BYTES_PER_MB = 1_000_000
MS_PER_S = 1_000.0
BITS_PER_BYTE = 8


def mb_per_s_to_bytes_per_s(rate_mb_per_s: float) -> float:
    """Return MB/s as bytes/s."""
    return rate_mb_per_s * BYTES_PER_MB


def bytes_per_s_to_mb_per_s(rate_bytes_per_s: float) -> float:
    """Return bytes/s as MB/s."""
    return rate_bytes_per_s / BYTES_PER_MB


def bytes_per_s_to_mbit_per_s(rate_bytes_per_s: float) -> float:
    """Return bytes/s as Mbit/s."""
    return rate_bytes_per_s * BITS_PER_BYTE / BYTES_PER_MB


def bits_per_s_to_bytes_per_s(rate_bits_per_s: float) -> float:
    """Return bit/s as bytes/s."""
    return rate_bits_per_s / BITS_PER_BYTE


def mbit_per_s_to_bytes_per_s(rate_mbit_per_s: float) -> float:
    """Return Mbit/s as bytes/s."""
    return rate_mbit_per_s * BYTES_PER_MB / BITS_PER_BYTE


def bytes_to_mb(size_bytes: float) -> float:
    """Return bytes as MB."""
    return size_bytes / BYTES_PER_MB


def mb_to_bytes(size_mb: float) -> int:
    """Return MB as bytes."""
    return round(size_mb * BYTES_PER_MB)


def s_to_ms(duration_s: float) -> float:
    """Return seconds as milliseconds."""
    return duration_s * MS_PER_S


def ms_to_s(duration_ms: float) -> float:
    """Return milliseconds as seconds."""
    return duration_ms / MS_PER_S


def readable_bytes(size_bytes: int) -> str:
    """Return a size as text: ``602112`` -> ``602.1 KB``."""
    if size_bytes < 1_000:
        return f"{size_bytes} B"
    if size_bytes < BYTES_PER_MB:
        return f"{size_bytes / 1_000:.1f} KB"
    return f"{size_bytes / BYTES_PER_MB:.1f} MB"
