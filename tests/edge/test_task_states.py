"""The states of a queued task: every event in every state, with given bytes and times."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.edge.task_states import (
    FINAL,
    Command,
    EdgePartitionDone,
    Event,
    Failure,
    ProgressCheck,
    Refused,
    Replied,
    ResendPlanned,
    RestDone,
    State,
    TaskRecord,
    Withdrawn,
    on_event,
)
from neurosurgeon.planner.hedge import Hedging
from neurosurgeon.utils.errors import ConnectError, RemoteError

RECORD = TaskRecord(may_run_locally=True)
SENT = RECORD._replace(state=State.SENT, rest_ms=10.0, timeout_ms=50.0, sent_ms=100.0, awaits_reply=True)
LOST = SENT._replace(state=State.LOCAL, awaits_reply=False)
HEDGED = SENT._replace(state=State.LOCAL, is_hedged=True)
AGAIN = SENT._replace(losses=1)
DONE = SENT._replace(state=State.DONE)
FAILED = RECORD._replace(state=State.FAILED)
GONE, BROKEN, DEFECT = Refused(ConnectError("gone")), Refused(RemoteError("it broke")), Failure(ValueError())
NOW_MS = 200.0


def cloud_only(record: TaskRecord) -> TaskRecord:
    """Return a record that needs the cloud: it may not run here."""
    return record._replace(may_run_locally=False)


# The next state and the commands of each event. Without an entry, nothing changes.
TABLE = {
    (RECORD, EdgePartitionDone(False, 10.0, 50.0)): (State.DONE, [Command.REPORT]),
    (RECORD, EdgePartitionDone(True, 10.0, 50.0)): (State.SENT, [Command.SEND]),
    (RECORD, DEFECT): (State.FAILED, [Command.REPORT]),
    (SENT, Replied()): (State.DONE, [Command.REPORT]),
    (SENT, GONE): (State.LOCAL, []),
    (SENT, BROKEN): (State.FAILED, [Command.REPORT]),
    (SENT, DEFECT): (State.FAILED, [Command.REPORT]),
    (cloud_only(SENT), Replied()): (State.DONE, [Command.REPORT]),
    (cloud_only(SENT), GONE): (State.FAILED, [Command.REPORT]),
    (cloud_only(SENT), BROKEN): (State.FAILED, [Command.REPORT]),
    (cloud_only(SENT), DEFECT): (State.FAILED, [Command.REPORT]),
    (AGAIN, Replied()): (State.DONE, [Command.REPORT]),
    (AGAIN, GONE): (State.LOCAL, []),
    (AGAIN, BROKEN): (State.LOCAL, []),
    (AGAIN, DEFECT): (State.FAILED, [Command.REPORT]),
    (LOST, RestDone()): (State.DONE, [Command.REPORT]),
    (LOST, ResendPlanned(70.0)): (State.SENT, [Command.SEND]),
    (LOST, Replied()): (State.DONE, [Command.REPORT]),
    (LOST, DEFECT): (State.FAILED, [Command.REPORT]),
    (LOST._replace(losses=1), RestDone()): (State.DONE, [Command.REPORT]),
    (LOST._replace(losses=1), DEFECT): (State.FAILED, [Command.REPORT]),
    (LOST._replace(losses=1), Replied()): (State.DONE, [Command.REPORT]),
    (HEDGED, RestDone()): (State.DONE, [Command.REPORT]),
    (HEDGED, Replied()): (State.DONE, [Command.REPORT]),
    (HEDGED, DEFECT): (State.FAILED, [Command.REPORT]),
}
RECORDS = [RECORD, SENT, cloud_only(SENT), AGAIN, LOST, LOST._replace(losses=1), HEDGED, DONE, FAILED]
EVENTS: list[Event] = [
    EdgePartitionDone(False, 10.0, 50.0),
    EdgePartitionDone(True, 10.0, 50.0),
    Replied(),
    GONE,
    BROKEN,
    Withdrawn(),
    ResendPlanned(70.0),
    RestDone(),
    DEFECT,
]


@pytest.mark.parametrize(("record", "event"), list(itertools.product(RECORDS, EVENTS)))
def test_a_transition(record: TaskRecord, event: Event) -> None:
    after, commands = on_event(record, event, NOW_MS)
    assert (after.state, commands) == TABLE.get((record, event), (record.state, []))


def test_a_sent_task_has_its_time() -> None:
    assert on_event(RECORD, EdgePartitionDone(True, 10.0, 50.0), NOW_MS)[0] == SENT._replace(sent_ms=NOW_MS)


def test_a_resent_task_counts_its_loss_and_has_a_new_timeout() -> None:
    after, _ = on_event(LOST, ResendPlanned(70.0), NOW_MS)
    assert after == AGAIN._replace(sent_ms=NOW_MS, timeout_ms=70.0)


@pytest.mark.parametrize("event", [Replied(), GONE, BROKEN, Withdrawn()])
def test_any_outcome_of_the_link_ends_the_wait_for_it(event: Event) -> None:
    for record in (SENT, HEDGED, DONE):
        if (record, event) != (SENT, Withdrawn()):
            assert not on_event(record, event, NOW_MS)[0].awaits_reply


def watched(acked_bytes: int, until_ms: int) -> Hedging:
    """Return a hedging that has seen no progress of 10 KB since they were sent at time 100."""
    hedging = Hedging()
    for time_ms in range(100, until_ms + 1, 10):
        hedging.record_progress(time_ms, acked_bytes, 10_000 - acked_bytes, 0.0)
    return hedging


def test_a_stalled_task_is_hedged_and_withdrawn() -> None:
    stalled = ProgressCheck(watched(1_000, 400), 9_000)
    assert on_event(SENT, stalled, 400.0) == (HEDGED, [Command.WITHDRAW])
    assert on_event(cloud_only(SENT), stalled, 400.0) == (cloud_only(SENT), [])
    assert on_event(SENT._replace(rest_ms=1e6), stalled, 400.0)[0].state is State.SENT
    assert on_event(SENT._replace(timeout_ms=1e6), stalled, 400.0)[0].state is State.SENT
    assert on_event(HEDGED, stalled, 400.0) == (HEDGED, [])


def test_a_task_on_time_stays_sent() -> None:
    assert on_event(SENT, ProgressCheck(watched(1_000, 120), 9_000), 120.0) == (SENT, [])


@given(st.lists(st.sampled_from(EVENTS), max_size=12), st.booleans())
def test_a_task_is_reported_once_and_then_does_not_change(events: list[Event], may_run_locally: bool) -> None:
    record, reports = RECORD._replace(may_run_locally=may_run_locally), 0
    for event in events:
        before = record.state
        record, commands = on_event(record, event, NOW_MS)
        reports += commands.count(Command.REPORT)
        assert before not in FINAL or (record.state is before and not commands)
    assert reports == (record.state in FINAL)
