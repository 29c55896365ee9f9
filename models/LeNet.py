"""The reference's name of `neurosurgeon.models.LeNet`."""

from neurosurgeon.models.LeNet import LeNet

__all__ = ["LeNet"]
