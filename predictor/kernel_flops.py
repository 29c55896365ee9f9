"""The reference's name of `neurosurgeon.predictor.kernel_flops`."""

from neurosurgeon.predictor.kernel_flops import Work, node_work, row_work

__all__ = ["Work", "node_work", "row_work"]
