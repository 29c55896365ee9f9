"""The reference's names in `neurosurgeon.net`."""
