"""The version of this package: pyproject.toml, and ``--version`` of every command."""

__version__ = "0.2.0"
