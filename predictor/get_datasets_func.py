"""The reference's name of `neurosurgeon.predictor.get_datasets_func`."""

from neurosurgeon.predictor.get_datasets_func import DataSet, load_dataset, read_rows

__all__ = ["DataSet", "load_dataset", "read_rows"]
