"""Count the events of a cloud for Prometheus; without --metrics-port nothing is counted."""

from __future__ import annotations

import errno

from neurosurgeon.utils.errors import PortBusyError, UsageError
from neurosurgeon.utils.units import ms_to_s

HOST = "127.0.0.1"  # counters are for this machine; its user decides who else may read them
# From a LeNet on a fast machine to a VGG on a small one with a full queue.
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Ignore all events; the base of classes that count. Called on any thread."""

    def connections(self, change: int) -> None:
        """Record that a connection opened (1) or closed (-1)."""

    def answered(self, model: str, *, receive_ms: float, queue_ms: float, compute_ms: float, cloud_ms: float) -> None:
        """Record a task with a reply, and the durations of its stages, ms."""

    def failed(self, error: str) -> None:
        """Record that a task or a connection failed with an error of this type."""

    def transferred(self, received_bytes: int, sent_bytes: int) -> None:
        """Record bytes on the wire."""

    def batch(self, size: int) -> None:
        """Record a batch: the number of tasks that ran together."""


class PrometheusMetrics(Metrics):
    """Count events, and serve the counters on a port of loopback, on threads of the library.

    Args:   port: 0 for a free one; the attribute ``port`` is the one in use.
    Raises: UsageError: prometheus_client is not installed, or the port cannot be used. PortBusyError.
    """

    def __init__(self, port: int) -> None:
        try:
            from prometheus_client import (
                CollectorRegistry,
                Counter,
                Gauge,
                Histogram,
                ProcessCollector,
                start_http_server,
            )
        except ImportError as exc:
            raise UsageError("--metrics-port needs prometheus_client: pip install prometheus-client") from exc
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        name = "neurosurgeon_{}".format
        self._requests = Counter(name("requests"), "tasks that were answered", ["model"], registry=registry)
        self._errors = Counter(name("errors"), "tasks and connections that failed", ["type"], registry=registry)
        self._bytes = Counter(name("bytes"), "bytes on the wire", ["direction"], registry=registry)
        self._connections = Gauge(name("connections"), "edges that are connected", registry=registry)
        self._latency = Histogram(
            name("latency_seconds"), "of tasks, by stage", ["stage"], buckets=BUCKETS_S, registry=registry
        )
        self._batch = Histogram(name("batch_size"), "tasks that ran as one", buckets=BATCH_BUCKETS, registry=registry)
        try:
            self._server, self._thread = start_http_server(port, HOST, registry)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise PortBusyError(f"metrics port {port} is busy: choose another one") from exc
            raise UsageError(f"metrics cannot be served on port {port}: {exc.strerror or exc}") from exc
        self.port = self._server.server_port

    def close(self) -> None:
        """Stop serving the counters."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def connections(self, change: int) -> None:
        self._connections.inc(change)

    def answered(self, model: str, *, receive_ms: float, queue_ms: float, compute_ms: float, cloud_ms: float) -> None:
        self._requests.labels(model).inc()
        stages = {"receive": receive_ms, "queue": queue_ms, "compute": compute_ms, "cloud": cloud_ms}
        for stage, duration_ms in stages.items():
            self._latency.labels(stage).observe(ms_to_s(duration_ms))

    def failed(self, error: str) -> None:
        self._errors.labels(error).inc()

    def transferred(self, received_bytes: int, sent_bytes: int) -> None:
        self._bytes.labels("received").inc(received_bytes)
        self._bytes.labels("sent").inc(sent_bytes)

    def batch(self, size: int) -> None:
        self._batch.observe(size)
