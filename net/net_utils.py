"""The reference's name of `neurosurgeon.net.net_utils`."""

from neurosurgeon.net.net_utils import format_address, format_rate

__all__ = ["format_address", "format_rate"]
