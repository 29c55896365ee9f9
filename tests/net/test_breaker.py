"""The circuit breaker: its pauses, and the tasks that it admits."""

from __future__ import annotations

from neurosurgeon.net.breaker import FIRST_PAUSE_MS, LONGEST_PAUSE_MS, Breaker, BreakerState


def test_pauses_double_up_to_the_longest() -> None:
    breaker, pauses = Breaker(), []
    for _ in range(12):
        breaker.lost(1000.0)
        pauses.append(breaker.pause_ms(1000.0))
    assert pauses[:4] == [0.0, FIRST_PAUSE_MS, 2 * FIRST_PAUSE_MS, 4 * FIRST_PAUSE_MS]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_MS
    assert breaker.pause_ms(1000.0 + LONGEST_PAUSE_MS + 1) == 0.0


def test_a_reply_closes_and_resets_the_pauses() -> None:
    breaker = Breaker()
    for _ in range(3):
        breaker.lost(0.0)
    breaker.reached()
    breaker.answered()
    assert breaker.state is BreakerState.CLOSED
    breaker.lost(0.0)
    assert breaker.pause_ms(0.0) == 0.0


def test_a_loss_while_half_open_lengthens_the_pause() -> None:
    breaker = Breaker()
    breaker.lost(0.0)
    breaker.reached()
    breaker.lost(0.0)
    assert breaker.pause_ms(0.0) == FIRST_PAUSE_MS


def test_admits() -> None:
    breaker = Breaker()
    assert breaker.admits(0) and breaker.admits(5)
    breaker.lost(0.0)
    assert not breaker.admits(0)
    breaker.reached()
    assert breaker.admits(0) and not breaker.admits(1)
    breaker.answered()
    assert breaker.admits(5)
