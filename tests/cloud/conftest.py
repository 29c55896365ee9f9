"""The tests of the cloud share the fixtures of the tests of the network."""

from tests.net.conftest import cloud, listener, network, no_thread_left, pair, service, start, wires

__all__ = ["cloud", "listener", "network", "no_thread_left", "pair", "service", "start", "wires"]
