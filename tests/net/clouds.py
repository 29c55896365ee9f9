"""Clouds in threads of the test's process, executors that misbehave, and edges that check their results."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from neurosurgeon.cloud.conversation import LatencySource, Rules, Service
from neurosurgeon.cloud.events import CloudEvent
from neurosurgeon.cloud.executor import CloudResult, Executor, ExecutorLimits
from neurosurgeon.cloud.server import CloudServer
from neurosurgeon.cloud.store import NetworkStore
from neurosurgeon.engine.base import Partition
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.limits import ConnectionLimiter
from neurosurgeon.net.messages import Latencies, Request
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.net.sockets import listen
from tests.equality import assert_equal
from tests.net.conftest import JOIN_S, LOOPBACK
from tests.networks import ENGINE, Network, cut, random_input, run, run_whole

MODEL = "le_net"
POINT = 3
OTHER_DIGEST = "0" * 32
LATENCIES = Latencies(MODEL, "forest", [1.0, 2.0], [0.5, 1.5], [2.0, 3.0], ["features.0"], "data of A")


class Cloud:
    """A server in threads of this process, and the events that it reported."""

    def __init__(
        self,
        executor: Executor,
        *,
        latencies: LatencySource | None = None,
        rules: Rules | None = None,
        limiter: ConnectionLimiter | None = None,
    ) -> None:
        self.events: list[CloudEvent] = []
        self.listener = listen(LOOPBACK, 0)
        self.address: tuple[str, int] = self.listener.getsockname()
        service = Service(executor, NetworkStore(executor, {}), self._observe, latencies, rules or Rules())
        self.server = CloudServer(self.listener, service, limiter)
        self.serving = threading.Thread(target=self.server.serve, daemon=True)
        self.serving.start()

    def _observe(self, event: CloudEvent, sock: object) -> None:
        self.events.append(event)

    def edge(self) -> EdgeSession:
        """Return a new conversation."""
        return EdgeSession.open(*self.address)

    def stop(self, grace_s: float = JOIN_S) -> None:
        """Stop the server; stopping a stopped one is fine."""
        if self.listener.fileno() >= 0:
            self.server.stop(grace_s)
        self.serving.join(JOIN_S)


class BlockingExecutor(Executor):
    """An executor whose tasks are computed, and then hold their worker until they may go on."""

    def __init__(self, **limits: int) -> None:
        super().__init__(ENGINE, ExecutorLimits(**limits))
        self.running, self.may_go_on, self.dropped = threading.Event(), threading.Event(), threading.Event()

    def _run_batch(self, batch: Sequence[Any]) -> list[CloudResult | Exception]:
        results = super()._run_batch(batch)
        self.running.set()
        assert self.may_go_on.wait(JOIN_S)
        return results

    def drop(self, client: Hashable) -> int:
        count = super().drop(client)
        if count:
            self.dropped.set()
        return count


class BrokenExecutor(Executor):
    """An executor with a bug."""

    def submit(self, client: Hashable, partition: Partition, arrays: Sequence[Array]) -> Future[CloudResult]:
        raise ZeroDivisionError("a secret of the cloud")


def request_at(network: Network, point: int = POINT, weights_digest: str | None = None) -> Request:
    """Return the request for the cloud partition at a partition point."""
    graph = network.graph
    mask = pack_nodes(graph, graph.edge_nodes(point))
    return Request(network.ref.name, mask, graph.digest, weights_digest or network.ref.weights_digest)


def boundary_tensors(network: Network, point: int, array: Array) -> tuple[Array, ...]:
    """Return the outputs of the edge partition for an input."""
    return run(cut(network, point).edge, [array]).arrays


def assert_answers(edge: EdgeSession, network: Network, point: int = POINT, seed: int = 0) -> None:
    """Run one task, and compare its output with the unsplit network's: bit for bit, for the cloud has one thread."""
    array = random_input() + seed
    request = request_at(network, point)
    edge.ask_to_prepare(request.preparation)
    edge.wait_until_ready(network.ref.weights_digest)
    result = edge.infer(request, boundary_tensors(network, point, array))
    (output,) = result.arrays
    assert_equal(output, run_whole(network, array), same_setup=True)
    assert np.isfinite(output).all()


def assert_serves(cloud: Cloud, network: Network) -> None:
    """Show that the cloud still serves new edges."""
    with cloud.edge() as edge:
        assert_answers(edge, network)
