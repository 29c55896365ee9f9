"""The reference's name of `neurosurgeon.models.VggNet`."""

from neurosurgeon.models.VggNet import VggNet

__all__ = ["VggNet"]
