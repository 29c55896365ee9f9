"""What is known of the link between measurements: passive samples, age, load, and a service that is away."""

from __future__ import annotations

import threading
from unittest.mock import Mock

import pytest

from neurosurgeon.net import link_watch
from neurosurgeon.net.access import Access
from neurosurgeon.net.bandwidth import PING_BYTES, Echo
from neurosurgeon.net.link_watch import KEPT_PINGS, UDP_AGAIN, LinkWatch
from neurosurgeon.net.monitor_client import Began, given_or_measured
from neurosurgeon.utils.errors import AddressError, ConnectError, PeerGoneError
from neurosurgeon.utils.link import LinkEstimate, LinkSource, ProbeMethod

FIRST = LinkEstimate(1e6, 20.0)


class Clock:
    """A clock that only moves when a test says so."""

    def __init__(self) -> None:
        self.ms = 1000.0

    def __call__(self) -> float:
        return self.ms


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(link_watch, "now_ms", clock)
    return clock


def measures(monkeypatch: pytest.MonkeyPatch, *estimates: LinkEstimate, echo: Echo | None = None) -> list[str]:
    """Let the bandwidth service answer these estimates and pings; return the list of what was asked."""
    asked: list[str] = []
    left = iter(estimates)

    def measure(host: str, port: int, access: Access, *, use_udp: bool, quick: bool, began: Began) -> LinkEstimate:
        asked.append(("probe" if quick else "full probe") + ("" if use_udp else " without UDP"))
        return next(left)

    def ping(host: str, port: int, access: Access, *, began: Began) -> Echo:
        asked.append("ping")
        assert echo
        return echo

    monkeypatch.setattr(link_watch, "measure_link", measure)
    monkeypatch.setattr(link_watch, "ping_link", ping)
    return asked


def test_a_measurement_is_the_newest_estimate_and_grows_old(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    asked = measures(monkeypatch, *[LinkEstimate(3e6, 10.0, error=0.01)] * 2)
    watch.refresh()
    assert asked == ["probe", "full probe"]  # the first one surprised
    now = watch.now()
    assert (now.link.rate_bytes_per_s, now.link.rtt_ms) == (pytest.approx(3e6), 10.0)
    assert (now.link.age_s, now.is_stale) == (0.0, False)
    clock.ms += 2900
    assert (watch.now().link.age_s, watch.now().is_stale) == (pytest.approx(2.9), False)
    clock.ms += 200
    assert watch.now().is_stale


def test_an_old_first_value_is_stale_at_once(clock: Clock) -> None:
    first = LinkEstimate(1e6, 20.0, LinkSource.LAST, age_s=3600.0)
    assert LinkWatch("cloud", 1, first).now().is_stale


def test_what_the_user_says_stays(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, LinkEstimate(5e5, 50.0, LinkSource.GIVEN))
    asked = measures(monkeypatch, echo=Echo(5.0, 0.0))
    watch.refresh()
    watch.saw_transfer(10**6, 10.0)
    clock.ms += 1e6
    assert watch.now().link == LinkEstimate(5e5, 50.0, LinkSource.GIVEN)
    assert not watch.now().is_stale
    assert asked == ["ping"]


def test_two_transfers_that_agree_are_the_rate(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    for receive_ms in (500.0, 100.0, 100.0):
        watch.saw_transfer(1_000_000, receive_ms)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(10e6)
    assert watch.now().link.source is LinkSource.TRANSFERS


def test_a_tensor_that_crossed_just_now_is_as_good_as_a_probe(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    asked = measures(monkeypatch, LinkEstimate(1e6, 20.0), echo=Echo(30.0, 8.0))
    watch.saw_transfer(1_000_000, 1_000.0)
    clock.ms += 500
    watch.refresh()
    clock.ms += 600
    watch.refresh()
    assert asked == ["ping", "probe"]


def test_where_udp_is_blocked_it_is_left_out(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    blocked = LinkEstimate(1e6, 10.0, method=ProbeMethod.TCP_BURST, udp_is_blocked=True)
    asked = measures(monkeypatch, *[blocked] * (UDP_AGAIN + 2), blocked)
    for _ in range(UDP_AGAIN + 3):
        watch.refresh()
    assert asked == ["probe", *["probe without UDP"] * UDP_AGAIN, "probe", "probe without UDP"]


def test_a_link_faster_than_udp_does_not_block_it(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    asked = measures(monkeypatch, *[LinkEstimate(1e6, 10.0, method=ProbeMethod.TCP_BURST)] * 2)
    watch.refresh()
    watch.refresh()
    assert asked == ["probe", "probe"]


def test_a_rise_is_believed_of_a_full_probe_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token bucket lets a short train pass at the rate of the link after it."""
    watch = LinkWatch("cloud", 1, FIRST)
    burst, rate = LinkEstimate(60 * FIRST.rate_bytes_per_s, 10.0), LinkEstimate(FIRST.rate_bytes_per_s, 10.0)
    asked = measures(monkeypatch, burst, rate, burst, rate)
    for _ in range(2):
        watch.refresh()
        assert watch.now().link.rate_bytes_per_s == pytest.approx(FIRST.rate_bytes_per_s, rel=0.05)
    assert asked == ["probe", "full probe"] * 2


def test_a_fall_is_believed_of_two_quick_probes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    asked = measures(monkeypatch, *[LinkEstimate(FIRST.rate_bytes_per_s / 10, 10.0, error=0.01)] * 2)
    watch.refresh()
    assert asked == ["probe", "probe"]
    assert watch.now().link.rate_bytes_per_s == pytest.approx(FIRST.rate_bytes_per_s / 10, rel=0.05)


def test_between_small_tensors_a_probe_goes_out_once_the_estimate_is_stale(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: 30_000)
    asked = measures(monkeypatch, LinkEstimate(FIRST.rate_bytes_per_s, 20.0), echo=Echo(30.0, 0.0))
    for _ in range(4):
        clock.ms += 1_000.0
        watch.refresh()
    assert asked == ["ping", "ping", "ping", "probe"]


def test_a_given_round_trip_stays(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = LinkEstimate(FIRST.rate_bytes_per_s, 10.0, host_ms=-3.0)
    watch = LinkWatch("cloud", 1, given_or_measured(None, 50.0, 1.0, lambda: measured))
    measures(monkeypatch, measured)
    assert watch.now().link.exchange_ms == 50.0
    watch.refresh()
    watch.saw_exchange(10.0, 4_000)
    assert (watch.now().link.rtt_ms, watch.now().link.exchange_ms) == (50.0, 50.0)


def test_pings_that_pass_a_bucket_at_once_shorten_no_round_trip(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    knocked = LinkEstimate(FIRST.rate_bytes_per_s, 10.0, host_ms=-2.0)
    sending = [0]
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: sending[0])
    ping_ms = 8.0 + 2 * PING_BYTES / FIRST.rate_bytes_per_s * 1000
    measures(monkeypatch, knocked, echo=Echo(ping_ms, 0.0))
    watch.refresh()
    sending[0] = 1_000_000
    for _ in range(KEPT_PINGS):
        watch.refresh()
    assert (watch.now().link.rtt_ms, watch.now().link.exchange_ms) == pytest.approx((10.0, 10.0))


def test_a_name_that_is_not_known_just_now_only_makes_the_estimate_old(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*service: object, **how: object) -> LinkEstimate:
        raise AddressError("address 'cloud' cannot be resolved")

    monkeypatch.setattr(link_watch, "measure_link", unknown)
    LinkWatch("cloud", 1, FIRST).refresh()


def test_an_answer_behind_the_end_of_the_watch_asks_for_nothing(clock: Clock) -> None:
    with LinkWatch("cloud", 1, FIRST, interval_s=1_000.0) as watch:
        pass
    watch.saw_progress(10, 1_000.0)
    watch.saw_transfer(1_000_000, 1_000.0)


@pytest.mark.parametrize(("size_bytes", "receive_ms"), [(1000, 10.0), (10**6, 0.1), (10**6, float("nan"))])
def test_a_transfer_that_tells_nothing_is_left_out(clock: Clock, size_bytes: int, receive_ms: float) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.saw_transfer(size_bytes, receive_ms)
    assert watch.now().link == FIRST


def test_no_probe_competes_with_tensors(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: 1_000_000)
    asked = measures(monkeypatch, echo=Echo(30.0, 8.0))
    watch.refresh()
    assert asked == ["ping"]
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s
    assert 0 < watch.now().queue_ms < 8.0


def test_small_tensors_tell_no_rate_so_a_probe_follows_as_soon_as_none_crosses(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending_bytes = 40_000
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: sending_bytes)
    asked = measures(monkeypatch, LinkEstimate(1e6, 20.0), echo=Echo(20.0, 0.0))
    refreshed = Mock(side_effect=watch.refresh)
    monkeypatch.setattr(watch, "_refresh_now", refreshed)
    watch.refresh()
    assert asked == ["ping"]
    assert not watch.wants_probe  # the estimate is new
    clock.ms += 700  # the last probe began an interval ago
    watch.refresh()
    assert asked == ["ping"] * 2
    watch.saw_transfer(40_000, 50.0)
    assert asked == ["ping"] * 2  # the next one is on its way already
    sending_bytes = 0
    watch.saw_transfer(40_000, 50.0)
    assert asked == ["ping", "ping", "probe"]
    watch.saw_transfer(40_000, 50.0)
    assert refreshed.call_count == 1


def test_the_shortest_of_the_last_pings_is_the_round_trip(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LinkWatch("cloud", 1, FIRST, sending_bytes=lambda: 1_000_000)
    measures(monkeypatch, echo=Echo(35.0, 0.0))
    for _ in range(KEPT_PINGS - 1):
        watch.refresh()
    assert watch.now().link.rtt_ms == 20.0
    watch.refresh()
    assert watch.now().link.rtt_ms == pytest.approx(35.0 - 2 * PING_BYTES / FIRST.rate_bytes_per_s * 1000)


def test_tasks_tell_the_round_trip(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    for _ in range(KEPT_PINGS):
        watch.saw_exchange(50.0, 4_000)
    watch.saw_exchange(float("nan"), 4_000)
    assert watch.now().link.rtt_ms == pytest.approx(50.0 - (4_000 + PING_BYTES) / FIRST.rate_bytes_per_s * 1000)


def test_load_follows_smoothly(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.saw_load(float("nan"))
    assert watch.now().queue_ms == 0.0
    seen = []
    for _ in range(40):
        watch.saw_load(100.0)
        seen.append(watch.now().queue_ms)
    assert seen == sorted(seen)
    assert seen[0] <= 50.0
    assert seen[-1] == pytest.approx(100.0, rel=0.01)


def test_a_service_that_is_away_is_said_once_and_the_value_kept(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(host: str, port: int, access: Access, *, use_udp: bool, quick: bool, began: Began) -> LinkEstimate:
        raise ConnectError("nobody there")

    monkeypatch.setattr(link_watch, "measure_link", away)
    watch = LinkWatch("cloud", 1, FIRST)
    watch.refresh()
    watch.refresh()
    assert watch.now().link == FIRST
    assert caplog.text.count("no longer measured") == 1


def test_the_link_is_measured_in_the_background_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = threading.Event()

    def measure(host: str, port: int, access: Access, *, use_udp: bool, quick: bool, began: Began) -> LinkEstimate:
        measured.set()
        return LinkEstimate(7e6, 1.0)

    monkeypatch.setattr(link_watch, "measure_link", measure)
    with LinkWatch("cloud", 1, FIRST, interval_s=0.01):
        assert measured.wait(20.0)


def test_the_end_waits_for_no_measurement(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    has_begun, was_broken_off = threading.Event(), threading.Event()

    def measure(host: str, port: int, access: Access, *, use_udp: bool, quick: bool, began: Began) -> LinkEstimate:
        connection = Mock()
        connection.break_off.side_effect = was_broken_off.set
        began(connection)
        has_begun.set()
        assert was_broken_off.wait(20.0)
        raise PeerGoneError("broken off")

    monkeypatch.setattr(link_watch, "measure_link", measure)
    with LinkWatch("cloud", 1, FIRST, interval_s=0.01):
        assert has_begun.wait(20.0)
    assert was_broken_off.is_set()
    assert "no longer measured" not in caplog.text


# ---------------------------------------------------------------- a tensor that is slow on its way


def test_a_slow_tensor_is_believed_while_it_is_on_its_way(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.saw_progress(60_000, 100.0)  # a bit slower than expected is none
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s
    watch.saw_progress(1_448, 100.0)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(14_480)
    watch.saw_progress(30_000, 100.0)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(300_000)
    watch.saw_progress(10**6, 100.0)
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s


def test_a_tensor_that_stood_still_and_went_on_leaves_the_estimate_as_it_was(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.saw_progress(1_448, 100.0)
    clock.ms += 4_000
    watch.saw_progress(100_000, 100.0)
    watch.saw_transfer(600_000, 4_600.0)
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s


def test_a_tensor_that_stayed_slow_tells_the_rate_of_its_last_bytes_and_asks_for_a_probe(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    asked = measures(monkeypatch, LinkEstimate(2e5, 20.0, error=0.05))
    watch.saw_progress(1_448, 100.0)
    clock.ms += 600
    watch.saw_progress(20_000, 100.0)
    watch.saw_transfer(100_000, 700.0)
    assert watch.now().link.rate_bytes_per_s == pytest.approx(2e5, rel=0.01)
    assert watch.wants_probe
    watch.refresh()
    assert asked == ["probe"]
    assert not watch.wants_probe


def test_a_tensor_that_went_on_between_two_looks_leaves_the_estimate_as_it_was(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    watch.saw_progress(1_448, 100.0, 500_000)
    clock.ms += 600
    watch.saw_progress(20_000, 300.0, 480_000)
    clock.ms += 400
    watch.saw_transfer(600_000, 1_100.0)
    assert watch.now().link.rate_bytes_per_s == FIRST.rate_bytes_per_s


def test_a_probe_is_newer_than_a_slow_tensor_which_then_tells_of_more_than_one_link(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    asked = measures(monkeypatch, *(LinkEstimate(rate, 20.0, error=0.05) for rate in (15_000, 15_000, 1e6, 1e6)))
    watch.saw_progress(1_448, 100.0, 150_000)
    watch.refresh()
    known = watch.now().link.rate_bytes_per_s
    assert known == pytest.approx(15_000, rel=0.05)
    watch.saw_progress(1_000, 100.0, 120_000)  # no slower than was measured
    assert watch.now().link.rate_bytes_per_s == known
    clock.ms += 4_000
    watch.saw_transfer(150_000, 4_100.0)  # its last bytes came all at once: the link is another one again
    assert watch.now().link.rate_bytes_per_s == known
    assert watch.wants_probe
    asked.clear()
    watch.refresh()
    assert "probe" in asked
    assert watch.now().link.rate_bytes_per_s > 10 * known


def test_a_slow_tensor_that_never_arrived_tells_nothing_of_the_next(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = LinkWatch("cloud", 1, FIRST)
    measures(monkeypatch, *(LinkEstimate(1e6, 20.0, error=0.05) for _ in range(20)))
    watch.saw_progress(1_448, 1_000.0, 150_000)
    for _ in range(10):
        clock.ms += 1_000
        watch.refresh()
    known = watch.now().link.rate_bytes_per_s
    watch.saw_transfer(150_000, 150.0)
    assert watch.now().link.rate_bytes_per_s == known


def test_what_the_user_says_stays_while_a_tensor_is_slow(clock: Clock) -> None:
    watch = LinkWatch("cloud", 1, LinkEstimate(5e5, 50.0, LinkSource.GIVEN))
    watch.saw_progress(1, 100.0)
    assert watch.now().link.rate_bytes_per_s == 5e5
