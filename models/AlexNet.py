"""The reference's name of `neurosurgeon.models.AlexNet`."""

from neurosurgeon.models.AlexNet import AlexNet

__all__ = ["AlexNet"]
