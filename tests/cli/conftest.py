"""Fixtures of the network's tests, which the tests of the command line use, too."""

from tests.net.conftest import listener, service

__all__ = ["listener", "service"]
