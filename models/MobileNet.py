"""The reference's name of `neurosurgeon.models.MobileNet`."""

from neurosurgeon.models.MobileNet import MobileNet

__all__ = ["MobileNet"]
