"""The circuit breaker: how long it waits, and what it lets through."""

from __future__ import annotations

from neurosurgeon.net.breaker import FIRST_PAUSE_MS, LONGEST_PAUSE_MS, Breaker, BreakerState


def test_a_lost_cloud_is_looked_for_at_once_and_then_ever_less_often() -> None:
    breaker, pauses = Breaker(), []
    for _ in range(12):
        breaker.lost(1000.0)
        pauses.append(breaker.pause_ms(1000.0))
    assert pauses[:4] == [0.0, FIRST_PAUSE_MS, 2 * FIRST_PAUSE_MS, 4 * FIRST_PAUSE_MS]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_MS
    assert breaker.pause_ms(1000.0 + LONGEST_PAUSE_MS + 1) == 0.0


def test_an_answer_closes_it_and_forgets_the_failures() -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.lost(0.0)
    breaker.reached()
    breaker.answered()
    assert breaker.state is BreakerState.CLOSED
    breaker.lost(0.0)
    assert breaker.pause_ms(0.0) == 0.0


def test_a_cloud_that_is_lost_again_on_trial_is_left_longer() -> None:
    breaker = Breaker()
    breaker.lost(0.0)
    breaker.reached()
    breaker.lost(0.0)
    assert breaker.pause_ms(0.0) == FIRST_PAUSE_MS


def test_what_it_admits() -> None:
    breaker = Breaker()
    assert breaker.admits(0) and breaker.admits(5)
    breaker.lost(0.0)
    assert not breaker.admits(0)
    breaker.reached()
    assert breaker.admits(0) and not breaker.admits(1)
    breaker.answered()
    assert breaker.admits(5)
