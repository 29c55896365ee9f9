"""Count every event as Prometheus reads it."""

from __future__ import annotations

import builtins
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from neurosurgeon.utils.errors import PortBusyError, UsageError
from neurosurgeon.utils.metrics import Metrics, PrometheusMetrics


@pytest.fixture
def metrics() -> Iterator[PrometheusMetrics]:
    """Counters on a free port."""
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    counters = PrometheusMetrics(0)
    yield counters
    counters.close()


def scraped(port: int) -> dict[str, float]:
    """Return {name and labels: value} of all that is counted."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:  # noqa: S310  # our own
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_every_event_is_counted(metrics: PrometheusMetrics) -> None:
    for change in (1, 1, -1):
        metrics.connections(change)
    metrics.answered("le_net", receive_ms=2.0, queue_ms=0.0, compute_ms=30.0, cloud_ms=31.0)
    metrics.failed("BusyError")
    metrics.transferred(100, 20)
    metrics.transferred(50, 0)
    metrics.batch(3)
    values = scraped(metrics.port)
    assert values["neurosurgeon_connections"] == 1
    assert values['neurosurgeon_requests_total{model="le_net"}'] == 1
    assert values['neurosurgeon_errors_total{type="BusyError"}'] == 1
    assert values['neurosurgeon_bytes_total{direction="received"}'] == 150
    assert values['neurosurgeon_bytes_total{direction="sent"}'] == 20
    assert values['neurosurgeon_latency_seconds_bucket{le="0.025",stage="compute"}'] == 0
    assert values['neurosurgeon_latency_seconds_bucket{le="0.05",stage="compute"}'] == 1
    assert values['neurosurgeon_batch_size_bucket{le="2.0"}'] == 0
    assert values['neurosurgeon_batch_size_bucket{le="4.0"}'] == 1


def test_a_busy_port_is_named(metrics: PrometheusMetrics) -> None:
    with pytest.raises(PortBusyError, match=f"metrics port {metrics.port} is busy"):
        PrometheusMetrics(metrics.port)


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def fail(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "prometheus_client":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UsageError, match="pip install prometheus-client"):
        PrometheusMetrics(0)


def test_the_base_class_ignores_all_events() -> None:
    nothing = Metrics()
    nothing.connections(1)
    nothing.answered("le_net", receive_ms=0.0, queue_ms=0.0, compute_ms=0.0, cloud_ms=0.0)
    nothing.failed("BusyError")
    nothing.transferred(1, 1)
    nothing.batch(1)
