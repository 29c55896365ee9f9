"""The reference's name of `neurosurgeon.reports.excel`."""

from neurosurgeon.reports.excel import save_tables

__all__ = ["save_tables"]
