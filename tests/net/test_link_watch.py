"""The link estimate between measurements: passive samples, age, load, and an unreachable service."""

from __future__ import annotations

import threading
from unittest.mock import Mock

import pytest

from neurosurgeon.net import link_watch
from neurosurgeon.net.access import Access
from neurosurgeon.net.bandwidth import PING_BYTES, Echo
from neurosurgeon.net.link_watch import (
    KEPT_PINGS,
    UDP_RETRY_PROBES,
    LinkNow,
    LinkWatch,
    Ping,
    Probe,
    choose_measurement,
)
from neurosurgeon.net.monitor_client import OnConnect, given_or_measured
from neurosurgeon.net.rate_filter import MIN_TRANSFER_BYTES
from neurosurgeon.utils.errors import AddressError, ConnectError, PeerGoneError
from neurosurgeon.utils.link import LinkEstimate, LinkSource, ProbeMethod

FIRST = LinkEstimate(1e6, 20.0)
PROBED = LinkNow(FIRST, is_stale=False, queue_ms=0.0)
TRANSFERRED = PROBED._replace(link=FIRST._replace(source=LinkSource.TRANSFERS))
GIVEN = PROBED._replace(link=FIRST._replace(source=LinkSource.GIVEN))


class Clock:
    """A clock that moves only when a test moves it."""

    def __init__(self) -> None:
        self.ms = 1000.0

    def __call__(self) -> float:
        return self.ms


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(link_watch, "now_ms", clock)
    return clock


def fake_service(monkeypatch: pytest.MonkeyPatch, *estimates: LinkEstimate, echo: Echo | None = None) -> list[str]:
    """Let the bandwidth service return these estimates and pings; return the list of requests."""
    requested: list[str] = []
    left = iter(estimates)

    def measure(
        host: str, port: int, access: Access, *, use_udp: bool, quick: bool, on_connect: OnConnect
    ) -> LinkEstimate:
        requested.append(("probe" if quick else "full probe") + ("" if use_udp else " without UDP"))
        return next(left)

    def ping(host: str, port: int, access: Access, *, on_connect: OnConnect) -> Echo:
        requested.append("ping")
        assert echo
        return echo

    monkeypatch.setattr(link_watch, "measure_link", measure)
    monkeypatch.setattr(link_watch, "ping_link", ping)
    return requested


@pytest.mark.parametrize(
    ("now", "in_flight_bytes", "age_s", "last", "chosen"),
    [
        (PROBED, 0, 0.1, None, Probe(quick=True)),
        (PROBED, MIN_TRANSFER_BYTES, 9.0, None, Ping()),
        (PROBED, MIN_TRANSFER_BYTES, 9.0, Ping(), None),
        (PROBED, 0, 9.0, Ping(), Probe(quick=True)),  # the tensors arrived during the ping
        (PROBED, 1, 0.4, None, Ping()),
        (PROBED, 1, 0.6, None, Ping(wants_probe=True)),
        (PROBED._replace(is_stale=True), 1, 3.1, None, Probe(quick=True)),
        (TRANSFERRED, 0, 0.9, None, Ping()),
        (TRANSFERRED, 0, 1.1, None, Probe(quick=True)),
        (TRANSFERRED._replace(wants_probe=True), 0, 0.1, None, Probe(quick=True)),
        (TRANSFERRED._replace(outlier_bytes_per_s=2e6), 0, 0.1, None, Probe(quick=True)),
        (GIVEN, 1, 0.0, None, Ping()),
        (GIVEN, 0, 0.0, Ping(), None),
        (PROBED, 0, 0.0, Probe(quick=True), None),
        (PROBED._replace(outlier_bytes_per_s=2e6), 0, 0.0, Probe(quick=True), Probe(quick=False, is_second=True)),
        (PROBED._replace(outlier_bytes_per_s=5e5), 0, 0.0, Probe(quick=True), Probe(quick=True, is_second=True)),
        (PROBED._replace(outlier_bytes_per_s=5e5), 0, 0.0, Probe(quick=True, is_second=True), None),
    ],
)
def test_choose_measurement(
    now: LinkNow, in_flight_bytes: int, age_s: float, last: Ping | Probe | None, chosen: Ping | Probe | None
) -> None:
    now = now._replace(link=now.link._replace(age_s=age_s))
    assert choose_measurement(now, in_flight_bytes, last=last) == chosen


def test_a_measurement_is_the_estimate_and_ages(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    requested = fake_service(monkeypatch, *[LinkEstimate(3e6, 10.0, error=0.01)] * 2)
    watch.refresh()
    assert requested == ["probe", "full probe"]  # the first one was an outlier
    now = watch.now()
    assert (now.link.rate_bytes_per_s, now.link.rtt_ms) == (pytest.approx(3e6), 10.0)
    assert (now.link.age_s, now.is_stale) == (0.0, False)
    clock.ms += 2900
    assert (watch.now().link.age_s, watch.now().is_stale) == (pytest.approx(2.9), False)
    clock.ms += 200
    assert watch.now().is_stale


def test_an_old_first_estimate_is_stale(clock: Clock) -> None:
    first = LinkEstimate(1e6, 20.0, LinkSource.LAST, age_s=3600.0)
    assert LinkWatch("cloud", 1, first).now().is_stale


def test_a_given_rate_stays(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, LinkEstimate(5e5, 50.0, LinkSource.GIVEN))
    requested = fake_service(monkeypatch, echo=Echo(5.0, 0.0))
    watch.refresh()
    watch.record_transfer(10**6, 10.0)
    clock.ms += 1e6
    assert watch.now().link == LinkEstimate(5e5, 50.0, LinkSource.GIVEN)
    assert not watch.now().is_stale
    assert requested == ["ping"]


def test_two_transfers_that_agree_are_the_rate(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    for receive_ms in (500.0, 100.0, 100.0):
        watch.record_transfer(1_000_000, receive_ms)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(10e6)
    assert watch.now().link.source is LinkSource.TRANSFERS


def test_a_recent_transfer_replaces_a_probe(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    requested = fake_service(monkeypatch, LinkEstimate(1e6, 20.0), echo=Echo(30.0, 8.0))
    watch.record_transfer(1_000_000, 1_000.0)
    clock.ms += 500
    watch.refresh()
    clock.ms += 600
    watch.refresh()
    assert requested == ["ping", "probe"]


def test_blocked_udp_is_retried_after_some_probes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    blocked = LinkEstimate(1e6, 10.0, method=ProbeMethod.TCP_BURST, udp_is_blocked=True)
    requested = fake_service(monkeypatch, *[blocked] * (UDP_RETRY_PROBES + 2), blocked)
    for _ in range(UDP_RETRY_PROBES + 3):
        watch.refresh()
    assert requested == ["probe", *["probe without UDP"] * UDP_RETRY_PROBES, "probe", "probe without UDP"]


def test_a_tcp_burst_does_not_stop_udp(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    requested = fake_service(monkeypatch, *[LinkEstimate(1e6, 10.0, method=ProbeMethod.TCP_BURST)] * 2)
    watch.refresh()
    watch.refresh()
    assert requested == ["probe", "probe"]


def test_only_a_full_probe_confirms_a_rise(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token bucket passes a short train at the rate of the link after it."""
    watch = LinkWatch("cloud", 1, FIRST)
    burst, rate = LinkEstimate(60 * FIRST.rate_bytes_per_s, 10.0), LinkEstimate(FIRST.rate_bytes_per_s, 10.0)
    requested = fake_service(monkeypatch, burst, rate, burst, rate)
    for _ in range(2):
        watch.refresh()
        assert watch.now().link.rate_bytes_per_s == pytest.approx(FIRST.rate_bytes_per_s, rel=0.05)
    assert requested == ["probe", "full probe"] * 2


def test_two_quick_probes_confirm_a_fall(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    requested = fake_service(monkeypatch, *[LinkEstimate(FIRST.rate_bytes_per_s / 10, 10.0, error=0.01)] * 2)
    watch.refresh()
    assert requested == ["probe", "probe"]
    assert watch.now().link.rate_bytes_per_s == pytest.approx(FIRST.rate_bytes_per_s / 10, rel=0.05)


def test_a_stale_estimate_is_probed_beside_small_tensors(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: 30_000)
    requested = fake_service(monkeypatch, LinkEstimate(FIRST.rate_bytes_per_s, 20.0), echo=Echo(30.0, 0.0))
    for _ in range(4):
        clock.ms += 1_000.0
        watch.refresh()
    assert requested == ["ping", "ping", "ping", "probe"]


def test_a_given_round_trip_stays(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = LinkEstimate(FIRST.rate_bytes_per_s, 10.0, host_ms=-3.0)
    watch = LinkWatch("cloud", 1, given_or_measured(None, 50.0, 1.0, lambda: measured))
    fake_service(monkeypatch, measured)
    assert watch.now().link.exchange_ms == 50.0
    watch.refresh()
    watch.record_exchange(10.0, 4_000)
    assert (watch.now().link.rtt_ms, watch.now().link.exchange_ms) == (50.0, 50.0)


def test_pings_faster_than_the_rate_do_not_shorten_the_rtt(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = LinkEstimate(FIRST.rate_bytes_per_s, 10.0, host_ms=-2.0)
    sending = [0]
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: sending[0])
    ping_ms = 8.0 + 2 * PING_BYTES / FIRST.rate_bytes_per_s * 1000
    fake_service(monkeypatch, measured, echo=Echo(ping_ms, 0.0))
    watch.refresh()
    sending[0] = 1_000_000
    for _ in range(KEPT_PINGS):
        watch.refresh()
    assert (watch.now().link.rtt_ms, watch.now().link.exchange_ms) == pytest.approx((10.0, 10.0))


def test_a_name_that_does_not_resolve_is_no_error(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*service: object, **how: object) -> LinkEstimate:
        raise AddressError("address 'cloud' cannot be resolved")

    monkeypatch.setattr(link_watch, "measure_link", unknown)
    LinkWatch("cloud", 1, FIRST).refresh()


def test_records_after_the_end_request_no_probe(clock: Clock) -> None:
    with LinkWatch("cloud", 1, FIRST, interval_s=1_000.0) as watch:
        pass
    watch.record_progress(10, 1_000.0)
    watch.record_transfer(1_000_000, 1_000.0)


@pytest.mark.parametrize(("size_bytes", "receive_ms"), [(1000, 10.0), (10**6, 0.1), (10**6, float("nan"))])
def test_a_small_or_short_transfer_is_ignored(clock: Clock, size_bytes: int, receive_ms: float) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.record_transfer(size_bytes, receive_ms)
    assert watch.now().link == FIRST


def test_no_probe_competes_with_tensors(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: 1_000_000)
    requested = fake_service(monkeypatch, echo=Echo(30.0, 8.0))
    watch.refresh()
    assert requested == ["ping"]
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s
    assert 0 < watch.now().queue_ms < 8.0


def test_after_small_tensors_an_idle_link_is_probed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    sending_bytes = 40_000
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: sending_bytes)
    requested = fake_service(monkeypatch, LinkEstimate(1e6, 20.0), echo=Echo(20.0, 0.0))
    refreshed = Mock(side_effect=watch.refresh)
    monkeypatch.setattr(watch, "_refresh_now", refreshed)
    watch.refresh()
    assert requested == ["ping"]
    assert not watch.wants_probe  # the estimate is new
    clock.ms += 700  # the last probe began an interval ago
    watch.refresh()
    assert requested == ["ping"] * 2
    watch.record_transfer(40_000, 50.0)
    assert requested == ["ping"] * 2  # the next one is in flight already
    sending_bytes = 0
    watch.record_transfer(40_000, 50.0)
    assert requested == ["ping", "ping", "probe"]
    watch.record_transfer(40_000, 50.0)
    assert refreshed.call_count == 1


def test_the_shortest_recent_ping_is_the_round_trip(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: 1_000_000)
    fake_service(monkeypatch, echo=Echo(35.0, 0.0))
    for _ in range(KEPT_PINGS - 1):
        watch.refresh()
    assert watch.now().link.rtt_ms == 20.0
    watch.refresh()
    assert watch.now().link.rtt_ms == pytest.approx(35.0 - 2 * PING_BYTES / FIRST.rate_bytes_per_s * 1000)


def test_tasks_measure_the_round_trip(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    for _ in range(KEPT_PINGS):
        watch.record_exchange(50.0, 4_000)
    watch.record_exchange(float("nan"), 4_000)
    assert watch.now().link.rtt_ms == pytest.approx(50.0 - (4_000 + PING_BYTES) / FIRST.rate_bytes_per_s * 1000)


def test_load_is_smoothed(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.record_load(float("nan"))
    assert watch.now().queue_ms == 0.0
    seen = []
    for _ in range(40):
        watch.record_load(100.0)
        seen.append(watch.now().queue_ms)
    assert seen == sorted(seen)
    assert seen[0] <= 50.0
    assert seen[-1] == pytest.approx(100.0, rel=0.01)


def test_an_unreachable_service_is_logged_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(
        host: str, port: int, access: Access, *, use_udp: bool, quick: bool, on_connect: OnConnect
    ) -> LinkEstimate:
        raise ConnectError("no service there")

    monkeypatch.setattr(link_watch, "measure_link", unreachable)
    watch = LinkWatch("cloud", 1, FIRST)
    watch.refresh()
    watch.refresh()
    assert watch.now().link == FIRST
    assert caplog.text.count("no longer measured") == 1


def test_the_link_is_measured_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = threading.Event()

    def measure(
        host: str, port: int, access: Access, *, use_udp: bool, quick: bool, on_connect: OnConnect
    ) -> LinkEstimate:
        measured.set()
        return LinkEstimate(7e6, 1.0)

    monkeypatch.setattr(link_watch, "measure_link", measure)
    with LinkWatch("cloud", 1, FIRST, interval_s=0.01):
        assert measured.wait(20.0)


def test_the_end_breaks_off_a_measurement(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    has_begun, was_broken_off = threading.Event(), threading.Event()

    def measure(
        host: str, port: int, access: Access, *, use_udp: bool, quick: bool, on_connect: OnConnect
    ) -> LinkEstimate:
        connection = Mock()
        connection.break_off.side_effect = was_broken_off.set
        on_connect(connection)
        has_begun.set()
        assert was_broken_off.wait(20.0)
        raise PeerGoneError("broken off")

    monkeypatch.setattr(link_watch, "measure_link", measure)
    with LinkWatch("cloud", 1, FIRST, interval_s=0.01):
        assert has_begun.wait(20.0)
    assert was_broken_off.is_set()
    assert "no longer measured" not in caplog.text


# ---------------------------------------------------------------- a stalled transfer


def test_a_stalled_transfer_is_the_rate_while_in_flight(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.record_progress(60_000, 100.0)  # a bit slower than expected is none
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s
    watch.record_progress(1_448, 100.0)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(14_480)
    watch.record_progress(30_000, 100.0)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(300_000)
    watch.record_progress(10**6, 100.0)
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s


def test_a_stall_that_ended_leaves_the_estimate(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.record_progress(1_448, 100.0)
    clock.ms += 4_000
    watch.record_progress(100_000, 100.0)
    watch.record_transfer(600_000, 4_600.0)
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s


def test_a_slow_end_is_a_sample_and_needs_a_probe(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    requested = fake_service(monkeypatch, LinkEstimate(2e5, 20.0, error=0.05))
    watch.record_progress(1_448, 100.0)
    clock.ms += 600
    watch.record_progress(20_000, 100.0)
    watch.record_transfer(100_000, 700.0)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(2e5, rel=0.01)
    assert watch.wants_probe
    watch.refresh()
    assert requested == ["probe"]
    assert not watch.wants_probe


def test_a_fast_end_between_two_polls_leaves_the_estimate(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.record_progress(1_448, 100.0, 500_000)
    clock.ms += 600
    watch.record_progress(20_000, 300.0, 480_000)
    clock.ms += 400
    watch.record_transfer(600_000, 1_100.0)
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s


def test_a_probe_is_newer_than_a_stalled_transfer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    requested = fake_service(
        monkeypatch, *(LinkEstimate(rate, 20.0, error=0.05) for rate in (15_000, 15_000, 1e6, 1e6))
    )
    watch.record_progress(1_448, 100.0, 150_000)
    watch.refresh()
    known = watch.now().link.rate_bytes_per_s
    assert known == pytest.approx(15_000, rel=0.05)
    watch.record_progress(1_000, 100.0, 120_000)  # no slower than was measured
    assert watch.now().link.rate_bytes_per_s == known
    clock.ms += 4_000
    watch.record_transfer(150_000, 4_100.0)  # its last bytes came all at once: the link is another one again
    assert watch.now().link.rate_bytes_per_s == known
    assert watch.wants_probe
    requested.clear()
    watch.refresh()
    assert "probe" in requested
    assert watch.now().link.rate_bytes_per_s > 10 * known


def test_a_stall_without_an_end_is_no_sample_of_the_next(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    fake_service(monkeypatch, *(LinkEstimate(1e6, 20.0, error=0.05) for _ in range(20)))
    watch.record_progress(1_448, 1_000.0, 150_000)
    for _ in range(10):
        clock.ms += 1_000
        watch.refresh()
    known = watch.now().link.rate_bytes_per_s
    watch.record_transfer(150_000, 150.0)
    assert watch.now().link.rate_bytes_per_s == known


def test_a_given_rate_stays_during_a_stall(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, LinkEstimate(5e5, 50.0, LinkSource.GIVEN))
    watch.record_progress(1, 100.0)
    assert watch.now().link.rate_bytes_per_s == 5e5
