"""The reference's names in `neurosurgeon.models`."""
