"""The tests of the command line share what the tests of the network share."""

from tests.net.conftest import listener, service

__all__ = ["listener", "service"]
