"""The reference's names in `neurosurgeon.utils`."""
