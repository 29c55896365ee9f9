"""The tests of the cloud share what the tests of the network share."""

from tests.net.conftest import cloud, listener, network, no_thread_left, pair, service, start, wires

__all__ = ["cloud", "listener", "network", "no_thread_left", "pair", "service", "start", "wires"]
