"""The states of a queued task: every event in every state, with bytes and clocks fed in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.edge.task_states import (
    FINAL,
    Broke,
    CloudBack,
    Command,
    Event,
    NotSent,
    PartDone,
    Progress,
    Refused,
    Replied,
    RestDone,
    State,
    TaskRecord,
    on_event,
)
from neurosurgeon.planner.hedge import Hedging
from neurosurgeon.utils.errors import ConnectError, RemoteError

RECORD = TaskRecord(may_run_here=True)
SENT = RECORD._replace(state=State.SENT, rest_ms=10.0, timeout_ms=50.0, sent_ms=100.0, awaits_reply=True)
LOST = SENT._replace(state=State.LOCAL, awaits_reply=False)
HEDGED = SENT._replace(state=State.LOCAL, is_hedged=True)
AGAIN = SENT._replace(losses=1)
DONE = SENT._replace(state=State.DONE)
FAILED = RECORD._replace(state=State.FAILED)
GONE, BROKEN, DEFECT = Refused(ConnectError("gone")), Refused(RemoteError("it broke")), Broke(ValueError())
NOW_MS = 200.0


def waits(record: TaskRecord) -> TaskRecord:
    """Return a record that needs the cloud: it may not run here."""
    return record._replace(may_run_here=False)


# What each event makes of a state, and the commands. Where an event is missing, nothing changes.
TABLE = {
    (RECORD, PartDone(False, 10.0, 50.0)): (State.DONE, [Command.REPORT]),
    (RECORD, PartDone(True, 10.0, 50.0)): (State.SENT, [Command.SEND]),
    (RECORD, DEFECT): (State.FAILED, [Command.REPORT]),
    (SENT, Replied()): (State.DONE, [Command.REPORT]),
    (SENT, GONE): (State.LOCAL, []),
    (SENT, BROKEN): (State.FAILED, [Command.REPORT]),
    (SENT, DEFECT): (State.FAILED, [Command.REPORT]),
    (waits(SENT), Replied()): (State.DONE, [Command.REPORT]),
    (waits(SENT), GONE): (State.FAILED, [Command.REPORT]),
    (waits(SENT), BROKEN): (State.FAILED, [Command.REPORT]),
    (waits(SENT), DEFECT): (State.FAILED, [Command.REPORT]),
    (AGAIN, Replied()): (State.DONE, [Command.REPORT]),
    (AGAIN, GONE): (State.LOCAL, []),
    (AGAIN, BROKEN): (State.LOCAL, []),
    (AGAIN, DEFECT): (State.FAILED, [Command.REPORT]),
    (LOST, RestDone()): (State.DONE, [Command.REPORT]),
    (LOST, CloudBack(70.0)): (State.SENT, [Command.SEND]),
    (LOST, Replied()): (State.DONE, [Command.REPORT]),
    (LOST, DEFECT): (State.FAILED, [Command.REPORT]),
    (LOST._replace(losses=1), RestDone()): (State.DONE, [Command.REPORT]),
    (LOST._replace(losses=1), DEFECT): (State.FAILED, [Command.REPORT]),
    (LOST._replace(losses=1), Replied()): (State.DONE, [Command.REPORT]),
    (HEDGED, RestDone()): (State.DONE, [Command.REPORT]),
    (HEDGED, Replied()): (State.DONE, [Command.REPORT]),
    (HEDGED, DEFECT): (State.FAILED, [Command.REPORT]),
}
RECORDS = [RECORD, SENT, waits(SENT), AGAIN, LOST, LOST._replace(losses=1), HEDGED, DONE, FAILED]
EVENTS: list[Event] = [
    PartDone(False, 10.0, 50.0),
    PartDone(True, 10.0, 50.0),
    Replied(),
    GONE,
    BROKEN,
    NotSent(),
    CloudBack(70.0),
    RestDone(),
    DEFECT,
]


@pytest.mark.parametrize(("record", "event"), list(itertools.product(RECORDS, EVENTS)))
def test_a_transition(record: TaskRecord, event: Event) -> None:
    after, commands = on_event(record, event, NOW_MS)
    assert (after.state, commands) == TABLE.get((record, event), (record.state, []))


def test_a_task_that_is_sent_knows_when() -> None:
    assert on_event(RECORD, PartDone(True, 10.0, 50.0), NOW_MS)[0] == SENT._replace(sent_ms=NOW_MS)


def test_a_task_that_is_sent_again_counts_its_loss_and_has_a_new_timeout() -> None:
    after, _ = on_event(LOST, CloudBack(70.0), NOW_MS)
    assert after == AGAIN._replace(sent_ms=NOW_MS, timeout_ms=70.0)


@pytest.mark.parametrize("event", [Replied(), GONE, BROKEN, NotSent()])
def test_what_the_link_returns_ends_the_wait_for_it(event: Event) -> None:
    for record in (SENT, HEDGED, DONE):
        if (record, event) != (SENT, NotSent()):
            assert not on_event(record, event, NOW_MS)[0].awaits_reply


def watched(acked_bytes: int, until_ms: int) -> Hedging:
    """Return what has seen nothing move since time 100 of 10 KB that were sent then."""
    hedging = Hedging()
    for time_ms in range(100, until_ms + 1, 10):
        hedging.record_progress(time_ms, acked_bytes, 10_000 - acked_bytes, 0.0)
    return hedging


def test_a_task_whose_bytes_do_not_move_is_finished_here_and_withdrawn() -> None:
    stalled = Progress(watched(1_000, 400), 9_000)
    assert on_event(SENT, stalled, 400.0) == (HEDGED, [Command.WITHDRAW])
    assert on_event(waits(SENT), stalled, 400.0) == (waits(SENT), [])
    assert on_event(SENT._replace(rest_ms=1e6), stalled, 400.0)[0].state is State.SENT
    assert on_event(SENT._replace(timeout_ms=1e6), stalled, 400.0)[0].state is State.SENT
    assert on_event(HEDGED, stalled, 400.0) == (HEDGED, [])


def test_a_task_that_is_on_time_stays_sent() -> None:
    assert on_event(SENT, Progress(watched(1_000, 120), 9_000), 120.0) == (SENT, [])


@given(st.lists(st.sampled_from(EVENTS), max_size=12), st.booleans())
def test_a_task_is_reported_once_and_then_stays_as_it_is(events: list[Event], may_run_here: bool) -> None:
    record, reports = RECORD._replace(may_run_here=may_run_here), 0
    for event in events:
        before = record.state
        record, commands = on_event(record, event, NOW_MS)
        reports += commands.count(Command.REPORT)
        assert before not in FINAL or (record.state is before and not commands)
    assert reports == (record.state in FINAL)
