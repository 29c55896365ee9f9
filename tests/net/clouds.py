"""Clouds in threads of the test's process, engines that misbehave, and edges that check their answers."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from neurosurgeon.cloud.events import CloudEvent
from neurosurgeon.cloud.executor import CloudEngine, CloudResult, EngineLimits
from neurosurgeon.cloud.server import CloudServer
from neurosurgeon.engine.torch_engine import random_input, run_half, run_whole
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.models.zoo import Cut, Network
from neurosurgeon.net.messages import Latencies, Request
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.net.sockets import listen
from tests.equality import assert_equal
from tests.net.conftest import JOIN_S, LOOPBACK

MODEL = "le_net"
POINT = 3
OTHER_DIGEST = "0" * 32
LATENCIES = Latencies(MODEL, "forest", [1.0, 2.0], [0.5, 1.5], [2.0, 3.0], ["features.0"], "data of A")


class Cloud:
    """A server in threads of this process, and what it observed."""

    def __init__(self, engine: CloudEngine, **options: Any) -> None:
        self.events: list[CloudEvent] = []
        self.listener = listen(LOOPBACK, 0)
        self.address: tuple[str, int] = self.listener.getsockname()
        self.server = CloudServer(self.listener, engine, lambda event, sock: self.events.append(event), **options)
        self.serving = threading.Thread(target=self.server.serve, daemon=True)
        self.serving.start()

    def edge(self) -> EdgeSession:
        """Return a new conversation."""
        return EdgeSession.open(*self.address)

    def stop(self, grace_s: float = JOIN_S) -> None:
        """Stop the server; stopping a stopped one is fine."""
        if self.listener.fileno() >= 0:
            self.server.stop(grace_s)
        self.serving.join(JOIN_S)


class BlockingEngine(CloudEngine):
    """An engine whose tasks are computed, and then hold their worker until they may go on."""

    def __init__(self, **limits: int) -> None:
        super().__init__("cpu", 1, {}, EngineLimits(**limits))
        self.running, self.may_go_on, self.dropped = threading.Event(), threading.Event(), threading.Event()

    def _computed(self, batch: Sequence[Any]) -> list[CloudResult | Exception]:
        results = super()._computed(batch)
        self.running.set()
        assert self.may_go_on.wait(JOIN_S)
        return results

    def drop(self, client: Hashable) -> int:
        count = super().drop(client)
        if count:
            self.dropped.set()
        return count


class BrokenEngine(CloudEngine):
    """An engine with a bug."""

    def submit(self, client: Hashable, cut: Cut, tensors: Sequence[Tensor]) -> Future[CloudResult]:
        raise ZeroDivisionError("a secret of the cloud")


def request_at(network: Network, point: int = POINT, weights_digest: str | None = None) -> Request:
    """Return what asks the cloud for its half at a partition point."""
    graph = network.graph
    mask = pack_nodes(graph, graph.edge_nodes(point))
    return Request(network.name, mask, graph.digest, weights_digest or network.weights_digest)


def crossing(network: Network, point: int, tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what the edge half makes of an input."""
    return run_half(network.cut(point).edge, [tensor]).tensors


def assert_answers(edge: EdgeSession, network: Network, point: int = POINT, seed: int = 0) -> None:
    """Run one task, and compare its answer with the unsplit network's: bit for bit, for the cloud has one thread."""
    tensor = random_input() + seed
    request = request_at(network, point)
    edge.ask_to_prepare(request.preparation)
    edge.wait_until_ready(network.weights_digest)
    result = edge.infer(request, crossing(network, point, tensor))
    (output,) = result.tensors
    assert_equal(output, run_whole(network, tensor), same_setup=True)
    assert output.isfinite().all()


def assert_serves(cloud: Cloud, network: Network) -> None:
    """Show that the cloud still serves new edges."""
    with cloud.edge() as edge:
        assert_answers(edge, network)
