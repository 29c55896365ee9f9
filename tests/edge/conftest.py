"""The tests of the edge share what the tests of the network share."""

from tests.net.conftest import listener, no_thread_left

__all__ = ["listener", "no_thread_left"]
