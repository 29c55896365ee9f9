"""The reference's name of `neurosurgeon.utils.excel_utils`."""

from neurosurgeon.utils.excel_utils import save_tables

__all__ = ["save_tables"]
